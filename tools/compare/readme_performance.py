#!/usr/bin/env python3
"""Writes the performance section of README.md from what compare.py measured:

    readme_performance.py comparison.json [cpu.json ...] [--readme README.md]

The section stands between two markers and is replaced as a whole; where there is none yet, it is put before
"## Build". Nothing in it is typed by hand.
"""

import argparse
import json
import sys
from pathlib import Path

from table import report

BEGIN = "<!-- performance: written by tools/compare/readme_performance.py -->"
END = "<!-- performance: end -->"
BEFORE = "## Build\n"


def section(results):
    text = f"{BEGIN}\n## Performance\n"
    for result in results:
        text += f"\n{report(result).rstrip()}\n\nMeasured by\n\n"
        text += f"    {result['about']['command']}\n"
    return text + END + "\n"


def put_into(readme, new):
    """The README with its section replaced, or added."""
    begin, end = readme.find(BEGIN), readme.find(END)
    if begin >= 0 and end > begin:
        return readme[:begin] + new + readme[end + len(END) + 1:]
    if begin >= 0 or end >= 0:
        raise SystemExit("readme_performance: one marker is there and the other is not: put both back")
    at = readme.find("\n" + BEFORE)
    if at < 0:
        raise SystemExit(f"readme_performance: found neither the markers nor \"{BEFORE.strip()}\"")
    return readme[:at + 1] + new + "\n" + readme[at + 1:]


def main(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", nargs="+", help="JSON files of compare.py")
    p.add_argument("--readme", default=str(Path(__file__).parents[2] / "README.md"))
    args = p.parse_args(argv)
    results = [json.loads(Path(f).read_text()) for f in args.results]
    for file, result in zip(args.results, results):
        if not any(r.get("seconds") for r in result["rows"]):
            raise SystemExit(f"readme_performance: {file} has no measured row")
    path = Path(args.readme)
    path.write_text(put_into(path.read_text(), section(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The process in which one system is measured:  worker.py SYSTEM OPTIONS_AS_JSON

Reads a list of tests as a JSON line on stdin, writes a JSON line for each result, then {"done": true}; the
first line it writes is {"about": ...} or {"missing": "why"}. What the libraries print goes to stderr.
"""

import json
import os
import sys

from peers import Missing, open_peer


def main():
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message):
        results.write(json.dumps(message) + "\n")
        results.flush()

    try:
        peer = open_peer(sys.argv[1], json.loads(sys.argv[2]))
    except Missing as e:
        return say({"missing": str(e)})
    say({"about": peer.about})
    for line in sys.stdin:
        for index, result in peer.measure(json.loads(line)):
            say({"index": index, "result": result})
        say({"done": True})


if __name__ == "__main__":
    main()

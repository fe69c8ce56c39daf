#!/usr/bin/env python3
"""Draws what `krait bench -o json` measured: throughput against batch size (decode) and against
prompt length (prefill), the floor of each as a dashed line.

    krait bench ... -o json | plot_bench.py FILE.png|svg      (krait bench --plot does this)
    plot_bench.py --check      exit code 0 if drawing is possible, 3 without matplotlib
"""

import json
import sys

NO_MATPLOTLIB = 3


def series(rows, kind):
    """{label: [(x, tokens/s, tokens/s at the floor or None)]}: x is the batch of a decode row, the
    prompt of a prefill row; mixed rows are left out."""
    lines = {}
    for row in rows:
        if row.get("error"):
            continue
        prompt, generated = row["n_prompt"], row["n_gen"]
        if (kind == "decode") != (prompt == 0) or (kind == "prefill") != (generated == 0):
            continue
        label = f"{row['model']}, {row['dtype']}, state {row['state_dtype']}"
        x = row["n_batch"] if kind == "decode" else prompt
        lines.setdefault(label, []).append((x, row["median_ts"], row.get("floor_ts")))
    return {label: sorted(points) for label, points in lines.items()}


def draw(rows, file):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = [(kind, x, lines) for kind, x in (("decode", "sequences"), ("prefill", "prompt tokens"))
              if (lines := series(rows, kind))]
    if not panels:
        raise SystemExit("plot_bench: there are no decode or prefill rows to draw")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False)
    for axis, (kind, x_label, lines) in zip(axes[0], panels):
        for label, points in lines.items():
            xs = [p[0] for p in points]
            line, = axis.plot(xs, [p[1] for p in points], marker="o", label=label)
            if all(p[2] for p in points):
                axis.plot(xs, [p[2] for p in points], linestyle="--", marker="_",
                          color=line.get_color(), label=f"{label}: floor")
        axis.set(title=kind, xlabel=x_label, ylabel="tokens/s", xscale="log", yscale="log")
        ticks = sorted({p[0] for points in lines.values() for p in points})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.yaxis.set_minor_formatter(ticker.ScalarFormatter())
        axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    first = rows[0]
    figure.suptitle(f"krait {first['build_version']} ({first['build_commit']}) on {first['device']}")
    figure.tight_layout()
    figure.savefig(file)


def main():
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return NO_MATPLOTLIB
    if sys.argv[1] != "--check":
        draw(json.load(sys.stdin), sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""A long batch of short prompts: does memory stay flat, is the file read once before the start, does
the rate stay the same to the end?

    tools/batch_soak.py build/cpu-release/krait [-n 100000] [-- FLAGS OF KRAIT BATCH]

Prints resident memory, answers per second and bytes read while krait batch runs, and fails if memory
grows by more than --limit MB between a tenth of the way and the end.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

WORDS = ("the a little girl boy dog cat who went to park and saw big tree with her friend then they "
         "played all day happy sad sun rain bird").split()


def proc(pid, name, key):
    with open(f"/proc/{pid}/{name}", encoding="ascii") as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1])
    return 0


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("krait")
    p.add_argument("-n", type=int, default=100000, help="prompts")
    p.add_argument("--limit", type=float, default=16, help="MB of growth that are allowed")
    p.add_argument("flags", nargs="*", help="of krait batch")
    args = p.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "in.txt"), os.path.join(folder, "out.jsonl")
        rng = random.Random(1)
        with open(source, "w", encoding="ascii") as f:
            for _ in range(args.n):
                f.write(" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) + "\n")
        size = os.path.getsize(source)

        start = time.monotonic()
        run = subprocess.Popen([args.krait, "batch", "-i", source, "-o", target, "-q", "-n", "2",
                                *args.flags])
        first, samples, last_print = None, [], 0.0
        while run.poll() is None:
            time.sleep(0.05)
            now = time.monotonic() - start
            try:
                rss = proc(run.pid, "status", "VmRSS:") / 1024
                read = proc(run.pid, "io", "rchar:")
                lines = 0
                if os.path.exists(target) and os.path.getsize(target) > 0:
                    with open(target, "rb") as f:  # the last whole line says how far it is
                        f.seek(max(0, os.path.getsize(target) - 4096))
                        whole = f.read().split(b"\n")[-2:-1]
                    lines = json.loads(whole[0])["line"] if whole and whole[0] else 0
            except (OSError, ValueError):
                continue
            if lines and first is None:
                first = now
                print(f"first answers after {now:.2f} s; {read / size:.2f} x the file was read "
                      "by then, libraries and model included")
            if lines:
                samples.append((lines, now, rss))
            if now - last_print > 10:
                last_print = now
                print(f"{now:6.1f} s  {lines:7d} lines  {rss:6.1f} MB")
                sys.stdout.flush()
        if run.returncode != 0:
            sys.exit(f"krait batch ended with {run.returncode}")
        seconds = time.monotonic() - start
        with open(target, "rb") as f:
            answered = sum(1 for _ in f)
        if answered != args.n:
            sys.exit(f"{answered} of {args.n} lines were answered")
        late = [s for s in samples if s[0] >= args.n // 10]
        half = next(s for s in samples if s[0] >= args.n // 2)
        growth = max(s[2] for s in late) - late[0][2]
        print(f"{args.n} lines in {seconds:.1f} s; first half {half[0] / half[1]:.0f} lines/s, "
              f"second {(args.n - half[0]) / (seconds - half[1]):.0f}; memory grew by "
              f"{growth:.1f} MB after the first tenth, to {max(s[2] for s in samples):.1f} MB")
        if growth > args.limit:
            sys.exit(f"more than {args.limit} MB")


if __name__ == "__main__":
    main()

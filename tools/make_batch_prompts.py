#!/usr/bin/env python3
"""Writes prompts of random token ids for krait batch, the same for the same seed.

The default is the mix by which batches are measured: 2,000 prompts of 16 to 1,024 tokens, 16 to 512
generated, lengths uniform, the end of text ignored so that the lengths are those asked for:

    tools/make_batch_prompts.py > mix.jsonl
    krait batch --random-weights 2.8b -i mix.jsonl -o out.jsonl --summary summary.json

With --predict the file is not written; from the tokens per second that `krait bench` measures for
prefill and for decode at the batch of the run, it prints how long the mix would take at those rates,
and with --summary which share of that the run reached:

    tools/make_batch_prompts.py --predict PREFILL DECODE --summary summary.json
"""
import argparse
import json
import random
import sys


def lengths(args):
    rng = random.Random(args.seed)
    return [(rng.randint(*args.prompt), rng.randint(*args.generate)) for _ in range(args.n)]


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-n", type=int, default=2000, help="prompts")
    p.add_argument("--prompt", type=int, nargs=2, default=(16, 1024), metavar=("MIN", "MAX"))
    p.add_argument("--generate", type=int, nargs=2, default=(16, 512), metavar=("MIN", "MAX"))
    p.add_argument("--vocab", type=int, default=50277)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--predict", type=float, nargs=2, metavar=("PREFILL", "DECODE"),
                   help="tokens per second of prefill and decode")
    p.add_argument("--summary", help="what krait batch --summary wrote")
    args = p.parse_args()

    mix = lengths(args)
    if args.predict:
        prompt, generated = (sum(side) for side in zip(*mix))
        seconds = prompt / args.predict[0] + generated / args.predict[1]
        rate = (prompt + generated) / seconds
        print(f"{prompt} prompt tokens, {generated} generated: {seconds:.1f} s, {rate:.0f} tok/s")
        if args.summary:
            with open(args.summary, encoding="utf-8") as f:
                s = json.load(f)
            waited = max(e["waited_for_device_seconds"] for e in s["engines"])
            print(f"measured: {s['seconds']:.1f} s, {s['tokens_per_second']:.0f} tok/s, "
                  f"{100 * s['tokens_per_second'] / rate:.1f}% of that; "
                  f"the host waited for the device {100 * waited / s['seconds']:.1f}% of the time")
        return
    ids = random.Random(args.seed + 1)
    for n_prompt, n_new in mix:
        line = {"prompt": [ids.randrange(args.vocab) for _ in range(n_prompt)],
                "max_tokens": n_new, "ignore_eos": True}
        sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

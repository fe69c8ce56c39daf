#!/usr/bin/env python3
"""Measures krait and what people would use instead, side by side on one device, and prints a Markdown table
with ratios. One command on a machine with a GPU:

    python3 tools/compare/compare.py --krait build/cuda-release/krait -o comparison.json

Systems: krait, mamba_ssm, transformers, gpt-neox (a Transformer of the same size) and llama.cpp
(--llama-bench PATH). Whatever is not installed, or fails, is one line, and the rest comes. The systems take
turns on each shape and kind of test, the important ones first, so that --seconds can cut the rest.
With --device cpu: krait against llama.cpp (and transformers).
"""

import argparse
import datetime
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from plan import BATCHES, GENERATE, GENERATE_BATCHES, PROMPTS, make_plan
from shapes import SHAPES
from table import report

HERE = Path(__file__).parent
SYSTEMS = ["krait", "mamba_ssm", "llama.cpp", "transformers", "gpt-neox"]


class Worker:
    """The process of one system; results are read as they come."""

    def __init__(self, system, options, python):
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), system, json.dumps(options)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if options["quiet"] else None,
            start_new_session=True)
        self.lines = selectors.DefaultSelector()
        self.lines.register(self.process.stdout, selectors.EVENT_READ)
        self.buffer = b""

    def read(self, deadline):
        """The next message; None when the process ended, TimeoutError at the deadline."""
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not self.lines.select(left):
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def ask(self, tests):
        self.process.stdin.write(json.dumps([asdict(t) for t in tests]).encode() + b"\n")
        self.process.stdin.flush()

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)   # with the programs it has started
        self.process.wait()


class Comparison:
    def __init__(self, args):
        self.args = args
        self.end = time.monotonic() + args.seconds
        self.workers = {}
        self.systems = {}     # what the JSON says of each
        self.rows = {}        # (test, system) -> row
        self.cost = {}        # (system, kind) -> seconds that its last unit took
        self.options = {"krait": args.krait, "device": args.device, "threads": args.threads,
                        "repetitions": args.repetitions, "llama_bench": args.llama_bench,
                        "gguf_dir": args.gguf_dir, "quiet": not args.verbose}

    def say(self, text):
        left = max(0, self.end - time.monotonic())
        print(f"[{left:4.0f} s left] {text}", file=sys.stderr, flush=True)

    def worker(self, system):
        """The running worker, or None where the system is missing."""
        if system in self.workers or "missing" in self.systems.get(system, {}):
            return self.workers.get(system)
        worker = Worker(system, self.options, self.args.python)
        try:
            first = worker.read(min(self.end, time.monotonic() + self.args.unit_seconds))
        except TimeoutError:
            first = {"missing": "it took too long to start"}
        if first is None:
            first = {"missing": "its process ended at once"}
        if "missing" in first:
            worker.close()
            self.systems[system] = {"missing": first["missing"]}
            self.say(f"{system}: {first['missing']}")
            return None
        self.systems[system] = first["about"]
        self.workers[system] = worker
        return worker

    def put(self, test, system, result):
        row = self.rows.setdefault((test, system), {**asdict(test), "system": system})
        if "error" in result:
            if "seconds" not in row:
                row["error"] = result["error"]
            return
        row.pop("error", None)
        seconds = row.get("seconds", []) + result.pop("seconds")   # of the rounds before
        row.update(result, seconds=seconds)

    def run_unit(self, unit):
        kind = unit.tests[0].kind
        where = f"{unit.tests[0].shape} {kind}"
        left = self.end - time.monotonic()
        if left < max(3.0, self.cost.get((unit.system, kind), 0) / 2):
            for t in unit.tests:
                self.put(t, unit.system, {"error": "no time was left"})
            return
        worker = self.worker(unit.system)
        if worker is None:
            return
        self.say(f"{where}: {unit.system}")
        start = time.monotonic()
        pending = set(range(len(unit.tests)))
        error = None
        try:
            worker.ask(unit.tests)
            while pending:
                # A result may take the unit's time; with every result the clock starts again.
                deadline = min(self.end, time.monotonic() + self.args.unit_seconds)
                message = worker.read(deadline)
                if message is None:
                    error = "its process ended without a result"
                    break
                if message.get("done"):
                    error = "it gave no result"
                    break
                pending.discard(message["index"])
                self.put(unit.tests[message["index"]], unit.system, message["result"])
            else:
                worker.read(min(self.end, time.monotonic() + self.args.unit_seconds))   # done
        except (TimeoutError, BrokenPipeError) as e:
            error = "its process had ended" if isinstance(e, BrokenPipeError) else "it took too long"
        for i in pending:
            self.put(unit.tests[i], unit.system, {"error": error})
        if error:
            self.say(f"{where}: {unit.system}: {error}")
            self.workers.pop(unit.system).close()   # the next unit starts a new one
        self.cost[(unit.system, kind)] = time.monotonic() - start

    def run(self, plan):
        try:
            for round_number in range(self.args.rounds):
                for unit in plan:
                    if time.monotonic() >= self.end and round_number > 0:
                        break
                    self.run_unit(unit)
                    self.save()
        finally:
            for worker in self.workers.values():
                worker.close()

    def result(self):
        rows = list(self.rows.values())
        measured = next((r for r in rows if r["system"].startswith("krait") and r.get("device")), {})
        about = {"date": self.args.date, "device": measured.get("device") or self.args.device,
                 "driver": measured.get("driver"), "clocks": measured.get("clocks"),
                 "command": shlex.join(["python3", "tools/compare/compare.py", *self.args.shown]),
                 "seconds": self.args.seconds, "rounds": self.args.rounds}
        if measured.get("ceiling_copy_gb_per_s"):
            about["ceilings"] = {"copy_gb_per_s": measured["ceiling_copy_gb_per_s"],
                                 "read_gb_per_s": measured["ceiling_read_gb_per_s"],
                                 "product_tflop_per_s": measured["ceiling_product_tflop_per_s"]}
        return {"about": about, "systems": self.systems, "rows": rows}

    def save(self):
        """After every unit: a run that is cut off has what it measured."""
        if self.args.output:
            part = Path(self.args.output + ".part")
            part.write_text(json.dumps(self.result(), indent=1) + "\n")
            part.rename(self.args.output)


def numbers(text):
    return tuple(int(n) for n in text.split(",") if n)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--krait", help="the program, e.g. build/cuda-release/krait")
    p.add_argument("-o", "--output", help="JSON file, written anew after each step")
    p.add_argument("--markdown", help="the tables go here too, not only to stdout")
    p.add_argument("--shapes", help="in order of importance (default 2.8b,130m,1.4b,370m; on the CPU 130m)")
    p.add_argument("--peers", help=f"systems beside krait, comma-separated: {', '.join(SYSTEMS[1:])}, "
                   "llama.cpp:q8_0, ... (default: all); none: krait alone")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("-t", "--threads", type=int, default=0, help="CPU threads of each system (0: its own choice)")
    p.add_argument("--seconds", type=float, default=3600, help="time for everything")
    p.add_argument("--unit-seconds", type=float, default=120, help="time for one result before its system is given up")
    p.add_argument("-r", "--repetitions", type=int, default=3)
    p.add_argument("--rounds", type=int, default=1, help="times that the plan is run through; samples add up")
    p.add_argument("--batches", type=numbers, help="of decode (default 1,8,64,256; on the CPU 1,8); '': none")
    p.add_argument("--prompts", type=numbers, help="of prefill (default 512,2048,8192,32768; on the CPU 512); '': none")
    p.add_argument("--gen", type=int, help="decode steps (default 128)")
    p.add_argument("--generate", type=numbers, default=GENERATE, metavar="P,N", help="of the paper's protocol")
    p.add_argument("--generate-batches", type=numbers, default=GENERATE_BATCHES, help="of that; '': none")
    p.add_argument("--llama-bench", help="path of llama-bench; llama-batched-bench lies beside it")
    p.add_argument("--gguf-dir", default=str(Path(tempfile.gettempdir()) / "krait-compare"),
                   help="where GGUF files of random weights are made and kept")
    p.add_argument("--python", default=sys.executable, help="interpreter of the Python peers")
    p.add_argument("-v", "--verbose", action="store_true", help="show what the systems print")
    args = p.parse_args(argv)
    cpu = args.device == "cpu"
    args.shapes = (args.shapes or ("130m" if cpu else "2.8b,130m,1.4b,370m")).split(",")
    for s in args.shapes:
        if s not in SHAPES:
            p.error(f"no shape is called {s}: one of {', '.join(SHAPES)}")
    peers = SYSTEMS[1:] if args.peers is None else [s for s in args.peers.split(",") if s != "none"]
    args.systems = ["krait"] + peers
    for s in peers:
        if s.split(":")[0] not in SYSTEMS:
            p.error(f"no system is called {s}: one of {', '.join(SYSTEMS)}")
    if args.batches is None:
        args.batches = (1, 8) if cpu else BATCHES
    if args.prompts is None:
        args.prompts = (512,) if cpu else PROMPTS
    args.gen = args.gen or (32 if cpu else 128)
    args.shown = argv
    args.date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return args


def main(argv):
    args = parse(argv)
    plan = make_plan(args.shapes, args.systems, cpu=args.device == "cpu", batches=args.batches,
                     prompts=args.prompts, n_gen=args.gen, generate=args.generate,
                     generate_batches=args.generate_batches)
    comparison = Comparison(args)
    comparison.run(plan)
    comparison.save()
    page = report(comparison.result())
    print(page)
    if args.markdown:
        Path(args.markdown).write_text(page)
    return 0 if any(r.get("seconds") for r in comparison.rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

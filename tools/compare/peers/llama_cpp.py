"""llama.cpp: llama-bench for prompts, llama-batched-bench for decoding. System "llama.cpp:TYPE".

The GGUF is written here (gguf_random.py), once for each shape and type. Neither program samples or reads
the logits of every sequence back, which flatters it slightly beside krait and mamba_ssm.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from peers import Missing

# Batches up to the first number generate so many per sequence, in one run: many sequences take long per step,
# and few steps are enough for the mean. More than 256 llama.cpp refuses (LLAMA_MAX_SEQ), the whole run with them.
STEPS = ((8, 64), (256, 16), (1 << 30, 16))
START = 4   # prompt tokens to begin from


class LlamaCpp:
    def __init__(self, system, options):
        self.type = system.split(":")[1]
        self.options = options
        self.bench = options["llama_bench"] or shutil.which("llama-bench")
        if not self.bench or not Path(self.bench).exists():
            raise Missing("llama-bench was not found: name it with --llama-bench")
        self.batched = str(Path(self.bench).with_name("llama-batched-bench"))
        self.about = {"version": self.version(), "weights": self.type}

    def version(self):
        cli = Path(self.bench).with_name("llama-cli")
        if not cli.exists():
            return "unknown"
        out = subprocess.run([str(cli), "--version"], capture_output=True, text=True, timeout=60)
        lines = [line for line in (out.stderr + out.stdout).splitlines() if line.startswith("version")]
        return lines[0] if lines else "unknown"

    def gguf(self, shape):
        path = Path(self.options["gguf_dir"]) / f"{shape}-{self.type}.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            subprocess.run([sys.executable, str(Path(__file__).parent.parent / "gguf_random.py"), shape,
                            self.type, str(part)], check=True)
            part.rename(path)
        return str(path)

    def flags(self):
        flags = ["-ngl", "0" if self.options["device"] == "cpu" else "99"]
        if self.options["threads"]:
            flags += ["-t", str(self.options["threads"])]
        return flags

    def run(self, command):
        # In a session of its own it would outlive a kill of this process's group.
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode != 0:
            last = (out.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise RuntimeError(f"{Path(command[0]).name} ended with exit code {out.returncode}: {last[:200]}")
        return out.stdout

    def measure(self, tests):
        from shapes import SHAPES
        if SHAPES[tests[0]["shape"]].family != "mamba1":
            for i in range(len(tests)):
                yield i, {"error": "no GGUF of this family is written here"}
            return
        model = self.gguf(tests[0]["shape"])
        if tests[0]["kind"] == "decode":
            yield from self.decode(model, tests)
        else:
            yield from self.bench_rows(model, tests)

    def decode(self, model, tests):
        if not Path(self.batched).exists():   # llama-bench alone decodes one sequence
            one = [(i, t) for i, t in enumerate(tests) if t["batch"] == 1]
            for i, t in one:
                for _, result in self.bench_rows(model, [t]):
                    if "seconds" in result:
                        result["seconds"] = [s / t["n_gen"] for s in result["seconds"]]
                    yield i, result
            for i, t in enumerate(tests):
                if t["batch"] > 1:
                    yield i, {"error": "llama-batched-bench does not lie beside llama-bench"}
            return
        done = 0
        for limit, steps in STEPS:
            part = [(i, t) for i, t in enumerate(tests) if done < t["batch"] <= limit]
            done = limit
            if not part:
                continue
            largest = max(t["batch"] for _, t in part)
            command = [self.batched, "-m", model, "-npp", str(START), "-ntg", str(steps),
                       "-npl", ",".join(str(t["batch"]) for _, t in part),
                       "-c", str(largest * (START + steps)), "-b", "2048", "-ub", "512",
                       "--output-format", "jsonl", *self.flags()]
            try:
                found = batched_rows(self.run(command))
            except (RuntimeError, OSError) as e:
                found = {}
                error = str(e)
            else:
                error = "llama-batched-bench printed no row for this batch"
            for i, t in part:
                seconds = found.get(t["batch"])
                yield i, ({"seconds": [seconds / steps], "command": shown(command)} if seconds else
                          {"error": error})

    def bench_rows(self, model, tests):
        command = [self.bench, "-m", model, "-o", "json", "-r", str(self.options["repetitions"]),
                   *self.flags()]
        if tests[0]["kind"] == "prefill":
            command += ["-n", "0", "-p", ",".join(str(t["n_prompt"]) for t in tests)]
        else:
            command += ["-p", "0", "-n", str(tests[0]["n_gen"])]
        try:
            rows = json.loads(self.run(command))
        except (RuntimeError, OSError, ValueError) as e:
            for i in range(len(tests)):
                yield i, {"error": str(e)}
            return
        for i, t in enumerate(tests):
            row = [r for r in rows if (r["n_prompt"], r["n_gen"]) == (t["n_prompt"], t["n_gen"])]
            yield i, ({"seconds": [ns / 1e9 for ns in row[0]["samples_ns"]], "command": shown(command)}
                      if row else {"error": "llama-bench printed no row for this test"})


def shown(command):
    return " ".join([Path(command[0]).name] + command[1:])


def batched_rows(text):
    """{batch: seconds of generation} from llama-batched-bench's JSON lines, or from its table, which
    older versions print alone."""
    found = {}
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("{"):
            row = json.loads(line)
            if "pl" in row:
                found[int(row["pl"])] = float(row["t_tg"])
        elif line.startswith("|") and line[1:].strip()[:1].isdigit():
            cells = [c.strip() for c in line.strip("|").split("|")]
            found[int(cells[2])] = float(cells[6])   # PP TG B N_KV T_PP S_PP T_TG ...
    return found

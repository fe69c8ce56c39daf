"""krait itself, through `krait bench`. System "krait:WEIGHTS:STATE", e.g. krait:bf16:f32."""

import json
import subprocess
from pathlib import Path

from peers import Missing


class Krait:
    def __init__(self, system, options):
        _, self.dtype, self.state = system.split(":")
        self.program = options["krait"]
        self.options = options
        if not self.program or not Path(self.program).exists():
            raise Missing(f"no program at {self.program}: name one with --krait")
        version = subprocess.run([self.program, "--version"], capture_output=True, text=True)
        if version.returncode != 0:
            raise Missing(f"{self.program} --version failed: {version.stderr.strip()[-200:]}")
        self.about = {"version": version.stdout.strip()}

    def command(self, tests):
        kind = tests[0]["kind"]
        batches = ",".join(str(t["batch"]) for t in tests)
        c = [self.program, "bench", "--random-weights", tests[0]["shape"], "--dtype", self.dtype,
             "--state-dtype", self.state, "--device", self.options["device"],
             "-r", str(self.options["repetitions"]), "-o", "jsonl"]
        if self.options["threads"]:
            c += ["-t", str(self.options["threads"])]
        if kind == "decode":
            return c + ["-p", "0", "-n", str(tests[0]["n_gen"]), "-b", batches]
        if kind == "prefill":
            return c + ["-n", "0", "-p", ",".join(str(t["n_prompt"]) for t in tests)]
        return c + ["-p", "0", "-n", "0", "-pg", f"{tests[0]['n_prompt']},{tests[0]['n_gen']}",
                    "-b", batches]

    def measure(self, tests):
        command = self.command(tests)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        index = 0
        for line in process.stdout:
            yield index, self.result(json.loads(line), tests[index], command)
            index += 1
        error = process.stderr.read().strip()
        process.wait()
        for i in range(index, len(tests)):
            last = [line for line in error.splitlines() if "error: " in line]
            yield i, {"error": last[-1].split("error: ", 1)[1] if last else
                      f"krait bench ended with exit code {process.returncode}"}

    @staticmethod
    def result(row, test, command):
        if row["error"]:
            return {"error": row["error"]}
        keep = ("share_of_floor", "spread", "first_token_ms", "device", "driver", "clocks", "gpu_info",
                "cpu_info", "build_version", "build_commit", "ceiling_copy_gb_per_s",
                "ceiling_read_gb_per_s", "ceiling_product_tflop_per_s", "gb_per_s", "tflop_per_s")
        result = {key: row[key] for key in keep}
        result["seconds"] = [ns / 1e9 for ns in row["samples_ns"]]
        if test["kind"] == "decode":   # per step, as with the others
            result["seconds"] = [s / test["n_gen"] for s in result["seconds"]]
        result["command"] = " ".join(["krait"] + command[1:])
        return result

"""Tests of the comparison that need neither a GPU nor a peer: python3 -m unittest discover tools/compare"""

import io
import json
import stat
import struct
import sys
import tempfile
import time
import unittest
import unittest.mock
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import compare
import readme_performance
from peers.llama_cpp import LlamaCpp, batched_rows
from plan import Test, make_plan
from shapes import SHAPES
from table import least_leads, rate, report, tables

try:
    import gguf_random
except ImportError:   # without numpy
    gguf_random = None


def row(system, kind="decode", batch=1, n_prompt=0, n_gen=128, seconds=None, shape="2.8b", **more):
    r = {"shape": shape, "kind": kind, "batch": batch, "n_prompt": n_prompt, "n_gen": n_gen, "system": system,
         **more}
    return {**r, "seconds": seconds} if seconds else r


RESULT = {
    "about": {"date": "2026-01-02", "device": "Some GPU", "driver": "1.2", "clocks": "9 MHz", "command": "COMMAND",
              "ceilings": {"copy_gb_per_s": 2995.0, "read_gb_per_s": 3042.0, "product_tflop_per_s": 771.2}},
    "systems": {"krait:bf16:f32": {"version": "krait 0.1.0 (abc)"}, "mamba_ssm": {"version": "2.3"},
                "transformers": {"missing": "the Python module torch could not be imported"}},
    "rows": [row("krait:bf16:f32", seconds=[0.002, 0.0021, 0.0019], share_of_floor=0.9),
             row("mamba_ssm", seconds=[0.004]),
             row("krait:bf16:f32", batch=64, seconds=[0.004]), row("mamba_ssm", batch=64, error="out of memory"),
             row("krait:bf16:f32", kind="prefill", n_prompt=2048, n_gen=0, seconds=[0.02]),
             row("krait:bf16:f32", kind="generate", batch=4, n_prompt=2048, n_gen=128, seconds=[2.0]),
             row("gpt-neox", kind="generate", batch=4, n_prompt=2048, n_gen=128, seconds=[8.0])],
}


class Table(unittest.TestCase):
    def test_rates_count_what_the_protocol_counts(self):
        self.assertAlmostEqual(rate(row("x", batch=8, seconds=[0.002])), 4000)       # a step, 8 sequences
        self.assertAlmostEqual(rate(row("x", kind="prefill", n_prompt=512, n_gen=0, seconds=[0.5])), 1024)
        self.assertAlmostEqual(rate(RESULT["rows"][5]), 256)                         # generated tokens alone
        self.assertIsNone(rate(row("x", error="no")))
        self.assertIsNone(rate(row("x")))

    def test_median_of_the_repetitions(self):
        self.assertAlmostEqual(rate(row("x", seconds=[1.0, 100.0, 2.0])), 0.5)

    def test_ratios_stand_beside_the_peers(self):
        text = tables(RESULT["rows"])
        self.assertIn("| 2.8b | batch 1 | 500 (90%) | 250 (2.0x) |", text)
        self.assertIn("| 2.8b | batch 64 | 16,000 | – |", text)
        self.assertIn("| 2.8b | 2048 | 102,400 |", text)
        self.assertIn("| 2.8b | 2048 + 128, batch 4 | 256 | 64.0 (4.0x) |", text)

    def test_rows_have_as_many_cells_as_the_head(self):
        for block in tables(RESULT["rows"]).split("\n\n"):
            bars = {line.count("|") for line in block.splitlines() if line.startswith("|")}
            self.assertLessEqual(len(bars), 1)

    def test_what_is_missing_is_a_line(self):
        text = report(RESULT)
        self.assertIn("Some GPU, driver 1.2, 9 MHz; 2026-01-02.", text)
        self.assertIn("copy 2,995 GB/s, read 3,042 GB/s, products 771.2 TFLOP/s", text)
        self.assertIn("- transformers: the Python module torch could not be imported", text)
        self.assertIn("- mamba_ssm, 2.8b, batch 64: out of memory", text)

    def test_the_least_lead_is_of_the_same_state(self):
        self.assertIn("mamba_ssm 2.00x (2.8b, decode, batch 1); Transformer (GPT-NeoX) 4.00x", least_leads(RESULT))
        rows = RESULT["rows"] + [row("krait:bf16:bf16", seconds=[0.005])]
        systems = {**RESULT["systems"], "mamba_ssm": {"state": "bf16"}}
        self.assertIn("mamba_ssm 0.80x", least_leads({"systems": systems, "rows": rows}))
        self.assertEqual(least_leads({"systems": {}, "rows": [row("mamba_ssm", error="no")]}), "")

    def test_nothing_measured_is_no_table(self):
        self.assertEqual(tables([row("mamba_ssm", error="no")]), "")


class Plan(unittest.TestCase):
    def test_important_rows_come_first(self):
        plan = make_plan(["2.8b", "130m", "1.4b"], ["krait", "mamba_ssm", "llama.cpp", "transformers", "gpt-neox"])
        keys = [(u.tests[0].shape, u.tests[0].kind, u.system) for u in plan]
        self.assertEqual(keys[0], ("2.8b", "decode", "krait:bf16:f32"))
        self.assertEqual(keys[1], ("2.8b", "decode", "mamba_ssm"))
        self.assertLess(keys.index(("2.8b", "generate", "gpt-neox")), keys.index(("2.8b", "decode", "llama.cpp:q8_0")))
        self.assertLess(keys.index(("130m", "prefill", "mamba_ssm")), keys.index(("1.4b", "decode", "krait:bf16:f32")))
        self.assertEqual(len(keys), len(set(keys)))
        self.assertEqual([t.batch for t in plan[0].tests], [1, 8, 64, 256])

    def test_only_what_is_wanted(self):
        plan = make_plan(["130m"], ["krait", "llama.cpp:f16"])
        self.assertEqual({u.system for u in plan}, {"krait:bf16:f32", "krait:bf16:bf16", "llama.cpp:f16"})
        plan = make_plan(["130m"], ["krait"], cpu=True, prompts=(64,), batches=())
        self.assertEqual({u.tests[0].kind for u in plan}, {"prefill", "generate"})

    def test_tokens(self):
        self.assertEqual(Test("130m", "prefill", 1, 512, 0).tokens(), 512)
        self.assertEqual(Test("130m", "generate", 4, 512, 8).tokens(), 32)


class LlamaCppOutput(unittest.TestCase):
    def test_json_lines(self):
        text = 'log line\n{"pp": 4, "tg": 16, "pl": 8, "t_pp": 0.1, "t_tg": 0.5, "speed_tg": 256.0}\n'
        self.assertEqual(batched_rows(text), {8: 0.5})

    def test_table(self):
        text = ("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |\n"
                "|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|\n"
                "|   128 |    128 |    2 |    512 |    0.198 |  1295.19 |    5.029 |    50.90 |    5.227 |    97.95 |\n")
        self.assertEqual(batched_rows(text), {2: 5.029})


FAKE_LLAMA = """#!/usr/bin/env python3
import json, os, sys
a = sys.argv[1:]
value = lambda flag: a[a.index(flag) + 1]
if not os.path.exists(value("-m")):
    sys.exit("no model")
if sys.argv[0].endswith("llama-batched-bench"):
    for b in value("-npl").split(","):
        assert int(value("-c")) >= int(b) * (int(value("-npp")) + int(value("-ntg")))
        if b != "64":
            print(json.dumps({"pl": int(b), "tg": int(value("-ntg")), "t_tg": 0.001 * int(value("-ntg"))}))
elif value("-p") != "0":
    print(json.dumps([{"n_prompt": int(p), "n_gen": 0, "samples_ns": [2000000, 3000000]}
                      for p in value("-p").split(",") if p != "8192"]))
else:
    print(json.dumps([{"n_prompt": 0, "n_gen": int(value("-n")), "samples_ns": [16000000]}]))
"""


class LlamaCppRuns(unittest.TestCase):
    """The peer on programs that stand in for llama.cpp's."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = Path(self.folder.name)
        self.program("llama-bench")
        (self.path / "130m-f16.gguf").write_text("there")

    def program(self, name):
        file = self.path / name
        file.write_text(FAKE_LLAMA)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def measure(self, tests):
        options = {"llama_bench": str(self.path / "llama-bench"), "gguf_dir": str(self.path), "device": "cuda",
                   "threads": 0, "repetitions": 2}
        return dict(LlamaCpp("llama.cpp:f16", options).measure([asdict(t) for t in tests]))

    def test_decode(self):
        self.program("llama-batched-bench")
        found = self.measure([Test("130m", "decode", b, 0, 128) for b in (1, 8, 64, 256)])
        for i in (0, 1, 3):
            self.assertAlmostEqual(found[i]["seconds"][0], 0.001)
        self.assertIn("no row", found[2]["error"])
        self.assertIn("-ngl 99", found[0]["command"])

    def test_batches_that_it_refuses_take_no_other_with_them(self):
        self.program("llama-batched-bench")
        found = self.measure([Test("130m", "decode", b, 0, 128) for b in (16, 1024, 256)])
        self.assertNotIn("1024", found[2]["command"])
        self.assertIn("-npl 1024 ", found[1]["command"])

    def test_decode_without_the_batched_program(self):
        found = self.measure([Test("130m", "decode", b, 0, 16) for b in (8, 1)])
        self.assertIn("llama-batched-bench", found[0]["error"])
        self.assertAlmostEqual(found[1]["seconds"][0], 0.001)

    def test_prefill(self):
        found = self.measure([Test("130m", "prefill", 1, p, 0) for p in (512, 8192, 2048)])
        self.assertEqual(found[0]["seconds"], [0.002, 0.003])
        self.assertIn("no row", found[1]["error"])
        self.assertEqual(found[2]["seconds"], [0.002, 0.003])

    def test_other_families(self):
        found = self.measure([Test("mamba2-2.7b", "prefill", 1, 512, 0)])
        self.assertIn("family", found[0]["error"])

    def test_failure_is_a_sentence(self):
        self.program("llama-batched-bench")
        with unittest.mock.patch.object(LlamaCpp, "gguf", lambda peer, shape: "/no/such.gguf"):
            found = self.measure([Test("130m", "decode", 1, 0, 16)])
        self.assertEqual(found[0]["error"], "llama-batched-bench ended with exit code 1: no model")


@unittest.skipIf(gguf_random is None, "numpy is not installed")
class Gguf(unittest.TestCase):
    def read(self, raw):
        """(metadata keys, {name: (dims, type, offset)}, where the data begins)"""
        at = 0

        def take(form):
            nonlocal at
            values = struct.unpack_from("<" + form, raw, at)
            at += struct.calcsize("<" + form)
            return values[0] if len(values) == 1 else values

        def text():
            nonlocal at
            n = take("Q")
            at += n
            return raw[at - n:at].decode()
        self.assertEqual(raw[:4], b"GGUF")
        at = 4
        version, n_tensors, n_pairs = take("IQQ")
        self.assertEqual(version, 3)
        keys = {}
        for _ in range(n_pairs):
            key, kind = text(), take("I")
            keys[key] = text() if kind == 8 else take({4: "I", 6: "f"}[kind])
        found = {}
        for _ in range(n_tensors):
            name, rank = text(), take("I")
            dims = tuple(take("Q") for _ in range(rank))
            found[name] = (dims, take("I"), take("Q"))
        return keys, found, -(-at // 32) * 32

    def test_every_tensor_lies_where_the_header_says(self):
        shape = SHAPES["130m"].__class__("small", "mamba1", 2, 64, 96, 96)
        for dtype in gguf_random.TYPES:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "m.gguf"
                gguf_random.write(shape, dtype, path)
                raw = path.read_bytes()
            keys, found, data = self.read(raw)
            self.assertEqual(keys["general.architecture"], "mamba")
            self.assertEqual(keys["mamba.ssm.inner_size"], 128)
            self.assertEqual(len(found), 2 + 2 * 10)
            names = {v[0]: k for k, v in gguf_random.TYPES.items()}
            end = 0
            for dims, kind, offset in found.values():
                self.assertEqual(offset % 32, 0)
                self.assertEqual(offset, -(-end // 32) * 32)
                end = offset + gguf_random.n_bytes(dims, names[kind])
            self.assertEqual(len(raw), data + -(-end // 32) * 32)
            dims, _, offset = found["blk.1.ssm_a"]
            self.assertEqual(dims, (16, 128))
            self.assertEqual(struct.unpack_from("<3f", raw, data + offset + 4 * 15), (-16.0, -1.0, -2.0))


FAKE_KRAIT = """#!/usr/bin/env python3
import json, sys, time
a = sys.argv[1:]
if a == ["--version"]:
    print("krait 9 (fake)"); sys.exit(0)
value = lambda flag: a[a.index(flag) + 1]
if "-pg" in a:
    sys.stderr.write("krait: error: out of GPU memory: it is full\\n"); sys.exit(5)
which = value("-b").split(",") if "-b" in a else value("-p").split(",")
for n in which:
    if n == "13":
        time.sleep(60)
    none = {k: None for k in ("share_of_floor", "spread", "first_token_ms", "driver", "clocks", "gpu_info", "cpu_info",
            "build_version", "build_commit", "ceiling_read_gb_per_s", "ceiling_product_tflop_per_s", "gb_per_s",
            "tflop_per_s")}
    error = "it does not fit" if n == "8" else None
    print(json.dumps({**none, "device": "Fake", "ceiling_copy_gb_per_s": None, "error": error,
                      "samples_ns": [] if error else [4000000, 8000000, 6000000]}), flush=True)
"""


class Run(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = Path(self.folder.name)
        self.krait = self.path / "krait"
        self.krait.write_text(FAKE_KRAIT)
        self.krait.chmod(self.krait.stat().st_mode | stat.S_IXUSR)

    def compare(self, *more):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = compare.main(["--krait", str(self.krait), "--device", "cpu", "--gen", "4", "-o",
                                 str(self.path / "out.json"), *more])
        return code, out.getvalue(), json.loads((self.path / "out.json").read_text())

    def test_table_and_json_agree_and_failures_are_lines(self):
        code, text, result = self.compare("--batches", "1,8,2", "--prompts", "64", "--peers", "llama.cpp:f16",
                                          "--llama-bench", "/no/llama-bench")
        self.assertEqual(code, 0)
        rows = {(r["system"], r["kind"], r["batch"]): r for r in result["rows"]}
        # 4 steps took 6 ms in the middle run: 1.5 ms a step.
        self.assertAlmostEqual(rate(rows["krait:bf16:f32", "decode", 1]), 1 / 0.0015)
        self.assertEqual(rows["krait:bf16:f32", "decode", 8]["error"], "it does not fit")
        self.assertAlmostEqual(rate(rows["krait:bf16:f32", "decode", 2]), 2 / 0.0015)
        self.assertAlmostEqual(rate(rows["krait:bf16:f32", "prefill", 1]), 64 / 0.006)
        self.assertEqual(rows["krait:bf16:f32", "generate", 64]["error"], "out of GPU memory: it is full")
        self.assertIn("| 130m | batch 2 | 1,333 |", text)
        self.assertIn("- llama.cpp:f16: llama-bench was not found", text)
        self.assertIn("batch 8: it does not fit", text)
        self.assertIn("bench --random-weights 130m", rows["krait:bf16:f32", "decode", 1]["command"])

    def test_rounds_add_up(self):
        _, _, result = self.compare("--batches", "1", "--prompts", "64", "--peers", "none", "--rounds", "2")
        self.assertEqual({len(r["seconds"]) for r in result["rows"] if "seconds" in r}, {6})

    def test_a_system_that_hangs_is_given_up(self):
        start = time.monotonic()
        code, text, result = self.compare("--batches", "1,13,2", "--prompts", "64", "--peers", "none",
                                          "--unit-seconds", "3")
        self.assertLess(time.monotonic() - start, 40)
        self.assertEqual(code, 0)
        rows = {(r["system"], r["kind"], r["batch"]): r for r in result["rows"]}
        self.assertIn("seconds", rows["krait:bf16:f32", "decode", 1])
        self.assertEqual(rows["krait:bf16:f32", "decode", 13]["error"], "it took too long")
        self.assertEqual(rows["krait:bf16:f32", "decode", 2]["error"], "it took too long")
        self.assertIn("seconds", rows["krait:bf16:f32", "prefill", 1])

    def test_one_kind_alone(self):
        _, _, result = self.compare("--batches", "1", "--prompts", "", "--generate-batches", "", "--peers", "none")
        self.assertEqual({r["kind"] for r in result["rows"]}, {"decode"})
        self.assertIn("--prompts '' --generate-batches '' ", result["about"]["command"])   # can be run as it stands

    def test_no_time_left(self):
        code, text, result = self.compare("--batches", "1", "--prompts", "64", "--peers", "none", "--seconds", "0")
        self.assertEqual(code, 1)
        self.assertEqual({r["error"] for r in result["rows"]}, {"no time was left"})

    def test_no_program(self):
        code, text, _ = self.compare("--krait", "/no/krait", "--peers", "none")
        self.assertEqual(code, 1)
        self.assertIn("- krait:bf16:f32: no program at /no/krait", text)


class Readme(unittest.TestCase):
    def test_the_section_is_added_and_replaced(self):
        text = "# krait\n\n## What runs\n\nmuch\n\n## Build\n\nso\n"
        first = readme_performance.put_into(text, readme_performance.section([RESULT]))
        self.assertIn("| 2.8b | batch 1 | 500 (90%) | 250 (2.0x) |", first)
        self.assertIn("    COMMAND\n", first)
        self.assertLess(first.index("## What runs"), first.index("## Performance"))
        self.assertLess(first.index("## Performance"), first.index("## Build"))
        again = readme_performance.put_into(first, readme_performance.section([RESULT]))
        self.assertEqual(again, first)

    def test_half_a_section_is_refused(self):
        with self.assertRaises(SystemExit):
            readme_performance.put_into("# k\n" + readme_performance.BEGIN + "\n## Build\n", "x")


if __name__ == "__main__":
    unittest.main()

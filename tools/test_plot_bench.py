"""Tests of the plot: python3 -m unittest tools/test_plot_bench.py"""

import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import plot_bench


def row(n_prompt, n_gen, n_batch, rate, **more):
    return {"model": "m", "dtype": "bf16", "state_dtype": "f32", "n_prompt": n_prompt, "n_gen": n_gen,
            "n_batch": n_batch, "median_ts": rate, "floor_ts": 2 * rate, "error": None,
            "build_version": "1", "build_commit": "c", "device": "d", **more}


ROWS = [row(0, 128, 8, 80), row(0, 128, 1, 10), row(512, 0, 1, 900), row(512, 32, 1, 500),
        row(0, 128, 64, 1, error="out of memory"), row(0, 128, 1, 7, state_dtype="bf16", floor_ts=None)]


class Plot(unittest.TestCase):
    def test_series_are_of_one_kind_in_order(self):
        self.assertEqual(plot_bench.series(ROWS, "decode"),
                         {"m, bf16, state f32": [(1, 10, 20), (8, 80, 160)],
                          "m, bf16, state bf16": [(1, 7, None)]})
        self.assertEqual(plot_bench.series(ROWS, "prefill"), {"m, bf16, state f32": [(512, 900, 1800)]})

    def test_nothing_to_draw_is_said(self):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            self.skipTest("matplotlib is not installed")
        with self.assertRaises(SystemExit):
            plot_bench.draw([row(512, 32, 1, 500)], "none.svg")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "b.svg"
            plot_bench.draw(ROWS, file)
            self.assertIn("<svg", file.read_text()[:500])


if __name__ == "__main__":
    unittest.main()

"""Tests of the recipe that need no GPU: python -m unittest discover tools/train_model"""

import math
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import data
from evaluate import bits_per_byte, choose, step, windows_of
from model import Mamba, Shape, load_folder, plain_conv_silu, save_folder
from train import Recipe, schedule, train

SMALL = Shape(vocab_size=48, d_model=64, n_layer=2)


class Model(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.model = Mamba(SMALL, "plain").eval()
        self.ids = torch.randint(48, (1, 19))

    def test_parameter_count_is_that_of_the_module(self):
        self.assertEqual(SMALL.parameters(), sum(p.numel() for p in self.model.parameters()))

    @torch.no_grad()
    def test_recurrence_equals_scan(self):
        whole, state, rows = self.model(self.ids)[0], None, []
        for token in self.ids[0].tolist():
            logits, state = step(self.model, [token], state)
            rows.append(logits)
        error = (torch.stack(rows) - whole).abs().max() / whole.std()
        self.assertLess(error.item(), 1e-5)

    @torch.no_grad()
    def test_later_tokens_do_not_change_earlier_logits(self):
        other = self.ids.clone()
        other[0, 10] = (other[0, 10] + 1) % 48
        a, b = self.model(self.ids)[0], self.model(other)[0]
        self.assertTrue(torch.equal(a[:10], b[:10]))
        self.assertFalse(torch.equal(a[10:], b[10:]))

    def test_convolution_weights_the_newest_sample_last(self):
        x = torch.zeros(1, 1, 6)
        x[0, 0, 2] = 1
        y = plain_conv_silu(x, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1))[0, 0]
        want = torch.nn.functional.silu(torch.tensor([0.0, 0, 4, 3, 2, 1]))
        self.assertTrue(torch.allclose(y, want))

    def test_exported_folder_reads_back_as_bf16(self):
        with tempfile.TemporaryDirectory() as folder:
            save_folder(self.model, folder, 1)
            again = load_folder(folder, "plain")
        for (name, a), (_, b) in zip(self.model.named_parameters(), again.named_parameters()):
            self.assertTrue(torch.equal(a.bfloat16().float(), b), name)


class Windows(unittest.TestCase):
    def test_every_token_of_a_document_is_scored_once(self):
        docs = [np.array([*range(5, 5 + n), 1], np.uint16) for n in (1, 3, 4, 5, 9)]
        scored = np.concatenate([t for _, t in windows_of(docs, 4, 1)])
        self.assertEqual(sorted(scored), sorted(np.concatenate([d[:-1] for d in docs])))
        for inputs, targets in windows_of(docs, 4, 1):
            self.assertEqual(len(inputs), len(targets))
            self.assertTrue((inputs[1:] == targets[:-1]).all())

    def test_epoch_windows_overlap_by_one_and_follow_the_documents(self):
        docs = [np.array([10 * i + 2, 10 * i + 3, 10 * i + 4, 1], np.uint16) for i in range(25)]
        cut = data.epoch_windows(docs, 8, 1, np.random.default_rng(3))
        self.assertEqual(cut.shape[1], 9)
        pairs = {(a, b) for row in cut.tolist() for a, b in zip(row, row[1:])}
        for a, b in pairs - {(a, b) for a, b in pairs if 1 in (a, b)}:
            self.assertEqual(b, a + 1)

    def test_uniform_model_costs_log_of_the_vocabulary(self):
        model = Mamba(SMALL, "plain").eval()
        torch.nn.init.zeros_(model.backbone.embeddings.weight)
        docs = [np.array([3, 4, 5, 6, 1], np.uint16)]
        got = bits_per_byte(model, docs, 8, 1, length=3)
        self.assertEqual(got["tokens"], 4)
        self.assertAlmostEqual(got["bits_per_byte"], 4 * math.log2(48) / 8, places=5)


class Sampling(unittest.TestCase):
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))

    def draws(self, past=(), n=300, **sampling):
        rng = torch.Generator().manual_seed(1)
        return {choose(self.logits, list(past), rng, **sampling) for _ in range(n)}

    def test_each_filter_keeps_what_it_should(self):
        self.assertEqual(self.draws(), {0, 1, 2, 3})
        self.assertEqual(self.draws(top_k=2), {0, 1})
        self.assertEqual(self.draws(top_p=0.75), {0, 1})
        self.assertEqual(self.draws(min_p=0.2), {0, 1, 2})
        self.assertEqual(self.draws(temperature=1e-3), {0})

    def test_penalty_lowers_seen_tokens(self):
        self.assertEqual(self.draws(past=[0], temperature=1e-3, repetition_penalty=2.0), {1})
        self.assertEqual(self.draws(past=[0] + 99 * [3], temperature=1e-3, repetition_penalty=2.0), {1})


class Training(unittest.TestCase):
    def test_schedule(self):
        r = Recipe(warmup=10)
        self.assertAlmostEqual(schedule(0, 0.0, r), 0.1)
        self.assertAlmostEqual(schedule(99, 0.5, r), 0.5)
        self.assertEqual(schedule(99, 1.5, r), 0.0)

    def test_resumed_run_equals_an_unbroken_one(self):
        class Tokenizer:
            def eos_id(self):
                return 1

            def get_piece_size(self):
                return 48

        rng = np.random.default_rng(0)
        docs = [np.append(rng.integers(2, 48, 60), 1).astype(np.uint16) for _ in range(8)]
        valid = {"v": (docs[:2], 100)}
        r = Recipe(d_model=64, n_layer=1, length=16, batch=2, epochs=1, warmup=2, valid_every=4,
                   scan="plain", device="cpu")

        class Stop(Exception):
            pass

        def stop_at_eight(text):
            if text.startswith('{"step": 8'):
                raise Stop

        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            whole = train(r, docs, valid, Tokenizer(), a, say=lambda *x: None)
            with self.assertRaises(Stop):
                train(r, docs, valid, Tokenizer(), b, say=stop_at_eight, checkpoint_every=1e-9)
            self.assertTrue((Path(b) / "checkpoint.pt").exists())
            resumed = train(r, docs, valid, Tokenizer(), b, say=lambda *x: None)
        for x, y in zip(whole["model"].parameters(), resumed["model"].parameters()):
            self.assertTrue(torch.equal(x, y))


if __name__ == "__main__":
    unittest.main()

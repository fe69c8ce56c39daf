"""Mamba in Hugging Face transformers, as `generate` runs it: without a graph, with its fast kernels where
they are installed. On its slow path a prompt is a Python loop over tokens: a short prompt is timed first,
and a long one left out where it would take too long.
"""

from peers.torch_support import TorchPeer, need, timed

START = 16
PROBE = 64        # tokens of the short prompt
LONGEST = 10.0    # seconds that one prompt may take
STEPS = 16        # tokens generated per repetition


class TransformersMamba(TorchPeer):
    def __init__(self, system, options):
        need("torch", "transformers")
        import torch
        import transformers
        transformers.logging.set_verbosity_error()
        super().__init__(options)
        self.about = {"version": transformers.__version__, "torch": torch.__version__, "dtype": "bf16"}

    def model(self, name):
        import torch
        from transformers import MambaConfig, MambaForCausalLM

        from shapes import SHAPES
        shape = SHAPES[name]
        if shape.family != "mamba1":
            raise RuntimeError("only Mamba-1 is measured in transformers")
        torch.manual_seed(0)
        config = MambaConfig(hidden_size=shape.d_model, num_hidden_layers=shape.n_layer,
                             vocab_size=shape.vocab_rows, state_size=16, expand=2, conv_kernel=4)
        return self.random_model(MambaForCausalLM, config)

    def random_model(self, kind, config):
        """In bf16, and without a token that would end a text."""
        import torch
        with self.device:
            model = kind(config).to(torch.bfloat16).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def run_generate(self, model, ids, n):
        import torch
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                       do_sample=False)

    def decode(self, model, t):
        ids = self.ids(t["batch"], START)
        self.run_generate(model, ids, 2)
        n = min(STEPS, t["n_gen"])
        whole = [timed(self.device, lambda: self.run_generate(model, ids, n)) for _ in range(2)]
        first = [timed(self.device, lambda: self.run_generate(model, ids, 1)) for _ in range(2)]
        return [(a - b) / (n - 1) for a, b in zip(whole, first)]

    def prefill(self, model, t):
        def run(n):
            ids = self.ids(1, n)
            return timed(self.device, lambda: model(ids, use_cache=True, logits_to_keep=1))
        run(PROBE)
        expected = run(PROBE) * t["n_prompt"] / PROBE
        # A path that is bound by the host takes the same time for any length; one that loops does not.
        if run(2 * PROBE) > 1.5 * run(PROBE) and expected > LONGEST:
            raise RuntimeError(f"a prompt of {t['n_prompt']} would take about {expected:.0f} s on its slow path")
        run(t["n_prompt"])
        return [run(t["n_prompt"]) for _ in range(min(3, self.options["repetitions"]))]

    def generate(self, model, t):
        ids = self.ids(t["batch"], t["n_prompt"])
        self.run_generate(model, ids, 2)
        return [timed(self.device, lambda: self.run_generate(model, ids, t["n_gen"]))]

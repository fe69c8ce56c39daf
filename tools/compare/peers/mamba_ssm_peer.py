"""mamba_ssm, the reference implementation, at its best: CUDA scan built, CUDA graphs (`cg=True`), greedy.

Decode is the whole generation loop as its users run it: the time of 128 tokens less that of one, so that
the prompt and the set-up are out. Prefill goes through the inference cache and takes the last token's
logits. Its state is of the weights' type, bf16.
"""

from peers import Missing
from peers.torch_support import TorchPeer, need, synchronize, timed, warm_up

START = 16   # prompt of the decode test


class MambaSsm(TorchPeer):
    def __init__(self, system, options):
        need("torch", "mamba_ssm", "causal_conv1d", "selective_scan_cuda")
        import mamba_ssm
        import torch
        super().__init__(options)
        if self.device.type != "cuda":
            raise Missing("mamba_ssm runs on CUDA devices only")
        self.about = {"version": mamba_ssm.__version__, "torch": torch.__version__, "dtype": "bf16",
                      "state": "bf16"}

    def model(self, name):
        import torch
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        from shapes import SHAPES
        shape = SHAPES[name]
        if shape.family not in ("mamba1", "mamba2"):
            raise RuntimeError(f"mamba_ssm has no {shape.family}")
        second = shape.family == "mamba2"
        torch.manual_seed(0)
        config = MambaConfig(d_model=shape.d_model, n_layer=shape.n_layer, vocab_size=shape.vocab_size,
                             ssm_cfg={"layer": "Mamba2"} if second else {}, rms_norm=True,
                             residual_in_fp32=True, fused_add_norm=True,
                             pad_vocab_size_multiple=16 if second else 8)
        return MambaLMHeadModel(config, device=self.device, dtype=torch.bfloat16).eval()

    def forget(self, model):
        model._decoding_cache = None

    def decode(self, model, t):
        """Seconds of a step."""
        prompt = self.ids(t["batch"], START)
        n = t["n_gen"]

        def generate(count):
            model.generate(prompt, max_length=START + count, cg=True, top_k=1)
        generate(n)   # captures the graph
        synchronize(self.device)
        return [(timed(self.device, lambda: generate(n)) - timed(self.device, lambda: generate(1))) / (n - 1)
                for _ in range(self.options["repetitions"])]

    def prefill(self, model, t):
        from mamba_ssm.utils.generation import InferenceParams
        ids = self.ids(1, t["n_prompt"])

        def run():
            cache = InferenceParams(max_seqlen=t["n_prompt"] + 8, max_batch_size=1)
            return model(ids, inference_params=cache, num_last_tokens=1).logits
        warm_up(self.device, run)
        return [timed(self.device, run) for _ in range(self.options["repetitions"])]

    def generate(self, model, t):
        ids = self.ids(t["batch"], t["n_prompt"])

        def run():
            model.generate(ids, max_length=t["n_prompt"] + t["n_gen"], cg=True, top_k=1)
        run()
        return [timed(self.device, run) for _ in range(min(2, self.options["repetitions"]))]

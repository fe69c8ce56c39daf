"""Compare the next-token logits of krait, transformers and mamba_ssm on passages of real text.

    python compare_logits.py --model DIR --text FILE --krait build/cpu-release/krait \\
        --reference transformers --candidates krait:f32 krait:bf16

A source is NAME:DTYPE with NAME one of krait, transformers, mamba_ssm, or saved:FILE for logits
written earlier with --save (so that a machine without a GPU can compare with mamba_ssm).
The reference runs in float32. For a float32 candidate the largest error is given in units of the
standard deviation of the reference logits; for a 16-bit candidate the mean KL divergence of the
next-token distribution from the reference, and how often the most probable token is the same.
Exit status 1 if a limit is passed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def passages(model, text, count, length):
    """count windows of length ids, spread evenly over the text."""
    raw = Path(text).read_text(encoding="utf-8")
    folder = Path(model)
    if (folder / "tokenizer.model").exists():
        import sentencepiece
        sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        ids = sp.encode(raw)
    else:
        import tokenizers
        ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(
            raw, add_special_tokens=False).ids
    if len(ids) < length:
        raise SystemExit(f"{text}: {len(ids)} tokens, fewer than one passage of {length}")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.tensor([ids[s:s + length] for s in starts])


def transformers_source(a, dtype):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(a.model).to(a.device, dtype).eval()

    def run(ids):
        return model(ids.to(a.device), use_cache=False).logits.float().cpu()
    return run


def use_reference_functions():
    """Without a GPU, mamba_ssm runs by its own plain PyTorch functions: selective_scan_ref for the CUDA
    scan, rms_norm_ref for the Triton norm, nn.Conv1d for causal_conv1d."""
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    from mamba_ssm.modules import mamba_simple
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    from mamba_ssm.ops.triton import layer_norm
    mamba_simple.selective_scan_fn = selective_scan_ref
    mamba_simple.causal_conv1d_fn = None
    layer_norm.RMSNorm.forward = (
        lambda self, x: layer_norm.rms_norm_ref(x, self.weight, self.bias, eps=self.eps))


def mamba_ssm_source(a, dtype):
    """The reference implementation, on a GPU if there is one. Tensor names differ in one letter."""
    gpu = torch.cuda.is_available()
    if not gpu:
        use_reference_functions()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    c = json.loads((Path(a.model) / "config.json").read_text())
    config = MambaConfig(d_model=c["hidden_size"], n_layer=c["num_hidden_layers"],
                         vocab_size=c["vocab_size"], pad_vocab_size_multiple=1,
                         ssm_cfg={"d_state": c["state_size"], "d_conv": c["conv_kernel"],
                                  "expand": c["expand"], "use_fast_path": gpu},
                         fused_add_norm=gpu)
    device = "cuda" if gpu else "cpu"
    model = MambaLMHeadModel(config, device=device, dtype=dtype)
    weights = load_file(str(Path(a.model) / "model.safetensors"))
    weights = {k.replace("embeddings.", "embedding."): v for k, v in weights.items()}
    weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"])
    model.load_state_dict(weights)
    for name, p in model.named_parameters():               # the scan wants these in float32
        if name.endswith((".A_log", ".D")):
            p.data = p.data.float()
    model.eval()

    def run(ids):
        return model(ids.to(device)).logits.float().cpu()
    return run


def krait_source(a, dtype):
    def one(ids):
        with tempfile.TemporaryDirectory() as folder:
            given, out = Path(folder) / "ids.txt", Path(folder) / "logits.safetensors"
            given.write_text(",".join(map(str, ids.tolist())))
            command = [a.krait, "logits", "-m", a.model, "--ids", f"@{given}", "-o", str(out),
                       "--dtype", dtype, *a.krait_args.split()]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\nexit {done.returncode}: {done.stderr}")
            got = load_file(str(out))
        if got["ids"].tolist() != ids.tolist():
            raise SystemExit("krait wrote other ids than it was given")
        return got["logits"]
    return lambda ids: torch.stack([one(row) for row in ids])


def source(spec, a):
    """spec -> (dtype name, function from ids [n,L] to logits [n,L,V])"""
    name, _, dtype = spec.partition(":")
    dtype = dtype or "f32"
    if name == "krait":
        return dtype, krait_source(a, dtype)
    if name in ("transformers", "mamba_ssm"):
        make = transformers_source if name == "transformers" else mamba_ssm_source
        return dtype, make(a, DTYPES[dtype])
    raise SystemExit(f"unknown source {spec!r}: expected krait, transformers, mamba_ssm or saved:FILE")


class Tally:
    """Errors of a candidate against the reference, summed passage by passage."""

    def __init__(self):
        self.rows = self.same = 0
        self.kl = self.worst = 0.0

    def add(self, ref, got, std):
        """ref, got float32 [rows, V]; std of the reference logits."""
        if ref.shape != got.shape:
            raise SystemExit(f"shapes differ: reference {list(ref.shape)}, candidate {list(got.shape)}")
        error = ((got - ref).abs().max() / std).item()
        self.worst = max(self.worst, error) if error == error else float("inf")
        p, q = ref.double().log_softmax(-1), got.double().log_softmax(-1)
        self.kl += (p.exp() * (p - q)).sum().item()
        self.same += (ref.argmax(-1) == got.argmax(-1)).sum().item()
        self.rows += len(ref)

    def report(self):
        return {"positions": self.rows, "max_error_in_std": self.worst,
                "mean_kl": self.kl / self.rows, "top1": self.same / self.rows}


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    p.add_argument("--text", help="UTF-8 text to take the passages from")
    p.add_argument("--passages", type=int, default=100)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--batch", type=int, default=5, help="passages at once")
    p.add_argument("--reference", default="transformers", help="transformers, mamba_ssm or saved:FILE")
    p.add_argument("--candidates", nargs="*", default=[])
    p.add_argument("--krait", default="krait", help="the program")
    p.add_argument("--krait-args", default="", help="more flags for it, such as '--device cpu'")
    p.add_argument("--device", default="cpu", help="where transformers runs")
    p.add_argument("--save", help="write the reference logits of every --every-th position here")
    p.add_argument("--every", type=int, default=128)
    p.add_argument("--limit-f32", type=float, default=1e-4, help="largest error in std")
    p.add_argument("--limit-kl", type=float, default=2e-3)
    p.add_argument("--limit-top1", type=float, default=0.98)
    a = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False

    saved = None
    if a.reference.startswith("saved:"):
        path = a.reference.removeprefix("saved:")
        saved = load_file(path)
        ids, rows = saved["ids"], saved["positions"]
        print("reference:", safe_open(path, "pt").metadata())
    else:
        if not a.text:
            p.error("--text is needed unless the reference is saved:FILE")
        ids, rows = passages(a.model, a.text, a.passages, a.length), None
        reference = source(a.reference, a)[1]
    candidates = {spec: source(spec, a) for spec in a.candidates}
    tallies = {spec: Tally() for spec in candidates}
    kept = []
    for i in range(0, len(ids), a.batch):
        chunk = ids[i:i + a.batch]
        ref = saved["logits"][i:i + a.batch] if saved else reference(chunk)      # [n,L,V]
        std = ref.double().std().item()
        for spec, (_, run) in candidates.items():
            got = run(chunk)
            if rows is not None:
                got = got[:, rows]
            tallies[spec].add(ref.flatten(0, 1), got.flatten(0, 1), std)
        if a.save:
            kept.append(ref[:, a.every - 1::a.every])
    if a.save:
        positions = torch.arange(a.every - 1, ids.shape[1], a.every)
        save_file({"ids": ids, "positions": positions, "logits": torch.cat(kept).contiguous()}, a.save,
                  metadata={"source": a.reference, "model": Path(a.model).name})
    failed = False
    for spec, tally in tallies.items():
        r, dtype = tally.report(), candidates[spec][0]
        if dtype == "f32":
            good = r["max_error_in_std"] <= a.limit_f32
        else:
            good = r["mean_kl"] <= a.limit_kl and r["top1"] >= a.limit_top1
        failed |= not good
        print(f"{spec} against {a.reference}: {len(ids)} passages of {ids.shape[1]} tokens, "
              f"{r['positions']} positions: largest error {r['max_error_in_std']:.2e} std, "
              f"mean KL {r['mean_kl']:.2e}, same top token {100 * r['top1']:.2f} % "
              f"-> {'within' if good else 'BEYOND'} the limit")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

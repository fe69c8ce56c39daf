"""Write a tiny Mamba-2 in Mistral's layout and its answers, for tests/golden/models_test.cpp.

    python write_mamba2_golden.py --out tests/data/golden/models/mamba2-codestral-tiny

The shape is Codestral-Mamba's in small: 8 groups, heads of 64 channels, 128 states, untied head,
bf16 weights, names that begin with "model.". The answers are those of the equations of the original
implementation (mamba_ssm, modules/mamba2.py and ssd_minimal.py; Dao & Gu 2024), in float64, with
its gated norm, whose mean is that of each group of channels. Prompts go through the chunked form,
the greedy continuation through the recurrence; both are compared on the longest prompt.

Writes params.json, consolidated.safetensors and expected.safetensors (the tensors are named in
tests/data/README.md).
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

D, LAYERS, VOCAB, GROUPS = 256, 2, 512, 8            # what params.json says
E, P, N, K, EPS = 2 * D, 64, 128, 4, 1e-5            # the library's defaults: expand 2 and these
H, CONV = E // P, E + 2 * GROUPS * N
LENGTHS = (1, 2, 3, 4, 5, 17, 64, 130, 257, 600)
F = torch.nn.functional


def random_weights(seed):
    """Uneven on purpose: no norm weight, decay, bias or D is what a swapped one would be."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g)

    def matrix(rows, columns, scale=1.0):
        return uniform(-1, 1, rows, columns) * scale * (3 / columns) ** 0.5

    w = {"backbone.embedding.weight": uniform(-1, 1, VOCAB, D),
         "backbone.norm_f.weight": uniform(0.5, 1.5, D),
         "lm_head.weight": matrix(VOCAB, D, 2.0)}
    for i in range(LAYERS):
        w |= {f"backbone.layers.{i}.{name}": t for name, t in {
            "norm.weight": uniform(0.5, 1.5, D),
            "mixer.in_proj.weight": matrix(2 * E + 2 * GROUPS * N + H, D),
            "mixer.conv1d.weight": uniform(-0.7, 0.7, CONV, 1, K),
            "mixer.conv1d.bias": uniform(-0.3, 0.3, CONV),
            "mixer.dt_bias": uniform(-5, -1, H),
            "mixer.A_log": uniform(0, 2.7, H),
            "mixer.D": uniform(0.3, 1.7, H),
            "mixer.norm.weight": uniform(0.5, 1.5, E),
            "mixer.out_proj.weight": matrix(D, E)}.items()}
    return {"model." + k: v.bfloat16() for k, v in w.items()}


def rms(x, width=None):
    """Divided by the root of the mean square of each `width` channels (all, if None)."""
    v = x.unflatten(-1, (-1, width or x.shape[-1]))
    return (v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt()).flatten(-2)


def recurrence(x, dt, A, B, C, S):
    """S[h] = exp(dt A) S[h] + dt x B^T; y = S C. x [L,H,P], dt [L,H], B, C [L,H,N], S [H,P,N]."""
    y = []
    for t in range(len(x)):
        S = (dt[t] * A).exp()[:, None, None] * S
        S = S + torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
        y.append(torch.einsum("hpn,hn->hp", S, C[t]))
    return torch.stack(y), S


def chunked(x, dt, A, B, C, S, size=64):
    """The same by matrix products (Dao & Gu 2024, section 6): what a chunk's own tokens give, and
    what the state before it gives."""
    y = []
    for x, dt, B, C in zip(*(v.split(size) for v in (x, dt, B, C))):
        sums = (dt * A).cumsum(0).T                                        # [H,Q]
        gap = sums[:, :, None] - sums[:, None, :]                          # decay from s to t
        M = torch.einsum("thn,shn->hts", C, B) * gap.tril().exp().tril()
        own = torch.einsum("hts,sh,shp->thp", M, dt, x)
        before = torch.einsum("ht,hpn,thn->thp", sums.exp(), S, C)
        y.append(own + before)
        S = sums[:, -1].exp()[:, None, None] * S
        to_end = (sums[:, -1:] - sums).exp()
        S = S + torch.einsum("hs,sh,shp,shn->hpn", to_end, dt, x, B)
    return torch.cat(y), S


class Model:
    def __init__(self, weights):
        self.w = {k.removeprefix("model."): v.double() for k, v in weights.items()}

    def start(self):
        """Per layer: the last K-1 inputs of the convolution, and S."""
        return [(torch.zeros(K - 1, CONV).double(), torch.zeros(H, P, N).double())
                for _ in range(LAYERS)]

    def __call__(self, ids, state, scan):
        """Logits [L,VOCAB] of ids that continue from `state`, which is changed."""
        residual = self.w["backbone.embedding.weight"][ids]
        for i in range(LAYERS):
            w = {k.removeprefix(f"backbone.layers.{i}."): v for k, v in self.w.items()}
            u = rms(residual) * w["norm.weight"]
            z, xbc, dt = (u @ w["mixer.in_proj.weight"].T).split([E, CONV, H], -1)
            window = torch.cat([state[i][0], xbc])                         # [K-1+L,CONV]
            xbc = F.conv1d(window.T[None], w["mixer.conv1d.weight"], w["mixer.conv1d.bias"],
                           groups=CONV)[0].T
            x, B, C = F.silu(xbc).split([E, GROUPS * N, GROUPS * N], -1)
            x = x.unflatten(-1, (H, P))
            B, C = (v.unflatten(-1, (GROUPS, N)).repeat_interleave(H // GROUPS, 1) for v in (B, C))
            dt = F.softplus(dt + w["mixer.dt_bias"])
            y, S = scan(x, dt, -w["mixer.A_log"].exp(), B, C, state[i][1])
            y = (y + w["mixer.D"][:, None] * x).flatten(-2) * F.silu(z)
            y = rms(y, E // GROUPS) * w["mixer.norm.weight"]
            residual = residual + y @ w["mixer.out_proj.weight"].T
            state[i] = (window[-(K - 1):], S)
        return rms(residual) * self.w["backbone.norm_f.weight"] @ self.w["lm_head.weight"].T


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    weights = random_weights(a.seed)
    model = Model(weights)
    g = torch.Generator().manual_seed(a.seed + 1)

    expected = {}
    for n in LENGTHS:
        ids = torch.randint(VOCAB, (n,), generator=g)
        logits = model(ids, model.start(), chunked)
        expected[f"prompt_{n}"] = ids
        expected[f"logits_{n}"] = (logits if n <= 17 else logits[-1:]).float().contiguous()
    steps = model(expected["prompt_600"], model.start(), recurrence)[-1]
    error = (steps - logits[-1]).abs().max() / logits[-1].std()
    assert error < 1e-10, error

    state = model.start()
    ids, greedy = expected["prompt_17"], []
    while len(greedy) < 48:
        ids = model(ids, state, recurrence)[-1:].argmax(-1)
        greedy.append(ids.item())
    expected["greedy_17"] = torch.tensor(greedy)

    params = {"dim": D, "n_layers": LAYERS, "vocab_size": VOCAB, "n_groups": GROUPS,
              "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
              "pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba"}
    (a.out / "params.json").write_text(json.dumps(params, indent=4) + "\n")
    save_file(weights, a.out / "consolidated.safetensors")
    save_file(expected, a.out / "expected.safetensors", metadata={"torch": torch.__version__})


if __name__ == "__main__":
    main()

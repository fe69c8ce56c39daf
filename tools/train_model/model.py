"""A Mamba-1 language model for training, with the parameter names and initialisation of mamba_ssm.

The layer is written out (Gu & Dao 2023, figure 3) so that dropout can be added and the same code
runs on a CPU. On a GPU the convolution and the scan are those of causal-conv1d and mamba-ssm; the
plain versions below define what they compute. Which one runs is chosen by name, never by fallback.

Shapes: B batch, L tokens, D d_model, E d_inner, N d_state, R dt_rank, K d_conv.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Shape:
    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    norm_eps: float = 1e-5

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def dt_rank(self):
        return math.ceil(self.d_model / 16)

    def parameters(self):
        D, E, N, R, K = self.d_model, self.d_inner, self.d_state, self.dt_rank, self.d_conv
        layer = 2 * E * D + E * K + E + (R + 2 * N) * E + E * R + E + E * N + E + D * E + D
        return self.n_layer * layer + self.vocab_size * D + D


def plain_conv_silu(x, weight, bias):
    """x [B,E,L], weight [E,K] -> silu(causal depthwise convolution) [B,E,L]."""
    K = weight.shape[1]
    y = F.conv1d(F.pad(x.float(), (K - 1, 0)), weight.float().unsqueeze(1), bias.float(),
                 groups=x.shape[1])
    return F.silu(y).to(x.dtype)


def plain_scan(u, dt, A, B, C, D, z, dt_bias):
    """The selective scan one token after another, in float32.

    u, dt, z [B,E,L]; A [E,N]; B, C [B,N,L]; D, dt_bias [E] -> y [B,E,L]
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) silu(z_t)
    """
    out_dtype = u.dtype
    u, dt, B, C, z = (t.float() for t in (u, dt, B, C, z))
    dt = F.softplus(dt + dt_bias.float()[:, None])
    dA = torch.exp(dt.unsqueeze(-1) * A[None, :, None, :])                   # [B,E,L,N]
    dBu = (dt * u).unsqueeze(-1) * B.transpose(1, 2).unsqueeze(1)            # [B,E,L,N]
    h = torch.zeros_like(dA[:, :, 0])
    ys = []
    for t in range(u.shape[-1]):
        h = dA[:, :, t] * h + dBu[:, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(ys, dim=-1) + D.float()[:, None] * u
    return (y * F.silu(z)).to(out_dtype)


def cuda_ops():
    """Convolution and scan of the reference implementation; ImportError if they are not built."""
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def conv_silu(x, weight, bias):
        return causal_conv1d_fn(x, weight, bias, activation="silu")

    def scan(u, dt, A, B, C, D, z, dt_bias):
        return selective_scan_fn(u, dt, A, B, C, D.float(), z=z, delta_bias=dt_bias.float(),
                                 delta_softplus=True)

    return conv_silu, scan


def ops(name):
    if name == "cuda":
        return cuda_ops()
    if name == "plain":
        return plain_conv_silu, plain_scan
    raise ValueError(f"unknown scan {name!r}: expected cuda or plain")


def check_cuda_ops(seed=0):
    """Compare the CUDA convolution and scan, forward and backward, with the plain ones.

    Returns {dtype: largest relative error}; raises if one is beyond its limit.
    """
    conv_p, scan_p = ops("plain")
    conv_c, scan_c = ops("cuda")
    found = {}
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        g = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape, scale=1.0, dtype=dtype):
            return (scale * torch.randn(*shape, generator=g, device="cuda")).to(dtype)

        worst = 0.0
        for L in (77, 300, 2048):
            E, N = 64, 16
            inputs = dict(u=normal(2, E, L), dt=normal(2, E, L, scale=0.5),
                          A=-torch.exp(normal(E, N, scale=0.5, dtype=torch.float32)),
                          B=normal(2, N, L), C=normal(2, N, L), D=normal(E, dtype=torch.float32),
                          z=normal(2, E, L), dt_bias=normal(E, dtype=torch.float32) - 2)
            grad = normal(2, E, L)
            weight, bias = normal(E, 4, dtype=torch.float32), normal(E, dtype=torch.float32)
            results = []
            for conv, scan in ((conv_p, scan_p), (conv_c, scan_c)):
                leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
                w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
                leaves_u = leaves.pop("u")
                y = scan(conv(leaves_u, w, b), **leaves)
                y.backward(grad)
                results.append([y.detach(), leaves_u.grad, w.grad, b.grad]
                               + [t.grad for t in leaves.values()])
            for ref, out in zip(*results):
                err = ((out.float() - ref.float()).norm() / ref.float().norm()).item()
                worst = max(worst, err) if err == err else float("inf")
        found[str(dtype)] = worst
        if not worst <= limit:
            raise RuntimeError(f"the CUDA scan differs from the plain one: relative error {worst:.2e} "
                               f"in {dtype}, limit {limit:.0e}")
    return found


class Mixer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.in_proj = nn.Linear(s.d_model, 2 * s.d_inner, bias=False)
        self.conv1d = nn.Conv1d(s.d_inner, s.d_inner, s.d_conv, groups=s.d_inner,
                                padding=s.d_conv - 1)
        self.x_proj = nn.Linear(s.d_inner, s.dt_rank + 2 * s.d_state, bias=False)
        self.dt_proj = nn.Linear(s.dt_rank, s.d_inner)
        self.out_proj = nn.Linear(s.d_inner, s.d_model, bias=False)
        # dt starts log-uniform in [0.001, 0.1]: the bias is the inverse of softplus there.
        nn.init.uniform_(self.dt_proj.weight, -s.dt_rank**-0.5, s.dt_rank**-0.5)
        dt = torch.exp(torch.rand(s.d_inner) * math.log(100.0) + math.log(0.001)).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            # Keep the variance of the residual stream independent of the depth, as mamba_ssm does.
            self.out_proj.weight /= math.sqrt(s.n_layer)
        A = torch.arange(1, s.d_state + 1, dtype=torch.float32).repeat(s.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(A))                              # S4D-real
        self.D = nn.Parameter(torch.ones(s.d_inner))

    def forward(self, u, conv_silu, scan):
        s, (batch, L, _) = self.s, u.shape
        # Computed transposed, so that time is the contiguous index that the scan wants.
        xz = (self.in_proj.weight @ u.reshape(batch * L, -1).t())            # [2E, B*L]
        xz = xz.view(2 * s.d_inner, batch, L).transpose(0, 1)                # [B,2E,L]
        x, z = xz.chunk(2, dim=1)                                            # [B,E,L]
        x = conv_silu(x, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        dbc = self.x_proj(x.transpose(1, 2).reshape(batch * L, -1))          # [B*L, R+2N]
        dt, B, C = dbc.split([s.dt_rank, s.d_state, s.d_state], dim=-1)
        dt = (self.dt_proj.weight @ dt.t()).view(s.d_inner, batch, L).transpose(0, 1)
        B = B.view(batch, L, -1).transpose(1, 2).contiguous()                # [B,N,L]
        C = C.view(batch, L, -1).transpose(1, 2).contiguous()
        A = -torch.exp(self.A_log.float())
        y = scan(x, dt, A, B, C, self.D, z, self.dt_proj.bias)
        return self.out_proj(y.transpose(1, 2))                              # [B,L,D]


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(s.d_model, eps=s.norm_eps)
        self.mixer = Mixer(s)


class Backbone(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.embeddings = nn.Embedding(s.vocab_size, s.d_model)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.norm_f = nn.RMSNorm(s.d_model, eps=s.norm_eps)


class Mamba(nn.Module):
    """Head tied to the embedding; the residual stream stays float32 under autocast."""

    def __init__(self, s: Shape, scan="cuda", dropout=0.0):
        super().__init__()
        self.shape, self.dropout = s, dropout
        self.backbone = Backbone(s)
        self.conv_silu, self.scan = ops(scan)

    def hidden(self, ids):
        b = self.backbone
        residual = F.dropout(b.embeddings(ids).float(), self.dropout, self.training)
        for layer in b.layers:
            y = layer.mixer(layer.norm(residual), self.conv_silu, self.scan)
            residual = residual + F.dropout(y, self.dropout, self.training).float()
        return b.norm_f(residual)                                            # [B,L,D]

    def forward(self, ids):
        return F.linear(self.hidden(ids), self.backbone.embeddings.weight)   # [B,L,V]

    def loss(self, ids, targets, reduction="mean"):
        logits = self(ids).float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction,
                              ignore_index=-1)
        return nll.view_as(targets) if reduction == "none" else nll


KEEP_FLOAT = ("A_log", ".D", "dt_proj.bias", "norm.weight", "norm_f.weight")


def save_folder(model, folder, end_of_text, generation=None, small_float32=False):
    """Write config.json, generation_config.json and model.safetensors as transformers names them."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    s = model.shape
    config = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba",
        "vocab_size": s.vocab_size, "hidden_size": s.d_model, "intermediate_size": s.d_inner,
        "num_hidden_layers": s.n_layer, "state_size": s.d_state, "conv_kernel": s.d_conv,
        "expand": s.expand, "time_step_rank": s.dt_rank, "layer_norm_epsilon": s.norm_eps,
        "hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True,
        "tie_word_embeddings": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
        "pad_token_id": end_of_text, "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text,
                  "pad_token_id": end_of_text, **(generation or {})}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {}
    for name, t in model.state_dict().items():
        keep = small_float32 and name.endswith(KEEP_FLOAT)
        tensors[name] = t.detach().cpu().to(torch.float32 if keep else torch.bfloat16).contiguous()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_folder(folder, scan, device="cpu", dtype=torch.float32):
    from safetensors.torch import load_file

    folder = Path(folder)
    c = json.loads((folder / "config.json").read_text())
    s = Shape(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["state_size"],
              c["conv_kernel"], c["expand"], c["layer_norm_epsilon"])
    model = Mamba(s, scan)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model.to(device=device, dtype=dtype).eval()


def describe(s: Shape):
    return {**asdict(s), "d_inner": s.d_inner, "dt_rank": s.dt_rank, "parameters": s.parameters()}

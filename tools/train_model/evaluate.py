"""Bits per UTF-8 byte of texts under a model, and samples from it.

    python evaluate.py --model DIR [--scan plain|cuda] TEXT...          bits per byte and perplexity
    python evaluate.py --model DIR --samples 10 [--prompt TEXT]         samples

Protocol: each document is encoded by itself, <|endoftext|> is put before it, and it is cut into
windows of --length predicted tokens; every window starts from the empty state with the token
before it. All tokens of the text are scored; the closing <|endoftext|> is not.
"""

import argparse
import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch


def windows_of(docs, length, end):
    """Pairs (inputs, targets) of at most length tokens; docs end with <|endoftext|>, unscored."""
    for doc in docs:
        ids = np.concatenate([[end], doc[:-1] if doc[-1] == end else doc]).astype(np.int64)
        for i in range(0, len(ids) - 1, length):
            yield ids[i:i + length + 1][:-1], ids[i + 1:i + length + 1]


@torch.no_grad()
def bits_per_byte(model, docs, size, end, length=2048, limit=None, context=None, batch_tokens=1 << 16):
    """limit scores only about that many tokens, spread evenly, and scales the bytes likewise."""
    device = next(model.parameters()).device
    pairs = list(windows_of(docs, length, end))
    total = sum(len(t) for _, t in pairs)
    if limit and total > limit:
        pairs = pairs[:: math.ceil(total / limit)]
    scored = sum(len(t) for _, t in pairs)
    pairs.sort(key=lambda p: len(p[1]))
    nll, i = 0.0, 0
    while i < len(pairs):
        n = max(1, batch_tokens // max(len(pairs[min(i + 31, len(pairs) - 1)][1]), 1))
        chunk = pairs[i:i + min(n, 32)]
        width = max(len(t) for _, t in chunk)
        ids = torch.full((len(chunk), width), end)
        targets = torch.full((len(chunk), width), -1)
        for row, (x, t) in enumerate(chunk):
            ids[row, :len(x)] = torch.from_numpy(x)
            targets[row, :len(t)] = torch.from_numpy(t)
        with context or contextlib.nullcontext():
            nll += model.loss(ids.to(device), targets.to(device), "none").double().sum().item()
        i += len(chunk)
    nats = nll / scored
    return {"tokens": scored, "nats_per_token": nats, "perplexity": math.exp(nats),
            "bits_per_byte": nats / math.log(2) * total / size}


def choose(logits, past, rng, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """One token id: repetition penalty, top-k, top-p, min-p, temperature, in this order.

    The penalty is that of transformers: every token of past counts, however far back.
    """
    logits = logits.double().clone()
    if repetition_penalty != 1.0 and past:
        seen = torch.tensor(sorted(set(past)))
        v = logits[seen]
        logits[seen] = torch.where(v > 0, v / repetition_penalty, v * repetition_penalty)
    values, order = logits.sort(descending=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if top_k:
        keep[top_k:] = False
    probs = values.masked_fill(~keep, -math.inf).softmax(-1)
    keep &= probs.cumsum(-1) - probs < top_p
    probs = values.masked_fill(~keep, -math.inf).softmax(-1)
    keep &= probs >= min_p * probs[0]
    probs = (values.masked_fill(~keep, -math.inf) / temperature).softmax(-1)
    return int(order[torch.multinomial(probs, 1, generator=rng)])


def sampling_defaults(folder):
    config = json.loads((Path(folder) / "generation_config.json").read_text())
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {k: config[k] for k in names if k in config}


@torch.no_grad()
def generate(model, tokenizer, prompt, n, seed, **sampling):
    """The text after the prompt; an empty prompt starts a new document."""
    end = tokenizer.eos_id()
    rng = torch.Generator().manual_seed(seed)
    ids = [end] + (tokenizer.encode(prompt) if prompt else [])
    state, feed = None, ids
    for _ in range(n):
        logits, state = step(model, feed, state)
        token = choose(logits, ids[1:], rng, **sampling)
        if token == end:
            break
        ids.append(token)
        feed = [token]
    return tokenizer.decode(ids[1:])


@torch.no_grad()
def step(model, ids, state):
    """Feed ids one by one through the recurrence; state per layer is (last inputs, h)."""
    s = model.shape
    b = model.backbone
    F = torch.nn.functional
    if state is None:
        state = [(torch.zeros(s.d_inner, s.d_conv), torch.zeros(s.d_inner, s.d_state))
                 for _ in b.layers]
    for token in ids:
        residual = b.embeddings.weight[token]                                # [D]
        for n, layer in enumerate(b.layers):
            m, (conv, h) = layer.mixer, state[n]
            x, z = (m.in_proj.weight @ layer.norm(residual)).chunk(2)        # [E]
            conv = torch.cat([conv[:, 1:], x[:, None]], dim=1)               # [E,K]
            x = F.silu((conv * m.conv1d.weight.squeeze(1)).sum(1) + m.conv1d.bias)
            dt, B, C = (m.x_proj.weight @ x).split([s.dt_rank, s.d_state, s.d_state])
            dt = F.softplus(m.dt_proj.weight @ dt + m.dt_proj.bias)          # [E]
            h = torch.exp(dt[:, None] * -torch.exp(m.A_log)) * h + (dt * x)[:, None] * B
            y = (h @ C + m.D * x) * F.silu(z)                                # [E]
            residual = residual + m.out_proj.weight @ y
            state[n] = (conv, h)
    return b.embeddings.weight @ b.norm_f(residual), state


def main():
    import sentencepiece

    import data
    from model import load_folder

    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    p.add_argument("--scan", choices=("plain", "cuda"), default="plain")
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--limit", type=int, help="score only about this many tokens of each text")
    p.add_argument("--samples", type=int, default=0)
    p.add_argument("--prompt", default="")
    p.add_argument("-n", type=int, default=200)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--sampling", type=json.loads, help="JSON instead of generation_config.json")
    p.add_argument("texts", nargs="*")
    a = p.parse_args()
    device = "cuda" if a.scan == "cuda" else "cpu"
    model = load_folder(a.model, a.scan, device)
    model_file = str(Path(a.model) / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model_file)
    for text in a.texts:
        docs = data.documents(text)
        size = sum(len(d.encode()) for d in docs)
        ids = data.encode_documents(docs, model_file)
        print(text, json.dumps(bits_per_byte(model, ids, size, tokenizer.eos_id(), a.length, a.limit)))
    sampling = sampling_defaults(a.model) if a.sampling is None else a.sampling
    for i in range(a.samples):
        print(f"--- seed {a.seed + i}")
        print(generate(model, tokenizer, a.prompt, a.n, a.seed + i, **sampling))


if __name__ == "__main__":
    main()

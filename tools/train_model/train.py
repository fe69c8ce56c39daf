"""Train a small Mamba-1 language model and export it as a Hugging Face style folder.

    python train.py --corpus DIR --tokenizer FILE.model --out DIR      one GPU
    python train.py --corpus DIR --tokenizer FILE.model --out DIR --smoke   a minute on a CPU

The run is resumed from OUT/checkpoint.pt if that is there. OUT/log.jsonl has one line per
measurement, OUT/model the exported folder.
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch

import data
from evaluate import bits_per_byte
from model import Mamba, Shape, check_cuda_ops, describe, load_folder, save_folder


@dataclass
class Recipe:
    """The defaults are the recipe of models/hognose."""

    d_model: int = 512
    n_layer: int = 6
    length: int = 2048          # tokens of a training window
    batch: int = 16             # windows of a step
    epochs: float = 12.71
    lr: float = 4e-3
    warmup: int = 200           # steps
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.5
    dropout: float = 0.1
    clip: float = 1.0
    seed: int = 1
    seconds: float = 0.0        # if set, the schedule ends after this much wall-clock time
    valid_every: int = 400      # steps
    valid_tokens: int = 1 << 17
    scan: str = "cuda"
    device: str = "cuda"


def optimizer(model, r):
    decay, keep = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim >= 2 and not name.endswith("A_log")
        (decay if matrix else keep).append(p)
    groups = [{"params": decay, "weight_decay": r.weight_decay},
              {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=r.lr, betas=r.betas, eps=1e-8, fused=r.device == "cuda")


def random_state():
    """What dropout draws from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda


def set_random_state(state):
    torch.set_rng_state(state[0].cpu())
    if state[1] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1].cpu())


def schedule(step, progress, r):
    """Linear warm-up, then linear decay to zero at the end of the run."""
    return min(1.0, (step + 1) / r.warmup) * max(0.0, 1.0 - progress)


def train(r, train_docs, valid, tokenizer, out=None, export=True, say=print, checkpoint_every=0.0):
    """Train by recipe r. valid maps a name to (documents as ids, bytes of text).

    Returns a dict with the final figures; the model itself under "model".
    """
    torch.manual_seed(r.seed)
    end = tokenizer.eos_id()
    shape = Shape(tokenizer.get_piece_size(), r.d_model, r.n_layer)
    model = Mamba(shape, r.scan, r.dropout).to(r.device)
    opt = optimizer(model, r)
    tokens = sum(map(len, train_docs))
    per_epoch = max(1, tokens // (r.length * r.batch))
    total = max(1, int(r.epochs * per_epoch))
    autocast = torch.autocast(r.device, torch.bfloat16, enabled=r.device == "cuda")
    out = Path(out) if out else None
    log, step, spent = [], 0, 0.0
    if out:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            saved = torch.load(out / "checkpoint.pt", map_location=r.device, weights_only=False)
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["optimizer"])
            step, spent, log = saved["step"], saved["spent"], saved["log"]
            set_random_state(saved["random"])
            say(f"resumed at step {step}")
    say(f"shape {describe(shape)}; {tokens} tokens an epoch, {per_epoch} steps; {total} steps")

    start = time.time() - spent
    epoch, windows = -1, None
    running, tic, seen = [], time.time(), 0
    last_save = time.time()
    best = math.inf
    while True:
        progress = step / total
        if r.seconds:
            progress = max(progress, (time.time() - start) / r.seconds)
        done = progress >= 1.0
        if done or (step and step % r.valid_every == 0):
            if r.device == "cuda":
                torch.cuda.synchronize()
            rate = seen / max(1e-9, time.time() - tic)
            loss = torch.stack(running).mean().item() if running else float("nan")
            model.eval()
            name, (docs, size) = next(iter(valid.items()))
            v = bits_per_byte(model, docs, size, end, r.length, r.valid_tokens, autocast)
            model.train()
            best = min(best, v["bits_per_byte"])
            row = {"step": step, "epoch": round(step / per_epoch, 3),
                   "seconds": round(time.time() - start, 1), "train_loss": round(loss, 4),
                   "valid_bits_per_byte": round(v["bits_per_byte"], 4), "tokens_per_s": round(rate),
                   "lr": opt.param_groups[0]["lr"]}
            if not math.isfinite(loss + v["bits_per_byte"]) and step:
                raise RuntimeError(f"training diverged: {row}")
            log.append(row)
            say(json.dumps(row))
            if out:
                (out / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
            running, tic, seen = [], time.time(), 0
        if done:
            break
        if out and checkpoint_every and time.time() - last_save > checkpoint_every:
            last_save = time.time()
            torch.save({"model": model.state_dict(), "optimizer": opt.state_dict(), "step": step,
                        "spent": time.time() - start, "log": log, "random": random_state()},
                       out / "checkpoint.tmp")
            (out / "checkpoint.tmp").rename(out / "checkpoint.pt")
            tic, seen = time.time(), 0
        # Each epoch has a random stream of its own, so a resumed run meets the same windows.
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            rng = np.random.default_rng([r.seed, epoch])
            cut = data.epoch_windows(train_docs, r.length, end, rng)
            windows = torch.from_numpy(cut.astype(np.int32)).to(r.device)
        i = (step % per_epoch) * r.batch % max(1, len(windows) - r.batch + 1)
        ids = windows[i:i + r.batch].long()
        for group in opt.param_groups:
            group["lr"] = r.lr * schedule(step, progress, r)
        with autocast:
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), r.clip)
        opt.step()
        running.append(loss.detach())
        seen += ids.numel() - len(ids)
        step += 1

    model.eval()
    result = {"steps": step, "epochs": round(step / per_epoch, 2),
              "seconds": round(time.time() - start, 1), "parameters": shape.parameters(),
              "final_train_loss": log[-1]["train_loss"], "best_valid": best,
              "valid": {}, "model": model, "log": log}
    if out and export:
        save_folder(model, out / "model", end)
    for name, (docs, size) in valid.items():
        result["valid"][name] = bits_per_byte(model, docs, size, end, r.length, None, autocast)
        say(f"{name}: {result['valid'][name]}")
    if out and export:
        summary = {k: v for k, v in result.items() if k not in ("model", "log")}
        (out / "result.json").write_text(json.dumps(
            {**summary, "recipe": r.__dict__, "shape": describe(shape)}, indent=1) + "\n")
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return result


def load_valid(corpus, model_file, extra=(), workers=1):
    """{name: (documents as ids, bytes of text)}; books first, since training watches the first."""
    paths = {f"{k}.valid": v for k, v in data.files(corpus, "valid").items()}
    for path in extra:
        paths[Path(path).name.split(".txt")[0]] = Path(path)
    valid = {}
    for name, path in paths.items():
        docs = data.documents(path)
        size = sum(len(d.encode()) for d in docs)
        valid[name] = (data.encode_documents(docs, model_file, workers), size)
    return valid


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--corpus", required=True, help="folder with *.train.txt[.xz], *.valid.txt[.xz]")
    p.add_argument("--tokenizer", required=True, help="SentencePiece model (train_tokenizer.py)")
    p.add_argument("--eval", nargs="*", default=[], help="more texts to report bits per byte on")
    p.add_argument("--out", required=True)
    p.add_argument("--workers", type=int, default=1, help="processes that encode the corpus")
    p.add_argument("--smoke", action="store_true", help="a tiny model for a minute on the CPU")
    p.add_argument("--checkpoint-every", type=float, default=300.0, metavar="SECONDS")
    for name in ("d-model", "n-layer", "length", "batch", "warmup", "seed", "valid-every"):
        p.add_argument(f"--{name}", type=int)
    for name in ("epochs", "lr", "weight-decay", "dropout", "seconds"):
        p.add_argument(f"--{name}", type=float)
    a = p.parse_args()
    r = Recipe()
    if a.smoke:
        r = Recipe(d_model=64, n_layer=2, length=128, batch=8, epochs=1, warmup=10, valid_every=25,
                   valid_tokens=4096, seconds=40, scan="plain", device="cpu")
    for name in r.__dict__:
        if getattr(a, name, None) is not None:
            setattr(r, name, getattr(a, name))
    if r.scan == "cuda":
        print("CUDA scan against the plain scan:", check_cuda_ops())

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=a.tokenizer)
    docs = [d for path in data.files(a.corpus, "train").values() for d in data.documents(path)]
    valid = load_valid(a.corpus, a.tokenizer, a.eval, a.workers)
    if a.smoke:                                            # a slice is enough to see it learn
        docs = docs[:: max(1, len(docs) // 40)]
        valid = {k: ([d[:1000] for d in v[0][:4]], 0) for k, v in list(valid.items())[:1]}
        for k, (ids, _) in valid.items():
            valid[k] = (ids, sum(len(tokenizer.decode(i.tolist()).encode()) for i in ids))
    train_docs = data.encode_documents(docs, a.tokenizer, a.workers)
    train(r, train_docs, valid, tokenizer, a.out, checkpoint_every=a.checkpoint_every,
          say=lambda *x: print(*x, flush=True))
    exported = Path(a.out) / "model"
    shutil.copy(a.tokenizer, exported / "tokenizer.model")

    # What counts is the exported file, computed in float32.
    model, figures = load_folder(exported, r.scan, r.device), {}
    for name, (docs, size) in valid.items():
        figures[name] = {f"windows of {n}": bits_per_byte(model, docs, size, tokenizer.eos_id(), n)
                         for n in (512, r.length)}
        if max(map(len, docs)) < 200_000 and not a.smoke:
            figures[name]["whole documents"] = bits_per_byte(
                model, docs, size, tokenizer.eos_id(), 1 << 30)
        print(name, json.dumps(figures[name]), flush=True)
    (Path(a.out) / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Compare tokenizers, shapes and learning rates in short runs, one after another in one process.

    python trials.py --corpus DIR --tokenizers DIR --list trials.json --out DIR

The list is JSON: one object per trial with "tokenizer" (file name without .model) and any field of
train.Recipe. Prints a Markdown table ordered as run; stops early when --seconds are used up.
"""

import argparse
import json
import time
from pathlib import Path

import sentencepiece
import torch

import data
from model import check_cuda_ops
from train import Recipe, load_valid, train

HEAD = ("| tokenizer | d_model | layers | parameters | MB in bf16 | lr | weight decay | dropout | epochs "
        "| books.valid bits/byte | tokens/s | seconds |\n" + "| --- |" + " ---: |" * 11)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--corpus", required=True)
    p.add_argument("--tokenizers", required=True, help="folder of SentencePiece models")
    p.add_argument("--list", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--seconds", type=float, default=1e9, help="start no trial after this time")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    a = p.parse_args()
    began = time.time()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    if a.device == "cuda":
        print("CUDA scan against the plain scan:", check_cuda_ops(), flush=True)
    docs = [d for path in data.files(a.corpus, "train").values() for d in data.documents(path)]
    encoded, rows = {}, []
    print(HEAD, flush=True)
    for trial in json.loads(Path(a.list).read_text()):
        if time.time() - began > a.seconds:
            print("time is up", flush=True)
            break
        trial = dict(trial)
        name = trial.pop("tokenizer")
        model_file = Path(a.tokenizers) / f"{name}.model"
        if name not in encoded:
            encoded[name] = (data.encode_documents(docs, model_file, a.workers),
                             load_valid(a.corpus, model_file, workers=a.workers))
        scan = "cuda" if a.device == "cuda" else "plain"
        r = Recipe(**{"epochs": 1, "valid_every": 10**9, "scan": scan, "device": a.device, **trial})
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        begun = time.time()
        train_docs, valid = encoded[name]
        books = dict([next(iter(valid.items()))])
        result = train(r, train_docs, books, tokenizer, export=False, say=lambda *x: None)
        row = {"tokenizer": name, **r.__dict__, "parameters": result["parameters"],
               "epochs_run": result["epochs"], "bits_per_byte":
               next(iter(result["valid"].values()))["bits_per_byte"],
               "train_loss": result["final_train_loss"],
               "tokens_per_s": result["log"][-1]["tokens_per_s"], "seconds": time.time() - begun}
        rows.append(row)
        (out / "trials.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"| {name} | {r.d_model} | {r.n_layer} | {row['parameters']} "
              f"| {row['parameters'] * 2e-6:.1f} | {r.lr:g} | {r.weight_decay:g} | {r.dropout:g} "
              f"| {row['epochs_run']:g} | {row['bits_per_byte']:.4f} | {row['tokens_per_s']} "
              f"| {row['seconds']:.1f} |", flush=True)
        del result
        if a.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

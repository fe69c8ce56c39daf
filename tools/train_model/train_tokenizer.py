"""Train the SentencePiece model: unigram or BPE, byte fallback, <|endoftext|> as a control piece.

Text is not normalised and spaces are kept as they are, so decoding gives the text back exactly.
A line break is a piece of its own; digits are single pieces.
"""

import argparse
from pathlib import Path

import sentencepiece

import data


def train(corpus, out, kind, size):
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    lines = [line for path in data.files(corpus, "train").values()
             for doc in data.documents(path) for line in doc.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(out), model_type=kind, vocab_size=size,
        byte_fallback=True, character_coverage=0.9999, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        unk_id=0, eos_id=1, eos_piece=data.END, bos_id=-1, pad_id=-1,
        user_defined_symbols=["\n"], max_sentence_length=16384, num_threads=2, minloglevel=1)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--corpus", required=True, help="folder with *.train.txt[.xz]")
    p.add_argument("--kind", choices=("unigram", "bpe"), default="unigram")
    p.add_argument("--size", type=int, default=8192)
    p.add_argument("--out", required=True, help="prefix of the .model and .vocab files")
    a = p.parse_args()
    train(a.corpus, a.out, a.kind, a.size)
    sp = sentencepiece.SentencePieceProcessor(model_file=f"{a.out}.model")
    for name, path in data.files(a.corpus, "valid").items():
        docs = data.documents(path)
        ids = [sp.encode(d) for d in docs]
        assert all(sp.decode(i) == d for i, d in zip(ids, docs)), f"{name}: decoding lost text"
        size = sum(len(d.encode()) for d in docs)
        print(f"{name}: {size / sum(map(len, ids)):.3f} bytes per token")


if __name__ == "__main__":
    main()

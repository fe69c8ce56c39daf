"""Corpus files -> documents -> token ids.

A corpus folder holds NAME.train.txt[.xz] and NAME.valid.txt[.xz]: UTF-8, documents separated by a
line holding only <|endoftext|>. Token streams are uint16; every document is followed by the id of
<|endoftext|>.
"""

import lzma
import multiprocessing
from pathlib import Path

import numpy as np
import sentencepiece

END = "<|endoftext|>"


def read_text(path):
    path = Path(path)
    raw = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
    return raw.decode("utf-8")


def documents(path):
    docs = (d.strip("\n") for d in read_text(path).split(END))
    return [d for d in docs if d]


def files(corpus, split):
    found = {}
    for path in sorted(Path(corpus).glob(f"*.{split}.txt*")):
        if path.name.endswith((".txt", ".txt.xz")):
            found.setdefault(path.name.split(".")[0], path)
    if not found:
        raise FileNotFoundError(f"no *.{split}.txt or *.{split}.txt.xz in {corpus}")
    return found


_processor = None


def _start(model_file):
    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))


def _encode(doc):
    return np.array(_processor.encode(doc) + [_processor.eos_id()], dtype=np.uint16)


def encode_documents(docs, model_file, workers=1):
    """One uint16 array per document, each ending with <|endoftext|>."""
    if workers <= 1:
        _start(model_file)
        return [_encode(d) for d in docs]
    with multiprocessing.get_context("fork").Pool(workers, _start, (model_file,)) as pool:
        return pool.map(_encode, docs, chunksize=16)


def epoch_windows(docs, length, end_of_text, rng):
    """Shuffle the documents, join them, and cut windows of length+1 ids that overlap by one.

    The cut starts at a random offset, so that another epoch meets other windows.
    """
    order = rng.permutation(len(docs))
    stream = np.concatenate([np.array([end_of_text], np.uint16)] + [docs[i] for i in order])
    offset = int(rng.integers(length))
    n = (len(stream) - 1 - offset) // length
    windows = np.lib.stride_tricks.as_strided(
        stream[offset:], (n, length + 1), (length * stream.itemsize, stream.itemsize))
    return windows[rng.permutation(n)]

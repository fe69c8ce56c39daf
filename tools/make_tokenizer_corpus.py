#!/usr/bin/env python3
"""Writes the seed corpora of the tokenizer fuzzers, tests/fuzz/corpus/{tokenizer_json,sentencepiece,tokenizer_encode}.

The seeds are small well-formed files, each with other components, some damaged ones, and texts that are hard to tokenise.
Run it from anywhere; it needs Python alone.
"""

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).resolve().parent.parent / "tests" / "fuzz" / "corpus"


def write(name, files):
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for key, data in files.items():
        (folder / key).write_bytes(data if isinstance(data, bytes) else data.encode())


# tokenizer.json ----------------------------------------------------------------------------------


def bpe(tokens, merges, **keys):
    return {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges, **keys}


def added(token_id, content, **flags):
    return {"id": token_id, "content": content, **flags}


def sequence(key, *steps):
    return {"type": "Sequence", key: list(steps)}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMALL = bpe(["<s>", "a", "b", "ab", "\u0120", "\u00c3", "\u00a9"], ["a b"])
LLAMA_TOKENS = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "ab"] + [f"<0x{b:02X}>" for b in range(256)]

GPT_NEOX = {
    "version": "1.0",
    "added_tokens": [added(0, "<s>", special=True, normalized=False), added(7, "  ", special=False, normalized=True)],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": BYTE_LEVEL,
    "post_processor": BYTE_LEVEL,
    "decoder": BYTE_LEVEL,
    "model": SMALL,
}
FALCON = {
    "pre_tokenizer": sequence(
        "pretokenizers",
        {"type": "Punctuation", "behavior": "Contiguous"},
        BYTE_LEVEL,
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ),
    "decoder": BYTE_LEVEL,
    "model": SMALL,
}
LLAMA = {
    "added_tokens": [added(i, t, special=True, normalized=False) for i, t in enumerate(LLAMA_TOKENS[:3])],
    "normalizer": sequence(
        "normalizers",
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ),
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": sequence(
        "decoders",
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ),
    "model": bpe(LLAMA_TOKENS, [["\u2581", "a"], ["a", "b"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True),
}
METASPACE = {
    "added_tokens": [added(1, "ab", lstrip=True, rstrip=True, single_word=True, normalized=True)],
    "normalizer": sequence("normalizers", {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, {"type": "Strip"}),
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
    "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"},
    "model": bpe(["a", "##b", "a##b", "</w>", "b</w>"], [], continuing_subword_prefix="##", end_of_word_suffix="</w>", ignore_merges=True),
}


def split(pattern, behavior, invert=False):
    return {"pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}, "model": SMALL}


JSON_SEEDS = {
    "gpt_neox": GPT_NEOX,
    "falcon": FALCON,
    "llama": LLAMA,
    "metaspace": METASPACE,
    "split_words": split({"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+"}, "Removed"),
    "split_invert": split({"Regex": r"\w+|[\u4e00-\u9fff]"}, "MergedWithPrevious", True),
    "split_string": split({"String": " "}, "MergedWithNext"),
    "split_empty": split({"Regex": r"a*|\b"}, "Contiguous"),
    "whitespace": {"pre_tokenizer": {"type": "Whitespace"}, "model": SMALL},
    "bert": {"post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}, "model": SMALL},
    "stray_id": {"model": {"vocab": {"a": 2000000000}, "merges": []}},
    "unknown": {"decoder": {"type": "CTC"}, "model": SMALL},
}

# SentencePiece: protocol buffers by hand ---------------------------------------------------------


def varint(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value if isinstance(value, bytes) else value.encode()
    return varint(number << 3 | 2) + varint(len(data)) + data


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def piece(text, score=0.0, kind=NORMAL):
    return field(1, field(1, text) + field(2, score) + field(3, kind))


def model(algorithm, byte_fallback, pieces, normalizer):
    head = [piece("<unk>", 0.0, UNKNOWN), piece("<s>", 0.0, CONTROL), piece("</s>", 0.0, CONTROL)]
    if byte_fallback:
        head += [piece(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    trainer = field(3, algorithm) + field(35, int(byte_fallback))
    return b"".join(head + pieces) + field(2, trainer) + field(3, normalizer)


def charsmap(root=0):
    """The one rule "A" -> "a" as a double array of 512 units (see check_charsmap in sentencepiece_model.cpp)."""
    units = [root] + [0] * 511
    units[0x41] = 0x41 | 1 << 8 | 0x100 << 10
    units[0x141] = 1 << 31
    return struct.pack("<I", 4 * 512) + struct.pack("<512I", *units) + b"a\0"


PIECES = [piece(t, -float(i)) for i, t in enumerate(["\u2581", "a", "b", "ab", "\u2581a", "e", "1", "\u65e5"])]
IDENTITY = field(1, "identity") + field(3, 1) + field(4, 0)
BPE = model(2, False, PIECES + [piece("<s2>", 0.0, USER_DEFINED), piece("z", 0.0, UNUSED)], IDENTITY)
SENTENCEPIECE_SEEDS = {
    "bpe": BPE,
    "bpe_bytes": model(2, True, PIECES, IDENTITY),
    "unigram": model(1, False, PIECES, field(3, 1) + field(4, 1)),
    "unigram_charsmap": model(1, False, PIECES, field(2, charsmap())),
    "unigram_charsmap_root": model(1, False, PIECES, field(2, charsmap(1 << 31 | 0x3FFFFF << 10))),
    "word": model(3, False, PIECES, IDENTITY),
    "character": model(4, False, PIECES, IDENTITY),
    "twice": BPE + piece("a"),
    "cut": BPE[:-7],
    "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}

# Texts -------------------------------------------------------------------------------------------

TEXTS = {
    "prose": "The quick brown fox isn't they'll 'she, 3.14!?",
    "spaces": "a  b   c    d     e\n    return\t\tx \u00a0\u3000y   ",
    "special": "a<|end|>b <x> ab  <|end",
    "composed": "e\u0301\u00e9 \u1112\u1161\u11ab A\u030a\u0323 \u212b \ufb01 \u0130",
    "scripts": "\u65e5\u672c\u8a9e \u0628\u064f \u0e01\u0e33 \U0001f468\u200d\U0001f469\u200d\U0001f466 \u216b\u00b2",
    "ill_formed": b"a\xff\xc3(\xed\xa0\x80\xf4\x90\x80\x80\xe2\x82",
    "control": bytes(range(32)) + b"\x7f\xc2\x85",
    "word": "a" * 100 + "the" * 40,
    "empty": "",
}

write("tokenizer_json", {k: json.dumps(v, separators=(",", ":")) for k, v in JSON_SEEDS.items()})
write("sentencepiece", SENTENCEPIECE_SEEDS)
write("tokenizer_encode", TEXTS)

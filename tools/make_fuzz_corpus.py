#!/usr/bin/env python3
"""Writes the seed corpora of the checkpoint fuzzers, tests/fuzz/corpus/{safetensors,torch_bin,pickle,index,gguf}.

The seeds are well-formed files, each with another feature of its format, and a few damaged ones.
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
        (folder / key).write_bytes(data)


# safetensors -------------------------------------------------------------------------------------


def safetensors(header, data=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(header)) + header + data


def info(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_files():
    files = {
        "empty": safetensors({}),
        "metadata": safetensors({"__metadata__": {"format": "pt", "a": "b"}}),
        "two": safetensors({"a": info("F32", [2, 3], 0, 24), "b": info("U8", [1], 24, 25)}, bytes(25)),
        "scalar": safetensors({"s": info("F64", [], 0, 8)}, bytes(8)),
        "zero_size": safetensors({"z": info("BF16", [0, 7], 0, 0)}),
        "padded": safetensors(b'{"p":{"dtype":"I16","shape":[1],"data_offsets":[0,2]}}   ', bytes(2)),
        "escaped": safetensors(b'{"\\u00e9\\n":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "float8": safetensors({"f": info("F8_E4M3", [4], 0, 4)}, bytes(4)),
        "rank5": safetensors({"r": info("U8", [1, 1, 1, 1, 1], 0, 1)}, b"x"),
        "hole": safetensors({"h": info("U8", [1], 1, 2)}, bytes(2)),
        "overflow": safetensors({"o": info("F32", [1 << 62, 1 << 62], 0, 0)}),
        "twice": safetensors(b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
                             b'"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "deep": safetensors(b'{"d":' + b"[" * 100),
        "huge_header": struct.pack("<Q", 1 << 60) + b"{}",
    }
    for dtype, size in [("F16", 2), ("I32", 4), ("U16", 2), ("U32", 4), ("I64", 8), ("U64", 8), ("BOOL", 1)]:
        files["type_" + dtype.lower()] = safetensors({"t": info(dtype, [1], 0, size)}, bytes(size))
    return files


# pickles -----------------------------------------------------------------------------------------


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


def text(s):
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def integer(v):
    if 0 <= v < 256:
        return b"K" + bytes([v])
    if 0 <= v < 65536:
        return b"M" + struct.pack("<H", v)
    if -(1 << 31) <= v < 1 << 31:
        return b"J" + struct.pack("<i", v)
    return b"\x8a\x08" + struct.pack("<q", v)


def tup(*items):
    short = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}
    if len(items) in short:
        return b"".join(items) + short[len(items)]
    return b"(" + b"".join(items) + b"t"


def storage(key, numel, kind=glob("torch", "FloatStorage")):
    return tup(text("storage"), kind, text(key), text("cpu"), integer(numel)) + b"Q"


ORDERED_DICT = glob("collections", "OrderedDict") + b")R"


def tensor(store, offset, sizes, strides):
    return (glob("torch._utils", "_rebuild_tensor_v2")
            + tup(store, integer(offset), tup(*map(integer, sizes)), tup(*map(integer, strides)), b"\x89",
                  ORDERED_DICT) + b"R")


def state_dict(items, start=ORDERED_DICT):
    return start + b"(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def pickle(value):
    return b"\x80\x02" + value + b"."


def pickle_files():
    s = storage("0", 6)
    plain = tensor(s, 0, [2, 3], [3, 1])
    untyped = (glob("torch._utils", "_rebuild_tensor_v3")
               + tup(storage("0", 24, glob("torch.storage", "UntypedStorage")), integer(1), tup(integer(2)),
                     tup(integer(1)), b"\x89", ORDERED_DICT, glob("torch", "float32")) + b"R")
    parameter = glob("torch._utils", "_rebuild_parameter") + tup(plain, b"\x88", b"}") + b"R"
    metadata = b"}" + text("_metadata") + ORDERED_DICT + b"sb"
    memo = text("a") + b"q\x00" + plain + b"q\x01" + text("b") + b"r\x02\x00\x00\x00" + b"h\x01"
    return {
        "empty": pickle(b"}"),
        "one": pickle(state_dict({"w": plain})),
        "dict": pickle(state_dict({"w": plain}, b"}")),
        "setitem": pickle(b"}" + text("w") + plain + b"s"),
        "strided": pickle(state_dict({"t": tensor(s, 0, [3, 2], [1, 3]), "e": tensor(s, 5, [3], [0])})),
        "scalar": pickle(state_dict({"s": tensor(s, 5, [], [])})),
        "rank4": pickle(state_dict({"s": tensor(s, 0, [1, 2, 1, 3], [6, 3, 3, 1])})),
        "half": pickle(state_dict({"h": tensor(storage("1", 8, glob("torch", "HalfStorage")), 2, [3], [2])})),
        "untyped": pickle(state_dict({"u": untyped})),
        "parameter": pickle(state_dict({"p": parameter})),
        "nested": pickle(state_dict({"epoch": integer(70000), "state_dict": state_dict({"w": plain}) + metadata})),
        "memo": pickle(ORDERED_DICT + b"(" + memo + b"u"),
        "others": pickle(b"}" + text("x") + b"](NU\x01aG" + bytes(8) + b"\x88\x8f(K\x01\x90esK\x01Ns"),
        "long": pickle(state_dict({"w": tensor(s, 1 << 40, [1 << 40], [1])})),
        "system": pickle(glob("os", "system") + tup(text("true")) + b"R"),
        "protocol4": b"\x80\x04\x95" + bytes(8) + b"}\x94.",
    }


# zip archives ------------------------------------------------------------------------------------


def zip_file(entries, zip64=False, align=64):
    out, directory = b"", b""
    for name, data in entries.items():
        name, at, size = name.encode(), len(out), len(data)
        pad = -(at + 30 + len(name) + 4) % align
        extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        out += struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, 0, size, size, len(name), len(extra))
        out += name + extra + data
        extra = struct.pack("<HHQQQ", 1, 24, size, size, at) if zip64 else b""
        if zip64:
            at = size = 0xFFFFFFFF
        directory += struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 0, 20, 0, 0, 0, 0, 0, size, size, len(name),
                                 len(extra), 0, 0, 0, 0, at) + name + extra
    offset, size, n = len(out), len(directory), len(entries)
    out += directory
    if zip64:
        end64 = len(out)
        out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, n, n, size, offset)
        out += struct.pack("<IIQI", 0x07064B50, 0, end64, 1)
        offset = size = 0xFFFFFFFF
        n = 0xFFFF
    return out + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n, n, size, offset, 0)


def torch_files():
    files = {}
    storages = {"a/data/0": struct.pack("<6f", *range(6)), "a/data/1": bytes(16)}
    for name, data in pickle_files().items():
        files[name] = zip_file({"a/data.pkl": data, **storages}, align=4)
    one = pickle_files()["one"]
    files["zip64"] = zip_file({"a/data.pkl": one, **storages}, zip64=True)
    files["modern"] = zip_file({"a/data.pkl": one, "a/.format_version": b"1", "a/byteorder": b"little", **storages})
    files["script"] = zip_file({"a/data.pkl": one, "a/constants.pkl": b"", **storages})
    files["comment"] = zip_file({"a/data.pkl": one, **storages})[:-2] + b"\x03\x00abc"
    files["legacy"] = bytes.fromhex("80028a0a6cfc9c46f9206aa85019") + b"."
    return files


# indexes -----------------------------------------------------------------------------------------


def index_files():
    return {
        "one": b'{"weight_map":{"a":"model-00001-of-00001.safetensors"}}',
        "metadata": b'{"metadata":{"total_size":123,"x":[null,true,-1,1.5,{"y":"z"}]},"weight_map":{"a":"b","c":"b"}}',
        "outside": b'{"weight_map":{"a":"../b"}}',
        "escape": b'{"weight_map":{"\\u00e9":"\\u002e\\u002e"}}',
        "twice": b'{"weight_map":{"a":"b","a":"c"}}',
        "deep": b'{"metadata":' + b"[" * 100,
        "array": b'{"weight_map":["b"]}',
        "empty": b"{}",
    }


# GGUF --------------------------------------------------------------------------------------------


def u32(v):
    return struct.pack("<I", v)


def u64(v):
    return struct.pack("<Q", v)


def string(s):
    return u64(len(s)) + s.encode()


def key(name, kind, value):
    return string(name) + u32(kind) + value


def array(name, kind, count, elements=b""):
    return key(name, 9, u32(kind) + u64(count) + elements)


def gguf_tensor(name, dims, kind, offset):
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(keys=(), tensors=(), data=b"", align=32, version=3):
    s = b"GGUF" + u32(version) + u64(len(tensors)) + u64(len(keys)) + b"".join(keys) + b"".join(tensors)
    return s + (bytes(-len(s) % align) if data else b"") + data


def gguf_files():
    scalars = [b"\1", b"\1", b"\1\0", b"\1\0", u32(1), u32(1), struct.pack("<f", 1), b"\1", string("x"),
               None, u64(1), u64(1), struct.pack("<d", 1)]
    files = {
        "empty": gguf(),
        "every_type": gguf([key(f"k{i}", i, v) for i, v in enumerate(scalars) if v]),
        "arrays": gguf([array("s", 8, 2, string("a") + string("bc")),
                        array("n", 9, 1, u32(4) + u64(1) + u32(7)),
                        array("f", 6, 2, struct.pack("<ff", 1, 2))]),
        "tensors": gguf([key("general.architecture", 8, string("mamba"))],
                        [gguf_tensor("a", [3, 2], 0, 0), gguf_tensor("b", [4], 1, 32),
                         gguf_tensor("c", [2], 30, 64)], bytes(range(68))),
        "iq4_nl": gguf([], [gguf_tensor("t", [32], 20, 0)], bytes(18)),
        "alignment": gguf([key("general.alignment", 4, u32(64))],
                          [gguf_tensor("a", [1], 0, 0), gguf_tensor("b", [1], 0, 64)], bytes(68), 64),
        "bad_alignment": gguf([key("general.alignment", 4, u32(24))]),
        "huge_count": b"GGUF" + u32(3) + u64(2**64 - 1) + u64(2**63),
        "huge_array": gguf([array("a", 12, 2**61)]),
        "overlap": gguf([], [gguf_tensor("a", [8], 0, 0), gguf_tensor("b", [8], 0, 0)], bytes(64)),
        "hole": gguf([], [gguf_tensor("a", [8], 0, 0), gguf_tensor("b", [8], 0, 64)], bytes(96)),
        "overflow": gguf([], [gguf_tensor("a", [2**31, 2**31, 4], 0, 0)], bytes(4)),
        "overflow_blocks": gguf([], [gguf_tensor("a", [0x7FFD877A24D20000], 8, 0)], bytes(4)),
        "twice": gguf([key("a", 4, u32(1)), key("a", 4, u32(1))]),
        "version2": gguf([key("a", 4, u32(1))], version=2),
        "big_endian": gguf(version=0x03000000),
        "split": gguf([key("split.count", 2, b"\3\0")]),
    }
    blocks = {"q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22), "q5_1": (7, 32, 24),
              "q8_0": (8, 32, 34), "q2_k": (10, 256, 84), "q3_k": (11, 256, 110),
              "q4_k": (12, 256, 144), "q5_k": (13, 256, 176), "q6_k": (14, 256, 210)}
    for name, (kind, elements, size) in blocks.items():
        files[name] = gguf([], [gguf_tensor("t", [elements], kind, 0)], bytes(range(size)))
    return files


if __name__ == "__main__":
    write("safetensors", safetensors_files())
    write("pickle", pickle_files())
    write("torch_bin", torch_files())
    write("index", index_files())
    write("gguf", gguf_files())

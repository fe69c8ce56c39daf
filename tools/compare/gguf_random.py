"""Writes a GGUF of architecture mamba with random weights at a published shape, for llama.cpp.

    gguf_random.py SHAPE f32|f16|bf16|q8_0|q4_0 OUT.gguf

No vocabulary: it can be measured, not talked to. The values keep activations finite (A = -1 .. -16,
softplus(dt bias) = 0.01); every matrix repeats one block of random data, because speed does not depend
on them.
"""

import struct
import sys

import numpy as np

from shapes import SHAPES

D_STATE = 16
D_CONV = 4
ALIGNMENT = 32
#            ggml type, elements and bytes of a block, general.file_type
TYPES = {"f32": (0, 1, 4, 0), "f16": (1, 1, 2, 1), "bf16": (30, 1, 2, 32), "q8_0": (8, 32, 34, 7),
         "q4_0": (2, 32, 18, 2)}
PERIOD_BYTES = 34 * 18 * 32 * 1024   # a multiple of every block's bytes, 20 MB


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key_value(key, value):
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    return string(key) + struct.pack("<II", 4, value)


def metadata(shape, dtype):
    d_inner = 2 * shape.d_model
    sizes = {"context_length": 1 << 20, "embedding_length": shape.d_model, "feed_forward_length": 0,
             "attention.head_count": 0, "block_count": shape.n_layer, "ssm.conv_kernel": D_CONV,
             "ssm.inner_size": d_inner, "ssm.state_size": D_STATE, "ssm.time_step_rank": shape.dt_rank,
             "vocab_size": shape.vocab_rows, "attention.layer_norm_rms_epsilon": 1e-5}
    pairs = [("general.architecture", "mamba"), ("general.file_type", TYPES[dtype][3])]
    pairs += [("mamba." + key, value) for key, value in sizes.items()]
    pairs += [("tokenizer.ggml.model", "no_vocab")]
    return [key_value(k, v) for k, v in pairs]


def tensors(shape, dtype):
    """(name, dimensions with the fastest first, type, what it holds)"""
    d, e, r = shape.d_model, 2 * shape.d_model, shape.dt_rank
    # A row of dt_proj must be whole blocks.
    dt_type = dtype if r % TYPES[dtype][1] == 0 else "f16"
    yield "token_embd.weight", (d, shape.vocab_rows), dtype, "random"
    yield "output_norm.weight", (d,), "f32", "ones"
    for i in range(shape.n_layer):
        p = f"blk.{i}."
        yield p + "attn_norm.weight", (d,), "f32", "ones"
        yield p + "ssm_in.weight", (d, 2 * e), dtype, "random"
        yield p + "ssm_conv1d.weight", (D_CONV, e), "f32", "random"
        yield p + "ssm_conv1d.bias", (e,), "f32", "random"
        yield p + "ssm_x.weight", (e, r + 2 * D_STATE), dtype, "random"
        yield p + "ssm_dt.weight", (r, e), dt_type, "random"
        yield p + "ssm_dt.bias", (e,), "f32", "dt_bias"
        yield p + "ssm_a", (D_STATE, e), "f32", "a"
        yield p + "ssm_d", (e,), "f32", "ones"
        yield p + "ssm_out.weight", (e, d), dtype, "random"


def n_bytes(dimensions, dtype):
    _, elements, size, _ = TYPES[dtype]
    n = 1
    for dim in dimensions:
        n *= dim
    return n // elements * size


def period(dtype):
    """PERIOD_BYTES of random weights with a standard deviation of about 0.02."""
    random = np.random.default_rng(0)
    _, elements, size, _ = TYPES[dtype]
    if elements == 1:
        values = (random.standard_normal(PERIOD_BYTES // size) * 0.02).astype(np.float32)
        if dtype == "f16":
            return values.astype(np.float16).tobytes()
        if dtype == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return values.tobytes()
    blocks = random.integers(0, 256, (PERIOD_BYTES // size, size), dtype=np.uint8)
    scale = np.float16(0.02 / 64 if dtype == "q8_0" else 0.02 / 4)
    blocks[:, 0:2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.tobytes()


def content(kind, size, periods, dtype):
    """Pieces of `size` bytes in all."""
    if kind == "random":
        if dtype not in periods:
            periods[dtype] = period(dtype)
        block = periods[dtype]
        for begin in range(0, size, len(block)):
            yield memoryview(block)[:min(len(block), size - begin)]
        return
    n = size // 4
    values = {"ones": lambda: np.ones(n), "dt_bias": lambda: np.full(n, np.log(np.expm1(0.01))),
              "a": lambda: np.tile(-np.arange(1.0, D_STATE + 1), n // D_STATE)}[kind]()
    yield values.astype(np.float32).tobytes()


def padding(size):
    return bytes(-size % ALIGNMENT)


def write(shape, dtype, path):
    rows = list(tensors(shape, dtype))
    pairs = metadata(shape, dtype)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(pairs)) + b"".join(pairs)
    offset = 0
    for name, dims, kind, _ in rows:
        head += string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        head += struct.pack("<IQ", TYPES[kind][0], offset)
        size = n_bytes(dims, kind)
        offset += size + len(padding(size))
    periods = {}
    with open(path, "wb") as out:
        out.write(head + padding(len(head)))
        for _, dims, kind, what in rows:
            size = n_bytes(dims, kind)
            for piece in content(what, size, periods, kind):
                out.write(piece)
            out.write(padding(size))


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES or sys.argv[2] not in TYPES:
        raise SystemExit(__doc__)
    write(SHAPES[sys.argv[1]], sys.argv[2], sys.argv[3])


if __name__ == "__main__":
    main()

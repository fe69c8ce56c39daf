"""Write random blocks of ggml's quantised formats and their values, for
tests/unit/ggml_blocks_test.cpp.

    pip install gguf safetensors
    python write_golden_blocks.py --out tests/data/golden/gguf/blocks.safetensors

The values are those of the gguf package (gguf.quants.dequantize). Tensors: NAME.blocks u8
[n, bytes], NAME.values f32 [n, elements]. All bytes are random but the halves (scales), which are
finite, some of them zero or subnormal.
"""

import argparse
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from safetensors.numpy import save_file

# Name, and the offsets of its halves.
FORMATS = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
           "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
EDGES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF], dtype=np.uint16)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", required=True)
    a = p.parse_args()
    rng = np.random.default_rng(1)
    tensors = {}
    for name, halves in FORMATS.items():
        elements, size = GGML_QUANT_SIZES[T[name]]
        n = 48 if elements == 32 else 16
        blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
        for at in halves:
            half = rng.normal(0, 0.05, n).astype(np.float16)
            half[:len(EDGES)] = rng.permutation(EDGES).view(np.float16)
            blocks[:, at:at + 2] = half.view(np.uint8).reshape(n, 2)
        tensors[name + ".blocks"] = blocks
        tensors[name + ".values"] = dequantize(blocks, T[name]).reshape(n, elements)
    save_file(tensors, a.out, metadata={"gguf": version("gguf"), "numpy": np.__version__})


if __name__ == "__main__":
    main()

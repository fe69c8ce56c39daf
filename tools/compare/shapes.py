"""The published shapes, as every peer needs them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    name: str          # as `krait bench --random-weights` takes it
    family: str        # mamba1, mamba2 or falcon-mamba
    n_layer: int
    d_model: int
    vocab_size: int
    vocab_rows: int    # with padding
    neox: tuple = ()   # (layers, heads) of the GPT-NeoX of the same width and about the same size (Pythia)

    @property
    def dt_rank(self):
        return (self.d_model + 15) // 16


SHAPES = {s.name: s for s in (
    Shape("130m", "mamba1", 24, 768, 50277, 50280, (12, 12)),
    Shape("370m", "mamba1", 48, 1024, 50277, 50280, (24, 16)),
    Shape("790m", "mamba1", 48, 1536, 50277, 50280),
    Shape("1.4b", "mamba1", 48, 2048, 50277, 50280, (24, 16)),
    Shape("2.8b", "mamba1", 64, 2560, 50277, 50280, (32, 32)),
    Shape("falcon-mamba-7b", "falcon-mamba", 64, 4096, 65024, 65024),
    Shape("mamba2-2.7b", "mamba2", 64, 2560, 50277, 50288),
)}

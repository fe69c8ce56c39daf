"""What is measured, in the order of importance, so that a run that ends early has the rows that count.

A test is one number: a decode step at a batch, a prompt of a length, or a prompt and what is generated
from it. A unit is what one system measures in one go: tests of one shape and kind. The units of a group
(one shape, one kind) follow each other, so that all systems meet the device in the same state.
"""

from dataclasses import dataclass

# Protocols of the figures that krait steers by (README of this folder).
BATCHES = (1, 8, 64, 256)
PROMPTS = (512, 2048, 8192, 32768)
GENERATE = (2048, 128)            # the throughput protocol of the Mamba paper
GENERATE_BATCHES = (64, 1, 16)


@dataclass(frozen=True)
class Test:
    shape: str
    kind: str       # decode, prefill or generate
    batch: int
    n_prompt: int   # 0 for decode: a few tokens to start from don't matter
    n_gen: int

    def tokens(self):
        """What counts: generated tokens, or prompt tokens where none are generated."""
        return self.batch * (self.n_gen if self.n_gen else self.n_prompt)


@dataclass(frozen=True)
class Unit:
    system: str     # "krait:bf16:f32", "mamba_ssm", "llama.cpp:q8_0", ...
    tests: tuple


def tests_of(shape, kind, batches=BATCHES, prompts=PROMPTS, n_gen=128, generate=GENERATE,
             generate_batches=GENERATE_BATCHES):
    if kind == "decode":
        return tuple(Test(shape, kind, b, 0, n_gen) for b in batches)
    if kind == "prefill":
        return tuple(Test(shape, kind, 1, p, 0) for p in prompts)
    return tuple(Test(shape, kind, b, *generate) for b in generate_batches)


# Which systems are in a group's first pass, and which wait until the first passes of all groups before
# them are done. The key is the kind.
FIRST = {
    "decode": ("krait:bf16:f32", "mamba_ssm", "krait:bf16:bf16", "llama.cpp:f16"),
    "prefill": ("krait:bf16:f32", "mamba_ssm", "llama.cpp:f16"),
    "generate": ("krait:bf16:f32", "mamba_ssm", "gpt-neox"),
}
LATER = {
    "decode": ("llama.cpp:q8_0", "llama.cpp:q4_0", "transformers"),
    "prefill": ("transformers", "llama.cpp:q8_0", "llama.cpp:q4_0"),
    "generate": (),
}
FIRST_CPU = {"decode": ("krait:bf16:f32", "llama.cpp:f16", "llama.cpp:q8_0", "llama.cpp:q4_0"),
             "prefill": ("krait:bf16:f32", "llama.cpp:f16", "llama.cpp:q8_0", "llama.cpp:q4_0")}
LATER_CPU = {"decode": ("krait:f32:f32", "transformers"), "prefill": ("krait:f32:f32", "transformers"),
             "generate": ("krait:bf16:f32",)}


def groups(shapes):
    """(shape, kind) pairs: the largest and the smallest of the shapes asked for come first, then the
    paper's protocol, then the others."""
    ends = list(dict.fromkeys(shapes[:2]))
    rest = [s for s in shapes if s not in ends]
    order = [(s, "decode") for s in ends] + [(s, "prefill") for s in ends]
    order += [(ends[0], "generate")] if ends else []
    order += [(s, kind) for s in rest for kind in ("decode", "prefill")]
    return order


def make_plan(shapes, systems, cpu=False, **sizes):
    """Units in the order in which they run. `systems` are the prefixes that are wanted ("krait",
    "llama.cpp:f16", ...)."""
    first, later = (FIRST_CPU, LATER_CPU) if cpu else (FIRST, LATER)

    def wanted(system):
        return any(system == w or system.startswith(w + ":") for w in systems)

    units = []
    pairs = groups(shapes)
    ends = [p for p in pairs if p[0] in shapes[:2]]
    others = [p for p in pairs if p[0] not in shapes[:2]]
    for part in (ends, others):
        for table in (first, later):
            for shape, kind in part:
                tests = tests_of(shape, kind, **sizes)
                units += [Unit(s, tests) for s in table.get(kind, ()) if wanted(s) and tests]
    return units

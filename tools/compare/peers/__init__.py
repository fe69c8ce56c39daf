"""The systems that are compared, one file each.

A peer is a class with
    __init__(system, options)   raises Missing with the reason when it can't run here
    about                       {"version": ...}, what the JSON says of it
    measure(tests)              yields (index, result) for each test of one shape and kind, where result is
                                {"seconds": [...], "tokens": n} or {"error": "one sentence"}, and may carry
                                what else the system knows ("floor_tps", ...)
It runs in a process of its own (worker.py), so that its crash or its memory is nobody else's.
"""


class Missing(Exception):
    """Why a peer can't be measured here, in one sentence."""


def open_peer(system, options):
    name = system.split(":")[0]
    if name == "krait":
        from peers.krait import Krait as Peer
    elif name == "llama.cpp":
        from peers.llama_cpp import LlamaCpp as Peer
    elif name == "mamba_ssm":
        from peers.mamba_ssm_peer import MambaSsm as Peer
    elif name == "transformers":
        from peers.transformers_mamba import TransformersMamba as Peer
    elif name == "gpt-neox":
        from peers.transformers_neox import TransformersNeox as Peer
    else:
        raise Missing(f"no system is called {system}")
    return Peer(system, options)

"""The states of this process's random generators as JSON's types."""

import random

import numpy
import torch


def random_state() -> dict:
    """The generators of Python, numpy, torch and, if there is one, this rank's CUDA device."""
    kind, keys, *rest = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _to_hex(torch.get_rng_state()),
    }
    return state | ({"cuda": _to_hex(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def set_random_state(state: dict) -> None:
    """Continue from what `random_state` returned, also if it went through JSON since."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

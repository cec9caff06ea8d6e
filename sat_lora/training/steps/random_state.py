"""The states of this process's random generators as JSON's types."""

import random

import numpy
import torch


def random_state() -> dict:
    """Return the states of Python, numpy, torch and, if there is one, this rank's CUDA device, as JSON's types."""
    kind, keys, *rest = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _to_hex(torch.get_rng_state()),
    }
    return state | ({"cuda": _to_hex(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def set_random_state(state: dict) -> None:
    """Let the generators go on from what `random_state` returned, also if it went through JSON since.

    Raises ValueError where it is nothing that `random_state` returned; no generator is touched then.
    """
    apply_states(parsed(state))


def parsed(state: dict) -> dict:
    """Return the states as the generators take them, for `apply_states`; no generator is touched.

    Raises ValueError where it is nothing that `random_state` returned.
    """
    try:
        version, internal, gauss = state["python"]
        kind, keys, *rest = state["numpy"]
        states = {
            "python": (version, tuple(internal), gauss),
            "numpy": (kind, numpy.array(keys, dtype=numpy.uint32), *rest),
            "torch": _from_hex(state["torch"]),
        }
        # Generators of their own try them.
        random.Random().setstate(states["python"])
        numpy.random.RandomState().set_state(states["numpy"])
        torch.Generator().set_state(states["torch"])
        return states | ({"cuda": _from_hex(state["cuda"])} if "cuda" in state else {})
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise ValueError(f"no states of random generators: {type(error).__name__}: {error}") from error


def apply_states(states: dict) -> None:
    """Let the generators go on from what `parsed` returned."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

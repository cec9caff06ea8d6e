"""CogVLM as a SAT model: network, checkpoints, text and image processing, generation."""

import importlib

_HOMES = {"CogVLMModel": "network.model", "build_cogvlm": "network.model", "load_cogvlm": "checkpoints.load"}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name when it is first asked for: SAT takes seconds, and the command line needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

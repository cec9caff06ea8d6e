"""Talking to a CogVLM and its adapters: from Python, and in a terminal."""

from typing import Any

__all__ = ["Chat"]


def __getattr__(name: str) -> Any:
    """Import `Chat` when it is first asked for: SAT takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sat_lora.chat.session import Chat

    return Chat

"""Conversations of LLaVA and ShareGPT: {"image": ..., "conversations": [{"from": "human", "value": "<image>..."}]}."""

from collections.abc import Mapping
from typing import Any

from sat_lora.data.records.record import Fields, RecordOptions
from sat_lora.data.records.turns import first_turn, rewrite_turns

WHOSE = "LLaVA/ShareGPT conversations"
NAMES_PLACES = True


def fits(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a list of turns with `from`."""
    turn = first_turn(record)
    return isinstance(turn, dict) and "from" in turn


def rewrite(record: Fields, options: RecordOptions) -> list[Fields]:
    """Return the record with its turns as prompt, answer, history and system. Raises RecordError."""
    return rewrite_turns(record, "from", "value", options)

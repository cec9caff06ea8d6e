"""Messages of OpenAI and others: {"messages": [{"role": "user", "content": TEXT or PARTS}]}; also CogVLM-SFT-311K's."""

from collections.abc import Mapping
from typing import Any

from sat_lora.data.records.record import Fields, RecordOptions
from sat_lora.data.records.turns import first_turn, rewrite_turns

WHOSE = "messages"
NAMES_PLACES = True


def fits(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a list of turns with `role`."""
    turn = first_turn(record)
    return isinstance(turn, dict) and "role" in turn


def rewrite(record: Fields, options: RecordOptions) -> list[Fields]:
    """Return the record with its turns as prompt, answer, history and system. Raises RecordError."""
    return rewrite_turns(record, "role", "content", options)

"""Turns in pairs: {"conversation": [{"human": ..., "assistant": ...}]}, or a list of two texts for each.

Where the first of each two is the name of a role, a list is a turn: ["user", ...], ["assistant", ...].
"""

from collections.abc import Mapping
from typing import Any

from sat_lora.data.records.record import Fields, RecordError
from sat_lora.data.records.turns import NOTES, ROLES, first_turn, turns_key, with_turns

WHOSE = "pairs of turns"
NAMES_PLACES = True


def fits(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a list whose elements hold two turns each."""
    return _pair(first_turn(record)) is not None


def rewrite(record: Fields, mark: str) -> list[Fields]:
    """Return the record with its turns as prompt, answer, history and system. Raises RecordError."""
    key = turns_key(record) or ""
    listed = [element for element in record[key] if isinstance(element, list)]
    if listed == record[key] and all(len(turn) == 2 and _is_role(turn[0]) for turn in listed):
        return [with_turns(record, key, [(ROLES[role.strip().lower()], text) for role, text in listed])]
    turns = []
    for number, element in enumerate(record[key], 1):
        pair = _pair(element)
        if pair is None:
            raise RecordError(f'pair {number} of "{key}" is none of two texts')
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return [with_turns(record, key, turns)]


def _is_role(text: Any) -> bool:
    return isinstance(text, str) and text.strip().lower() in ROLES


def _pair(element: Any) -> tuple[str, str] | None:
    """Return (query, answer) of an element; None if it is no pair."""
    if isinstance(element, dict):
        texts = {ROLES.get(key.lower()): value for key, value in element.items() if key not in NOTES}
        element = [texts.get("user"), texts.get("assistant")] if len(texts) == 2 else None
    if isinstance(element, list) and len(element) == 2 and all(isinstance(text, str) for text in element):
        return element[0], element[1]
    return None

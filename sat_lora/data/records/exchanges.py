"""Turns in pairs: {"conversation": [{"human": ..., "assistant": ...}]}, or a list of two texts for each.

Where the first of each two is the name of a role, a list is a turn: ["user", ...], ["assistant", ...].
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sat_lora.data.records.record import Fields, RecordError, RecordOptions, listed
from sat_lora.data.records.turns import (
    LEARNT_KEYS,
    NOTES,
    ROLES,
    first_turn,
    is_left_out,
    passed_over_by,
    turns_key,
    with_turns,
)

WHOSE = "pairs of turns"
NAMES_PLACES = True


def fits(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a list whose elements hold two turns each."""
    return _pair(first_turn(record)) is not None


def rewrite(record: Fields, options: RecordOptions) -> list[Fields]:
    """Return the record with its turns as prompt, answer, history and system. Raises RecordError."""
    key = turns_key(record) or ""
    lists = [element for element in record[key] if isinstance(element, list)]
    if lists == record[key] and all(len(turn) == 2 and _is_role(turn[0]) for turn in lists):
        return [with_turns(record, key, [(ROLES[role.strip().lower()], text) for role, text in lists])]
    turns = []
    for number, element in enumerate(record[key], 1):
        pair = _pair(element)
        if pair is None:
            raise RecordError(f'pair {number} of "{key}" is none of two texts')
        unknown = _unknown_keys(element, options.ignored)
        if unknown:
            raise RecordError(
                f'pair {number} of "{key}" has {listed(unknown, 5)}, which is not read; {passed_over_by(unknown)}'
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return [with_turns(record, key, turns)]


def _unknown_keys(element: Any, ignored: Collection[str]) -> list[str]:
    entries = element.items() if isinstance(element, dict) else ()
    roles = Counter(ROLES[key.lower()] for key, _ in entries if key.lower() in ROLES)
    return [
        key
        for key, value in entries
        if key not in (*NOTES, *ignored)
        and not is_left_out(value)
        and not (key in LEARNT_KEYS and value == 1)
        and (key.lower() not in ROLES or roles[ROLES[key.lower()]] > 1 or ROLES[key.lower()] == "system")
    ]


def _is_role(text: Any) -> bool:
    return isinstance(text, str) and text.strip().lower() in ROLES


def _pair(element: Any) -> tuple[str, str] | None:
    """Return (query, answer) of an element; None if it is no pair."""
    if isinstance(element, dict):
        texts = {ROLES[key.lower()]: value for key, value in element.items() if key.lower() in ROLES}
        element = [texts.get("user"), texts.get("assistant")]
    if isinstance(element, list) and len(element) == 2 and all(isinstance(text, str) for text in element):
        return element[0], element[1]
    return None

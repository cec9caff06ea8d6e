"""Alpaca's keys: {"instruction": ..., "input": ..., "output": ...}; an input that is not empty ends the prompt."""

from collections.abc import Mapping
from typing import Any

from sat_lora.data.records.record import Fields, RecordOptions

WHOSE = "instructions of Alpaca"
NAMES_PLACES = False


def fits(record: Mapping[str, Any]) -> bool:
    """Return whether a record has an instruction and an output, as texts, and nothing under our own names for them."""
    if "instruction" not in record:
        return False
    texts = (record.get("instruction"), record.get("output"), record.get("input") or "")
    ours = any(record.get(name) is not None for name in ("prompt", "answer"))
    return not ours and all(isinstance(text, str) for text in texts)


def rewrite(record: Fields, options: RecordOptions) -> list[Fields]:
    """Return the record with prompt and answer, in a list."""
    rest = {name: value for name, value in record.items() if name not in ("instruction", "input", "output")}
    prompt = "\n".join(filter(None, (record["instruction"], record.get("input"))))
    return [{**rest, "prompt": prompt, "answer": record["output"]}]

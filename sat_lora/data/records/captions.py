"""Captions of CogVLM-SFT-311K: {"captions": [{"role": "caption", "content": ...}]}, which answer --prompt."""

from collections.abc import Mapping
from typing import Any

from sat_lora.data.records.record import Fields, RecordError, RecordOptions

WHOSE = "captions"
NAMES_PLACES = False


def fits(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a list of captions with `content`."""
    captions = record.get("captions")
    return isinstance(captions, list) and bool(captions) and isinstance(captions[0], dict) and "content" in captions[0]


def rewrite(record: Fields, options: RecordOptions) -> list[Fields]:
    """Return a sample for each caption. Raises RecordError."""
    rest = {name: value for name, value in record.items() if name != "captions"}
    samples = []
    for number, caption in enumerate(record["captions"], 1):
        text = caption.get("content") if isinstance(caption, dict) else None
        if not isinstance(text, str) or caption.get("role", "caption") != "caption":
            raise RecordError(f'caption {number} of "captions" is not {{"role": "caption", "content": ...}}')
        samples.append({**rest, "answer": text})
    return samples

"""The layouts of records, in the order in which they are tried."""

from sat_lora.data.records import alpaca, captions, exchanges, messages, sharegpt, usual
from sat_lora.data.records.record import RecordLayout

USUAL = "prompt-answer"
"""The layout of what no other takes: our own keys."""
RECORDS: dict[str, RecordLayout] = {
    "sharegpt": sharegpt,
    "messages": messages,
    "exchanges": exchanges,
    "captions": captions,
    "alpaca": alpaca,
    USUAL: usual,
}
"""Layouts by the names that --data-format has for them. A new one is a module of this folder and a line here."""

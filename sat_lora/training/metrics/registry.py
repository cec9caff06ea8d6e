"""The metrics of a validation, by the names that --valid-metrics and train.jsonl have for them."""

import pkgutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sat_lora.training.metrics.answers import Metric

LOSS = "loss"
"""The validation loss, which is always measured."""
METRICS: "dict[str, str | Metric]" = {
    "token_accuracy": "sat_lora.training.metrics.accuracy:token_accuracy",
    "answer_accuracy": "sat_lora.training.metrics.accuracy:answer_accuracy",
}
"""Metrics by name: a function, or its place as MODULE:NAME, so that names are known before anything slow is
imported.
"""


def metrics_named(names: Iterable[str]) -> "dict[str, Metric]":
    """Return the functions of those names by name, imported where they have to be. Raises KeyError for another name."""
    metrics = {name: METRICS[name] for name in names}
    return {
        name: pkgutil.resolve_name(metric) if isinstance(metric, str) else metric for name, metric in metrics.items()
    }

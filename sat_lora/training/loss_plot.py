"""loss.png: training loss, its running mean, and validation points."""

import os
from collections.abc import Sequence
from pathlib import Path

SMOOTHING = 0.9  # weight of the past in the running mean
LOG_RANGE = 20  # from this ratio of largest to smallest loss on, the axis is logarithmic


def running_mean(values: Sequence[float], smoothing: float = SMOOTHING) -> list[float]:
    """Exponential running mean, divided by the sum of its weights, so that it starts at the first value."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = smoothing * total + value, smoothing * weight + 1.0
        means.append(total / weight)
    return means


def _points(records: Sequence[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def draw_losses(records: Sequence[dict], path: str | Path) -> None:
    """Write the picture of train.jsonl's records to `path` (a .png); a loss that was not finite is left out."""
    # Figure and canvas by hand: pyplot would keep global state and might ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, valid = _points(records, "loss"), _points(records, "valid_loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="cross-entropy per answer token (nats)")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training")
        axes.plot(steps, running_mean(losses), color="#08519c", linewidth=1.8, label="training, running mean")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="#d94801", markersize=4, linewidth=1, label="validation")
    losses = [loss for _, loss in train + valid]
    if losses and min(losses) > 0 and max(losses) / min(losses) > LOG_RANGE:
        axes.set_yscale("log")
    if losses:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(draft, dpi=120, format="png")
    os.replace(draft, path)

"""loss.png: training loss and what it comes to, validation points with the best marked, and the learning rate."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sat_lora.printable import printable
from sat_lora.terminal.plot_text import families, plot_text
from sat_lora.training.steps.observers import Observer

WINDOW = 25  # points that a smoothed one is made of, at most
SHARE = 15  # and no more than this part of all: the line has to lie on the data
LOG_RANGE = 20  # from this ratio of largest to smallest loss on, the axis is logarithmic
# The largest value and step that are drawn: a log that was edited may hold anything.
LARGEST = 1e100
LAST_STEP = 2**53
TITLE = 90  # characters that a title has room for
TRAINING = "#9ecae1"
SMOOTHED = "#08519c"
VALIDATION = "#d94801"
RATE = "#525252"


def smoothed(values: Sequence[float]) -> list[float]:
    """Return for each value the mean of those around it, as many before as after: of logarithms where all are positive.

    The mean reaches WINDOW values at most, fewer near both ends; a short list comes back as it is. A mean in logarithms
    lies among the values on a logarithmic axis too; one over the past lies above falling ones.
    """
    half = min(WINDOW, len(values) // SHARE) // 2
    if half == 0:
        return list(values)
    positive = all(value > 0 for value in values)
    scaled = [math.log(value) for value in values] if positive else list(values)
    sums = [0.0]
    for value in scaled:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        means.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return [math.exp(mean) for mean in means] if positive else means


def points(records: Sequence[dict], key: str) -> list[tuple[int, float]]:
    """Return the (step, value) of the records that have a finite number under `key`, in their order."""
    values = [(record["step"], record.get(key)) for record in records if 0 <= record["step"] <= LAST_STEP]
    return [(step, value) for step, value in values if isinstance(value, int | float) and abs(value) < LARGEST]


def draw_losses(records: Sequence[dict], path: str | Path, title: str = "") -> None:
    """Write the picture of train.jsonl's records to `path` (a .png); a loss that was not finite is left out.

    title: the run and its base. Raises OSError where the file cannot be written; an older picture is then still there.
    """
    # Figure and canvas by hand: pyplot would keep global state and might ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, valid, rates = (points(records, key) for key in ("loss", "valid_loss", "lr"))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    axes.set_ylabel("loss per answer token (nats)")
    if title:
        axes.set_title(_short(title), loc="left", fontsize=11, fontfamily=families())
    if train:
        steps, losses = zip(*train)
        mean = smoothed(losses)
        if mean != list(losses):
            axes.plot(steps, losses, color=TRAINING, linewidth=0.8, label="training, as logged")
        label = "training" if mean == list(losses) else "training, smoothed"
        axes.plot(steps, mean, ".-" if len(train) == 1 else "-", color=SMOOTHED, linewidth=1.8, label=label)
    if valid:
        axes.plot(*zip(*valid), "o-", color=VALIDATION, markersize=4, linewidth=1, label="validation")
        step, best = min(valid, key=lambda point: point[1])
        style = dict(markersize=11, markerfacecolor="none", markeredgewidth=1.6)
        axes.plot(step, best, "o", color=VALIDATION, label=f"best: {best:.4g} at step {step}", **style)
    all_losses = [loss for _, loss in train + valid]
    if all_losses and min(all_losses) > 0 and max(all_losses) / min(all_losses) > LOG_RANGE:
        axes.set_yscale("log")
    if all_losses:
        axes.legend(frameon=False, fontsize=9)
    below.set(xlabel="optimizer step", ylim=(0, (max((rate for _, rate in rates), default=0) or 1.0) * 1.15))
    below.set_ylabel("learning\nrate", fontsize=9)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    below.tick_params(axis="y", labelsize=8)
    below.yaxis.get_offset_text().set_fontsize(8)
    below.locator_params(axis="y", nbins=2)
    if rates:
        below.plot(*zip(*rates), color=RATE, linewidth=1.2)
    for panel in (axes, below):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(draft, dpi=120, format="png")
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _short(title: str) -> str:
    """Return the title as `plot_text` shows it, its middle left out where it is longer than TITLE characters."""
    title = printable(title)
    if len(title) > TITLE:
        title = f"{title[: TITLE // 2]}...{title[-TITLE // 2 + 3 :]}"
    return plot_text(title)


class LossPicture(Observer):
    """An observer that draws the records so far into the file `path` with every save, in the thread that writes the
    save, and at the end.

    records: returns the records of train.jsonl so far. title: stands above the picture; it may be set later.
    """

    def __init__(self, path: str | Path, records: Callable[[], Sequence[dict]], title: str):
        self.path = Path(path)
        self.title = title
        self.name = self.path.name
        self._records = records

    def on_save(self, step: int, adapter: Path, checkpoint: Path) -> None:
        self._draw()

    def on_end(self, error: BaseException | None) -> None:
        self._draw()

    def _draw(self) -> None:
        """Draw the picture anew, unless there is no record yet."""
        records = list(self._records())  # the loop may add to them meanwhile
        if records:
            draw_losses(records, self.path, self.title)

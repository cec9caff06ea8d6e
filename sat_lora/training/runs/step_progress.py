"""How far a run is: a bar on a terminal, plain lines now and then in a log file."""

import resource
import sys
import time

import torch
from tqdm import tqdm

from sat_lora.terminal.progress import is_terminal, terminal_columns

SECONDS_BETWEEN_LINES = 10.0
FORMATS = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "samples_per_second": "{:.1f} samples/s",
    "mib": "peak {:.0f} MiB",
}


def peak_memory_mib() -> float:
    """Return the most memory in MiB that this process has used: on CUDA what torch allocated, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux


NARROW = 100  # columns, below which a bar would leave no room for figures


class Progress:
    """A display, on standard error, of the steps done of `total_steps`, with figures, samples per second and time left.

    A line on a terminal is never longer than the terminal is wide: of the figures, as many are shown as have room.
    """

    def __init__(self, total_steps: int, start_step: int = 0):
        self.total = total_steps
        self.start = start_step
        self.step = start_step
        self.shown: dict[str, float | None] = {}
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self._bar = None
        if is_terminal(sys.stderr):
            # On a terminal that does not tell its size (0 x 0), tqdm by itself draws nothing.
            size = {"ncols": terminal_columns(), "nrows": 24}
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", mininterval=0.5, **size)
            self._fit(self._bar)

    def advance(self, step: int, shown: dict[str, float | None]) -> None:
        """Show that `step` steps are done.

        shown: figures by their names in FORMATS. They stay until they are replaced; one that is None has no value at
        this step.
        """
        done = step - self.step
        self.step = step
        self.shown.update(shown)
        if self._bar is not None:
            self._fit(self._bar)
            self._bar.update(done)
            return
        now = time.monotonic()
        if (step >= self.total and done) or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"step {step}/{self.total}, {self._time_left(now)} left, {', '.join(self._figures())}")

    def _fit(self, bar: tqdm) -> None:
        """Make the line fit the terminal as wide as it is now."""
        width = terminal_columns()
        bar.ncols = width
        figures = self._figures()
        counted = f"{self.total}/{self.total}"
        if width < NARROW:
            bar.bar_format = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            taken = len(f"{counted} [00:00:00<00:00:00], ")
        else:
            bar.bar_format = None
            taken = len(f"100%|{'#' * 10}| {counted} [00:00:00<00:00:00, 100.00step/s, ]")
        while figures and taken + len(", ".join(figures)) >= width:
            figures.pop()
        bar.postfix = ", ".join(figures)

    def _figures(self) -> list[str]:
        """Return the figures as text, in the order of FORMATS."""
        shown = {name: self.shown[name] for name in FORMATS if name in self.shown}
        return [f"no {name}" if value is None else FORMATS[name].format(value) for name, value in shown.items()]

    def _time_left(self, now: float) -> str:
        """Return the time that the remaining steps take, as text; "?" before the first step."""
        if self.step == self.start:
            return "?"
        per_step = (now - self._began) / (self.step - self.start)
        return tqdm.format_interval(max(0, self.total - self.step) * per_step)

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar, if there is one, as it is."""
        if self._bar is not None:
            self._bar.close()

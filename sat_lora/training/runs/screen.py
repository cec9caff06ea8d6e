"""What a run shows of itself: its progress, and lines above that."""

import contextlib
import sys
from collections.abc import Sequence

from sat_lora.printable import printable, printable_lines
from sat_lora.training.runs.logs.run_logs import RunLog, lowest
from sat_lora.training.runs.step_progress import Progress
from sat_lora.training.steps.observers import Observer, StepReport, ValidationReport

GONE = (OSError, ValueError)  # what writing raises when nobody reads any more, or the disk is full


class Screen(Observer):
    """An observer that shows how far a run is and what happens on the way. It reads from `log` what happened before a
    resumed run, so it stands after the log among the observers.
    """

    name = "the screen"

    def __init__(self, log: RunLog):
        self._log = log
        self._progress: Progress | None = None
        self._best: tuple[int, float] | None = None
        """The (step, loss) of the lowest validation loss so far; None before the first."""
        self._named: set[str] = set()
        """Paths of broken samples whose reason was said."""
        self._skipped: set[tuple[str, ...]] = set()
        """Broken samples that were met, as (path, sample)."""

    def say(self, text: str) -> None:
        """Print lines, above the progress bar if there is one, with what a terminal would obey escaped."""
        text = printable_lines(text)
        with contextlib.suppress(*GONE, AttributeError):  # no stream at all
            if self._progress is not None:
                self._progress.say(text)
            else:
                encoding = sys.stdout.encoding or "utf-8"
                print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def on_start(self, total_steps: int, start_step: int) -> None:
        self._best = lowest(self._log.records)
        self._named = set(self._log.broken)
        self._progress = Progress(total_steps, start_step)

    def on_broken(self, broken: Sequence[tuple[str, ...]], step: int) -> None:
        """Say the reason of each path once, however often it comes up."""
        for path, reason, *sample in broken:
            self._skipped.add((path, *sample))
            if path not in self._named:
                self._named.add(path)
                self.say(f"skipped: {printable(reason)}")

    def on_step(self, report: StepReport) -> None:
        if report.skipped is not None:
            self.say(f"step {report.step} skipped: {report.skipped}")
        if report.loss is None:
            self.say(f"step {report.step}: no loss, none of its samples can be used")
        shown = {"loss": report.loss, "lr": report.lr}
        if report.figures is not None:
            shown |= {"samples_per_second": report.figures.samples_per_second, "mib": report.figures.peak_memory_mib}
        if self._progress is not None:
            with contextlib.suppress(*GONE):
                self._progress.advance(report.step, shown)

    def on_validation(self, report: ValidationReport) -> None:
        step = report.step
        loss = report.loss
        before = self._best
        if loss is None:
            self.say(f"step {step}: no validation loss, none of the validation samples has an answer")
            return
        best = f"best so far {before[1]:.4f} at step {before[0]}" if before else "the first"
        if before and loss < before[1]:
            best = "the best so far"
        if not before or loss < before[1]:
            self._best = lowest([{"step": step, "valid_loss": loss}])
        if report.judged_by != "loss":
            best = f"{'the best so far' if report.is_best else 'not better'} by {printable(report.judged_by)}"
        metrics = "".join(f", {printable(name)} {value:.4f}" for name, value in report.metrics.items())
        self.say(f"step {step}: validation loss {loss:.4f}{metrics}, {best}")

    def on_end(self, error: BaseException | None) -> None:
        """Take the bar off the screen, and say how many samples were skipped, if any were."""
        if self._progress is not None:
            with contextlib.suppress(*GONE):
                self._progress.close()
        self._progress = None
        if self._named:
            count = max(len(self._skipped), len(self._named))  # of a resumed run the paths alone are known
            self.say(f"{count} samples were skipped; train.jsonl names them")
        self._named = set()

"""The run folder: what a run was told, what it went through, and how far it is."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import parse_json, read_bytes
from sat_lora.files.step_folders import LATEST, point_to, remove_all, set_back, steps_in
from sat_lora.printable import printable, printable_lines
from sat_lora.training.runs.loss_plot import draw_losses, points
from sat_lora.training.runs.results import DATA, EVENTS, FOLDERS, LOG, PICTURE, RUN, evaluations_in
from sat_lora.training.runs.run_lock import RunLock
from sat_lora.training.runs.run_logs import AppendedFile, EventFile
from sat_lora.training.runs.step_progress import Progress
from sat_lora.training.settings.config import TrainConfig

PATHS = ("from_pretrained", "local_tokenizer", *DATA, "deepspeed_config", "save")
LOG_LIMIT = 1 << 30  # bytes of a train.jsonl; a line of it has some 200
PACKAGES = ("sat_lora", "torch", "deepspeed", "SwissArmyTransformer", "transformers")


def write_json(path: str | Path, content) -> None:
    """Write `content` as JSON to `path`, by `replace_text`; numbers that are not finite, which it has not, as null."""
    replace_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content):
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunFolder:
    """Writes run.json, train.jsonl, loss.png and tensorboard/, and shows progress; with `is_writer` False, nothing.

    Call `start` once the number of steps is known, then `log_step` and `log_validation` as the loop goes, and `close`
    at the end (or use it as a context manager). Only rank 0 should be the writer. Of the logs, the picture and the
    screen, one that cannot be written is named once, and ends nothing.
    """

    def __init__(self, path: str | Path, *, is_writer: bool, lock: RunLock | None = None):
        self.path, self.is_writer, self.lock = Path(path), is_writer, lock
        self.adapters, self.checkpoints = (self.path / name for name in FOLDERS)
        self.facts: dict[str, Any] = {}
        """What a resumed run has to share with this one: every checkpoint holds it."""
        self._settings: dict | None = None
        self.broken: dict[str, str] = {}
        self.skipped: set[tuple[str, ...]] = set()
        self.records: list[dict] = []
        self.title = self.path.name
        self._is_open = self._was_removed = False
        self._lines: AppendedFile | None = None
        self._events: EventFile | None = None
        self._progress: Progress | None = None
        self._failed: set[str] = set()
        if is_writer:
            self.path.mkdir(parents=True, exist_ok=True)

    def remove_results(self) -> None:
        """Remove what an earlier run has left; what is not a run's own stays."""
        if not self.is_writer:
            return
        for folder in (self.adapters, self.checkpoints):
            remove_all(folder)
        for path in (self.path / RUN, self.path / LOG, *evaluations_in(self.path)):
            path.unlink(missing_ok=True)
        if (self.path / PICTURE).is_file():
            (self.path / PICTURE).unlink()
        self._remove_events()

    def _remove_events(self) -> None:
        if (self.path / EVENTS).is_dir():  # a pipe would be waited for
            shutil.rmtree(self.path / EVENTS)

    def set_back(self, step: int, best_step: int | None) -> None:
        """Let the adapters' pointers say what holds at `step`, which the run goes on from.

        What was saved later, by a run that was cut before its checkpoint was whole, goes with the next save.
        """
        if self.is_writer:
            set_back(self.adapters, step, best_step)

    def go_back_to(self, step: int) -> None:
        """Let `latest` of adapters and checkpoints name an earlier step, where it is there still."""
        for folder in (self.adapters, self.checkpoints):
            if step in steps_in(folder):
                point_to(folder, LATEST, step)

    def check_is_ours(self) -> None:
        """Before a save. AdapterError: another process writes here. A folder that was removed is begun anew."""
        if self.lock is None or self.lock.is_ours:
            return
        self.lock.check()
        if self._settings is not None:
            write_json(self.path / RUN, self._settings)
        self._was_removed = True  # the loop's own thread has the logs: it begins them anew
        self.say(f"{printable(self.path)} was removed while the run wrote to it; it goes on there from this save")

    def write_settings(self, config: TrainConfig, *, world: dict, **more) -> None:
        """run.json: settings (every option and which were given), versions, the world's layout, and whatever else.

        world: for instance {"ranks": 8, "data_parallel_size": 4, "model_parallel_size": 2, "device": "cuda"}.
        OSError: it cannot be written, and the run could not be resumed.
        """
        if not self.is_writer:
            return
        self.title = f"{self.path.name}, of {Path(config.model.base).name}"
        settings = {**_absolute(config.flat()), "run_folder": config.run_folder, "given": sorted(config.given)}
        self._settings = {"settings": settings, "versions": versions(), "world": world, **more}
        write_json(self.path / RUN, self._settings)

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """A block whose failure is told once, as that of `what`, and ends nothing."""
        try:
            yield
        except Exception as error:  # of a picture, by whatever way matplotlib has come to it
            if what not in self._failed:
                self._failed.add(what)
                reason = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else error
                self.say(f"warning: {what} cannot be written: {printable(reason)}; the run goes on without it")

    def start(self, total_steps: int, start_step: int = 0) -> None:
        """Open the logs and show progress. start_step: steps already done; what the logs say beyond it is dropped."""
        if not self.is_writer:
            return
        self._is_open = True
        with self.optional("train.jsonl"):
            self._open_lines(start_step)
        broken = (one for one in self.records if isinstance(one.get("broken"), str))
        self.broken = {one["broken"]: str(one.get("reason")) for one in broken}
        with self.optional("tensorboard"):
            if start_step == 0:
                self._remove_events()
            # What TensorBoard has from after the step that a run goes on from is not of this run.
            self._events = EventFile(self.path / EVENTS, start_step + 1 if start_step else None)
        self._progress = Progress(total_steps, start_step)

    def _reopen_logs(self) -> None:
        """In a folder that was removed and made again: train.jsonl as it was, TensorBoard from here on."""
        self._was_removed = False
        for log in (self._lines, self._events):
            if log is not None:
                with contextlib.suppress(OSError):
                    log.close()
        self._lines = self._events = None
        with self.optional("train.jsonl"):
            self._write_lines(self.records)
        with self.optional("tensorboard"):
            self._events = EventFile(self.path / EVENTS)

    def _open_lines(self, start_step: int) -> None:
        """OSError, ValueError: what is there cannot be read, and is left as it is, or nothing can be written."""
        path, records = self.path / LOG, []
        if start_step and path.exists():
            records = [one for one in read_records(path) if one["step"] <= start_step]
        self.records = records
        self._write_lines(records)

    def _write_lines(self, records: list[dict]) -> None:
        """train.jsonl anew, open for more. OSError: it cannot be written."""
        replace_text(self.path / LOG, "".join(json.dumps(record) + "\n" for record in records))
        self._lines = AppendedFile(self.path / LOG)

    def advance(self, step: int, **shown) -> None:
        """Show that `step` steps are done; `shown` are the figures beside the bar (loss=..., lr=...)."""
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):  # a terminal that has gone, a log on a full disk
                self._progress.advance(step, shown)

    def log_step(
        self,
        step: int,
        *,
        loss: float | None,
        lr: float,
        grad_norm: float | None,
        samples_per_second: float,
        peak_memory_mib: float,
    ) -> None:
        """One line of train.jsonl and the TensorBoard scalars under train/; the first step done is 1.

        loss: None where none of the step's samples could be used; that is null in the line and stands nowhere else.
        grad_norm: before clipping; None where DeepSpeed does not tell it (ZeRO 0 in fp32).
        """
        figures = dict(loss=loss, lr=lr, grad_norm=grad_norm, samples_per_second=samples_per_second)
        more = {"loss": None} if loss is None else {}
        self._record(step, {**figures, "peak_memory_mib": peak_memory_mib}, "train", **more)
        self.advance(step, loss=loss, lr=lr, samples_per_second=samples_per_second, mib=peak_memory_mib)

    def log_validation(self, step: int, valid_loss: float, **more: float) -> None:
        """A validation line of train.jsonl, its TensorBoard scalars and a line on the screen, with the best so far."""
        before = lowest(self.records)
        self._record(step, {"valid_loss": valid_loss, **more}, "valid")
        best = f"best so far {before[1]:.4f} at step {before[0]}" if before else "the first"
        if before and valid_loss < before[1]:
            best = "the best so far"
        self.say(f"step {step}: validation loss {valid_loss:.4f}, {best}")

    def _record(self, step: int, figures: dict, group: str, **more) -> None:
        """more: entries of the line alone."""
        if not self._is_open:
            return
        figures = {name: float(value) for name, value in figures.items() if value is not None}
        # JSON has no NaN or infinity.
        line = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        self._write_line({"step": step} | more | line)
        scalars = {f"{group}/{'loss' if name == 'valid_loss' else name}": value for name, value in figures.items()}
        if self._events is not None:
            with self.optional("tensorboard"):
                self._events.add_scalars(step, scalars)

    def _write_line(self, record: dict) -> None:
        if self._was_removed:
            self._reopen_logs()
        self.records.append(record)
        if self._lines is not None:
            with self.optional("train.jsonl"):
                self._lines.append((json.dumps(record) + "\n").encode())

    def log_skipped(self, step: int, what: str) -> None:
        """A line of train.jsonl and one on the screen for a step that moved nothing; what: how it went wrong."""
        if self._is_open:
            self._write_line({"step": step, "skipped": what})
        self.say(f"step {step} skipped: {what}")

    def report_broken(self, broken: Sequence[tuple[str, ...]], step: int = 0) -> None:
        """Name the path of each (path, reason, sample) once, however often it comes up; `broken` keeps the paths,
        `skipped` the samples. Without a third part the path is the sample.

        Each rank sees only its own: gather the lists of all ranks before handing them to the writer.
        """
        for path, reason, *sample in broken:
            self.skipped.add((path, *sample))
            if path in self.broken:
                continue
            self.broken[path] = reason
            if self._is_open:
                self._write_line({"step": step, "broken": path, "reason": reason})
            self.say(f"skipped: {printable(reason)}")

    def say(self, text: str) -> None:
        """Print lines above the progress bar, on the writer only, with what a terminal would obey escaped."""
        if not self.is_writer:
            return
        text = printable_lines(text)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads any more, or a full disk
            if self._progress is not None:
                self._progress.say(text)
            else:
                encoding = sys.stdout.encoding or "utf-8"
                print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def draw(self) -> None:
        """loss.png, of every record so far; on any thread, one at a time."""
        if self.is_writer and self.records:
            with self.optional("loss.png"):
                draw_losses(list(self.records), self.path / PICTURE, self.title)

    def close(self) -> None:
        """Draw loss.png, say how many images were skipped, and close the logs. A second call does nothing.

        No error comes from here: it would stand before the one that ended the run.
        """
        if not self._is_open:
            return
        if self._was_removed:
            self._reopen_logs()
        self.draw()
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):
                self._progress.close()
        self._progress = None
        if self.broken:
            count = max(len(self.skipped), len(self.broken))  # of a resumed run the paths alone are known
            self.say(f"{count} samples were skipped; train.jsonl names them")
        for what, log in (("train.jsonl", self._lines), ("tensorboard", self._events)):
            if log is not None:
                with self.optional(what):
                    log.close()
        self._is_open = False
        self._lines = self._events = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _absolute(settings: dict) -> dict:
    """The settings with absolute paths, where something lies there: a run may be gone on with from any folder."""

    def absolute(value):
        if isinstance(value, list):
            return [absolute(entry) for entry in value]
        if not isinstance(value, str) or value.startswith("pipe:"):
            return value
        return os.path.abspath(value) if os.path.exists(value) or value.endswith(".tar") else value

    return settings | {name: absolute(settings[name]) for name in PATHS if name in settings}


def lowest(records: list[dict]) -> tuple[int, float] | None:
    """(step, loss) of the lowest validation loss among records; None without any."""
    losses = [(loss, step) for step, loss in points(records, "valid_loss")]
    return min(losses)[::-1] if losses else None


def read_records(path: str | Path) -> list[dict]:
    """The records of a train.jsonl; none if there is no such file. A line that a crash cut short is left out.

    OSError, ValueError: it cannot be read.
    """
    path = Path(path)
    records = []
    for line in read_bytes(path, LOG_LIMIT).split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and type(record.setdefault("step", 0)) is int:
                records.append(record)
    return records

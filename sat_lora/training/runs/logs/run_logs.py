"""train.jsonl, and files like it that a run appends to and can do without: a full disk costs lines, never the run."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import parse_json, read_bytes
from sat_lora.training.runs.logs.loss_plot import points
from sat_lora.training.steps.observers import Observer, StepReport, ValidationReport

LOG_LIMIT = 1 << 30  # bytes of a train.jsonl; a line of it has some 200


class AppendedFile:
    """A file that grows by whole records, opened for appending. Raises OSError where it cannot be opened.

    A record that finds no room is kept and written before the next one; the file never holds a part of a record.
    """

    def __init__(self, path: str | Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is never waited for
        self._descriptor = os.open(path, flags, 0o666)
        self._size = os.fstat(self._descriptor).st_size
        self._waiting = b""

    def append(self, record: bytes) -> None:
        """Write the records that wait, and this one. Raises OSError where there is no room; then all of them wait."""
        self._waiting += record
        written = os.write(self._descriptor, self._waiting)
        if written < len(self._waiting):
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += written
        self._waiting = b""

    def close(self) -> None:
        """Try once more to write the records that wait, then close. Raises OSError where they are lost."""
        try:
            if self._waiting:
                self.append(b"")
        finally:
            os.close(self._descriptor)


class RunLog(Observer):
    """An observer that writes a line of JSON to `path` for each step that is logged or skipped, each validation, and
    each broken path.

    was_removed: whether the file has gone with the run's folder, which was begun anew; the next line brings all back.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        self.records: list[dict[str, Any]] = []
        """Every line as an object, those from before a resumed run's start among them."""
        self.broken: dict[str, str] = {}
        """The reason why samples cannot be used, by their path."""
        self.was_removed = False
        self._lines: AppendedFile | None = None

    def on_start(self, total_steps: int, start_step: int) -> None:
        """Open the file; its lines beyond `start_step` are dropped.

        Raises OSError or ValueError where the file cannot be read, and is left as it is, or nothing can be written.
        """
        records = []
        if start_step and self.path.exists():
            records = [record for record in read_records(self.path) if record["step"] <= start_step]
        self.records = records
        broken = (record for record in records if isinstance(record.get("broken"), str))
        self.broken = {record["broken"]: str(record.get("reason")) for record in broken}
        self._write_anew()

    def on_broken(self, broken: Sequence[tuple[str, ...]], step: int) -> None:
        """Write a line for each path that has none yet, however many samples are of it."""
        new: dict[str, str] = {}
        for path, reason, *_ in broken:
            if path not in self.broken:
                new.setdefault(path, reason)
        self.broken |= new
        self._write([{"step": step, "broken": path, "reason": reason} for path, reason in new.items()])

    def on_step(self, report: StepReport) -> None:
        records: list[dict[str, Any]] = []
        if report.skipped is not None:
            records.append({"step": report.step, "skipped": report.skipped})
        if report.figures is not None:
            lacking = {"loss": None} if report.loss is None else {}
            records.append({"step": report.step} | lacking | _finite(figures_of(report)))
        self._write(records)

    def on_validation(self, report: ValidationReport) -> None:
        if report.loss is not None:
            figures = {"valid_loss": report.loss} | {f"valid_{name}": x for name, x in report.metrics.items()}
            self._write([{"step": report.step} | _finite(figures)])

    def on_end(self, error: BaseException | None) -> None:
        if self.was_removed:
            self._reopen()
        lines = self._lines
        self._lines = None
        if lines is not None:
            lines.close()

    def _write(self, records: list[dict[str, Any]]) -> None:
        """Add lines, all in one piece. Raises OSError where there is no room; they wait for the next ones."""
        if not records:
            return
        if self.was_removed:
            self._reopen()
        self.records += records
        if self._lines is not None:
            self._lines.append("".join(json.dumps(record) + "\n" for record in records).encode())

    def _reopen(self) -> None:
        """Write the file anew in the folder that was begun anew. Raises OSError where it cannot be written."""
        self.was_removed = False
        if self._lines is not None:
            with contextlib.suppress(OSError):
                self._lines.close()
        self._lines = None
        self._write_anew()

    def _write_anew(self) -> None:
        """Write the file with all records, and open it for more. Raises OSError where it cannot be written."""
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._lines = AppendedFile(self.path)


def figures_of(report: StepReport) -> dict[str, float]:
    """Return the numbers of a step that is logged, by name in the order of its line, without those that it lacks."""
    measured = {} if report.figures is None else vars(report.figures)
    figures = {"loss": report.loss, "lr": report.lr, **measured}
    return {name: float(value) for name, value in figures.items() if value is not None}


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Return the figures with None for those that are not finite, since JSON has no NaN or infinity."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def lowest(records: Sequence[dict]) -> tuple[int, float] | None:
    """Return the (step, loss) of the lowest validation loss in records, the first of equal ones; None without any."""
    losses = [(loss, step) for step, loss in points(records, "valid_loss")]
    return min(losses)[::-1] if losses else None


def read_records(path: str | Path) -> list[dict]:
    """Return the records of a train.jsonl; an empty list without such a file. A line that a crash cut short is left
    out.

    Raises OSError or ValueError where the file cannot be read.
    """
    path = Path(path)
    records = []
    for line in read_bytes(path, LOG_LIMIT).split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and type(record.setdefault("step", 0)) is int:
                records.append(record)
    return records

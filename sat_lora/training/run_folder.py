"""The run folder: what a run was told, what it went through, and how far it is."""

import importlib.metadata
import json
import math
import os
import platform
import shutil
from argparse import Namespace
from pathlib import Path

from sat_lora.atomic import replace_text
from sat_lora.step_folders import drop_beyond
from sat_lora.training.loss_plot import draw_losses
from sat_lora.training.progress import Progress

PATHS = ("from_pretrained", "local_tokenizer", "train_data", "valid_data", "test_data", "deepspeed_config", "save")
PACKAGES = ("sat_lora", "torch", "deepspeed", "SwissArmyTransformer", "transformers")


def write_json(path: str | Path, content) -> None:
    """Write `content` as JSON to `path`, by `replace_text`."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


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
    at the end (or use it as a context manager). Only rank 0 should be the writer.
    """

    def __init__(self, path: str | Path, *, is_writer: bool):
        self.path, self.is_writer = Path(path), is_writer
        self.adapters, self.checkpoints = self.path / "adapter", self.path / "checkpoints"
        self.broken: dict[str, str] = {}
        self.records: list[dict] = []
        self._lines = self._events = self._progress = None
        if is_writer:
            self.path.mkdir(parents=True, exist_ok=True)

    def forget_beyond(self, step: int) -> None:
        """Remove adapters and checkpoints of later steps than the one that the run goes on from: they are another's."""
        if self.is_writer:
            for folder in (self.adapters, self.checkpoints):
                drop_beyond(folder, step)

    def write_settings(self, options: Namespace, *, world: dict, **more) -> None:
        """run.json: settings (every option and which were given), versions, the world's layout, and whatever else.

        world: for instance {"ranks": 8, "data_parallel_size": 4, "model_parallel_size": 2, "device": "cuda"}.
        """
        if self.is_writer:
            settings = {**_absolute(vars(options)), "given": sorted(options.given)}
            content = {"settings": settings, "versions": versions(), "world": world, **more}
            write_json(self.path / "run.json", content)

    def start(self, total_steps: int, start_step: int = 0) -> None:
        """Open the logs and show progress. start_step: steps already done; what the logs say beyond it is dropped."""
        if not self.is_writer:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that readers of a folder do without

        self.records = [one for one in read_records(self.path / "train.jsonl") if one.get("step", 0) <= start_step]
        if start_step == 0:
            self.records = []
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self.broken = {one["broken"]: one["reason"] for one in self.records if "broken" in one}
        replace_text(self.path / "train.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        self._lines = open(self.path / "train.jsonl", "a", encoding="utf-8")  # noqa: SIM115  open until close()
        # What TensorBoard has from after the step that a run goes on from is not of this run.
        purge_from = start_step + 1 if start_step else None
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_from)
        self._progress = Progress(total_steps, start_step)

    def advance(self, step: int, **shown) -> None:
        """Show that `step` steps are done; `shown` are the figures beside the bar (loss=..., lr=...)."""
        if self._progress is not None:
            self._progress.advance(step, shown)

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float | None,
        samples_per_second: float,
        peak_memory_mib: float,
    ) -> None:
        """One line of train.jsonl and the TensorBoard scalars under train/; the first step done is 1.

        grad_norm: before clipping; None where DeepSpeed does not tell it (ZeRO 0 in fp32).
        """
        figures = dict(loss=loss, lr=lr, grad_norm=grad_norm, samples_per_second=samples_per_second)
        self._record(step, {**figures, "peak_memory_mib": peak_memory_mib}, "train")
        self.advance(step, loss=loss, lr=lr, samples_per_second=samples_per_second, mib=peak_memory_mib)

    def log_validation(self, step: int, valid_loss: float, **more: float) -> None:
        """A validation line of train.jsonl, its TensorBoard scalars and a line on the screen."""
        self._record(step, {"valid_loss": valid_loss, **more}, "valid")
        self.say(f"step {step}: validation loss {valid_loss:.4f}")

    def _record(self, step: int, figures: dict, group: str) -> None:
        if self._lines is None:
            return
        figures = {name: float(value) for name, value in figures.items() if value is not None}
        # JSON has no NaN or infinity.
        self._write_line({"step": step} | {name: x if math.isfinite(x) else None for name, x in figures.items()})
        for name, value in figures.items():
            self._events.add_scalar(f"{group}/{'loss' if name == 'valid_loss' else name}", value, step)

    def _write_line(self, record: dict) -> None:
        self.records.append(record)
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()

    def log_skipped(self, step: int, what: str) -> None:
        """A line of train.jsonl and one on the screen for a step that moved nothing; what: how it went wrong."""
        if self._lines is not None:
            self._write_line({"step": step, "skipped": what})
        self.say(f"step {step} skipped: {what}")

    def report_broken(self, broken: list[tuple[str, str]], step: int = 0) -> None:
        """Name each (path, reason) once, however often it comes up; `broken` keeps them all.

        Each rank sees only its own: gather the lists of all ranks before handing them to the writer.
        """
        for path, reason in broken:
            if path in self.broken:
                continue
            self.broken[path] = reason
            if self._lines is not None:
                self._write_line({"step": step, "broken": path, "reason": reason})
            self.say(f"skipped: {reason}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the writer only."""
        if not self.is_writer:
            return
        if self._progress is not None:
            self._progress.say(text)
        else:
            print(text, flush=True)

    def draw(self) -> None:
        """loss.png, of every record so far; on any thread, one at a time."""
        if self.is_writer and self.records:
            draw_losses(list(self.records), self.path / "loss.png")

    def close(self) -> None:
        """Draw loss.png, say how many images were skipped, and close the logs. A second call does nothing."""
        if self._lines is None:
            return
        self._progress.close()
        self.draw()
        if self.broken:
            print(f"{len(self.broken)} samples were skipped; train.jsonl names them", flush=True)
        self._lines.close()
        self._events.close()
        self._lines = self._events = self._progress = None

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


def read_records(path: str | Path) -> list[dict]:
    """The records of a train.jsonl; none if there is no such file. A last line that a crash cut short is left out."""
    path = Path(path)
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records

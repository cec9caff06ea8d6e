"""The run folder: what a run was told, what it went through, and how far it is."""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

from sat_lora.files.atomic import replace_text
from sat_lora.files.step_folders import LATEST, point_to, remove_all, set_back, steps_in
from sat_lora.printable import printable
from sat_lora.training.answers.answer_log import AnswerLog, remove_answers
from sat_lora.training.runs.logs.loss_plot import LossPicture
from sat_lora.training.runs.logs.run_logs import RunLog
from sat_lora.training.runs.logs.tensorboard import TensorBoard, remove_events
from sat_lora.training.runs.logs.wandb_log import WandB
from sat_lora.training.runs.results import ANSWERS, DATA, EVENTS, FOLDERS, LOG, PICTURE, RUN, evaluations_in
from sat_lora.training.runs.run_lock import RunLock
from sat_lora.training.runs.screen import Screen
from sat_lora.training.settings.config import NONE, TrainConfig
from sat_lora.training.steps.observers import Observer

PATHS = ("from_pretrained", "local_tokenizer", *DATA, "deepspeed_config", "save")
PACKAGES = ("sat_lora", "torch", "deepspeed", "SwissArmyTransformer", "transformers")


def write_json(path: str | Path, content) -> None:
    """Write `content` as JSON to `path`, by `replace_text`; numbers that are not finite become null, as JSON lacks
    them.
    """
    replace_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content):
    """Return the content with None for numbers that are not finite, and lists for tuples."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on, by the name of the package."""
    versions_by_name = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions_by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions_by_name[name] = "not installed"
    return versions_by_name


class RunFolder:
    """The folder of a run: run.json, its adapters and checkpoints, and the logs, which are observers of the loop.

    With `is_writer` False nothing is written or shown. Only rank 0 should be the writer. lock: the one held on the
    folder; None where nobody locks it. wandb: the mode of W&B, or NONE.
    """

    def __init__(self, path: str | Path, *, is_writer: bool, lock: RunLock | None = None, wandb: str = NONE):
        self.path = Path(path)
        self.is_writer = is_writer
        self.lock = lock
        self.adapters, self.checkpoints = (self.path / name for name in FOLDERS)
        self.facts: dict[str, Any] = {}
        """What a resumed run has to share with this one: every checkpoint holds it."""
        self._settings: dict | None = None
        self.log = RunLog(self.path / LOG)
        self.events = TensorBoard(self.path / EVENTS)
        self.picture = LossPicture(self.path / PICTURE, lambda: self.log.records, self.path.name)
        self.answers = AnswerLog(self.path / ANSWERS)
        self.screen = Screen(self.log)
        self.wandb = None if wandb == NONE else WandB(self.path, wandb, lambda: self._settings or {})
        if is_writer:
            self.path.mkdir(parents=True, exist_ok=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings by name, as run.json has them; none before they are written."""
        return {} if self._settings is None else self._settings["settings"]

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The observers that keep and show the run, in the order in which they hear of it; none without a writer."""
        if not self.is_writer:
            return ()
        elsewhere = () if self.wandb is None else (self.wandb,)
        return (self.log, self.answers, self.events, self.picture, *elsewhere, self.screen)

    def say(self, text: str) -> None:
        """Show lines, see `Screen.say`."""
        if self.is_writer:
            self.screen.say(text)

    def remove_results(self) -> None:
        """Remove the results of an earlier run; what is not a run's own stays. Raises OSError where that fails."""
        if not self.is_writer:
            return
        for folder in (self.adapters, self.checkpoints):
            remove_all(folder)
        for path in (self.path / RUN, self.path / LOG, *evaluations_in(self.path)):
            path.unlink(missing_ok=True)
        if (self.path / PICTURE).is_file():
            (self.path / PICTURE).unlink()
        remove_events(self.path / EVENTS)
        remove_answers(self.path / ANSWERS)

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
        """Make sure, before a save, that no other process writes here; a folder that was removed is begun anew.

        Raises AdapterError where another process has taken the folder.
        """
        if self.lock is None or self.lock.is_ours:
            return
        self.lock.check()
        if self._settings is not None:
            write_json(self.path / RUN, self._settings)
        # The loop's own thread begins them anew.
        self.log.was_removed = True
        self.events.was_removed = True
        self.say(f"{printable(self.path)} was removed while the run wrote to it; it goes on there from this save")

    def write_settings(self, config: TrainConfig, *, world: dict, **more) -> None:
        """Write run.json: settings (every option and which were given), versions, the world's layout, and whatever
        else.

        world: for instance {"ranks": 8, "data_parallel_size": 4, "model_parallel_size": 2, "device": "cuda"}.
        Raises OSError where it cannot be written, and the run could not be resumed.
        """
        if not self.is_writer:
            return
        self.picture.title = f"{self.path.name}, of {Path(config.model.base).name}"
        settings = {**_absolute(config.flat()), "run_folder": config.run_folder, "given": sorted(config.given)}
        self._settings = {"settings": settings, "versions": versions(), "world": world, **more}
        write_json(self.path / RUN, self._settings)


def _absolute(settings: dict) -> dict:
    """Return the settings with absolute paths where something lies at them, so that a run can go on from any folder."""

    def absolute(value):
        if isinstance(value, list):
            return [absolute(entry) for entry in value]
        if not isinstance(value, str) or value.startswith("pipe:"):
            return value
        return os.path.abspath(value) if os.path.exists(value) or value.endswith(".tar") else value

    return settings | {name: absolute(settings[name]) for name in PATHS if name in settings}

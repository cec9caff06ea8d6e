"""What a run, or anyone, has left in a run folder, and why no other run may start there. It needs nothing but Python's
own library, so that a start is refused before anything slow is imported.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sat_lora.files.foreign import read_json
from sat_lora.files.step_folders import LATEST, read_pointer, steps_in
from sat_lora.printable import printable
from sat_lora.training.settings.config import TrainConfig

RUN = "run.json"
LOG = "train.jsonl"
EVALUATION = "evaluation.json"
PREDICTIONS = "predictions"
GALLERY = "evaluation.html"
ANSWERS = "answers"
DATA = ("train_data", "valid_data", "test_data")
FOLDERS = ("adapter", "checkpoints")
PICTURE = "loss.png"
EVENTS = "tensorboard"
EVENTS_BEGIN = 84  # bytes of a TensorBoard file to which no value was added, at most; one value takes 48


def results_in(folder: str | Path) -> list[str]:
    """Return the names of what a run, or anyone, has left in a run folder and would not get back, with the steps of
    adapters and checkpoints.

    The run.json and the logs of a run that has saved nothing and logged no step are no results. Raises OSError where
    the folder cannot be looked at.
    """
    folder = Path(folder)
    results = []
    for name in FOLDERS:
        path = folder / name
        if path.is_dir() and any(path.iterdir()):
            steps = ", ".join(map(str, steps_in(path)))
            results.append(f"{name} ({steps})" if steps else name)
    results += sorted(path.name for path in evaluations_in(folder))
    results += [ANSWERS] * any(path.stem.isdecimal() for path in (folder / ANSWERS).glob("*.jsonl"))
    log = folder / LOG
    if log.exists() and (not log.is_file() or log.stat().st_size):
        results.append(LOG)
    picture = folder / PICTURE
    if picture.is_file() and picture.stat().st_size:
        results.append(PICTURE)
    if any(map(_has_events, (folder / EVENTS).glob("**/*"))):
        results.append(EVENTS)
    if (folder / RUN).exists() and (results or not log.exists()):
        results.append(RUN)
    return results


def _has_events(path: Path) -> bool:
    """Return whether a path is a file that holds more than the beginning of a TensorBoard file."""
    is_ours = path.name.startswith("events.out.tfevents.")
    return path.is_file() and path.stat().st_size > (EVENTS_BEGIN if is_ours else 0)


def evaluations_in(folder: Path) -> list[Path]:
    """Return the files of evaluations in a run folder, their predictions and pages."""
    names = (EVALUATION, f"{PREDICTIONS}.jsonl", GALLERY)
    first = [folder / name for name in names if os.path.lexists(folder / name)]
    numbered = ("evaluation-[0-9]*.json", f"{PREDICTIONS}-[0-9]*.jsonl", "evaluation-[0-9]*.html")
    return [*first, *(file for pattern in numbered for file in folder.glob(pattern))]


def results_problems(config: TrainConfig, *, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Return why a run may not start in its folder, as sentences: it holds the results of another run. There is none
    where the run may start; results of the demo's own are to be replaced then, and named to `say`.
    """
    folder = Path(config.run_folder)
    if config.start.resume or config.start.replay:
        return []
    try:
        results = results_in(folder)
    except OSError as error:
        return [f"--save: {printable(folder)} cannot be looked at: {error.strerror}"]
    if not results or config.start.overwrite:
        return []
    if not config.given & {"from_pretrained", *DATA}:
        own = {name: config.value(name) for name in ("from_pretrained", *DATA)}
        if is_run_of(folder, own):
            say(f"{printable(folder)}: replaces the demo's run there: {printable(', '.join(results))}")
            return []
    free = next(f"{folder.name}-{number}" for number in itertools.count(2) if not results_in(f"{folder}-{number}"))
    can_resume = read_pointer(folder / "checkpoints" / LATEST) is not None
    go_on = f"go on with it (--resume {printable(folder)}), " if can_resume else ""
    return [
        f"--save: {printable(folder)} holds the results of a run: {printable(', '.join(results))}; nothing was "
        f"changed. Start elsewhere (--experiment-name {printable(free)}), {go_on}or remove them (--overwrite)"
        + ("" if can_resume else "; --resume needs a checkpoint, and there is none")
    ]


def is_run_of(folder: str | Path, settings: Mapping[str, object]) -> bool:
    """Return whether the run.json in the folder says that its run had all of these settings."""
    try:
        stored = read_json(Path(folder) / RUN)
    except (OSError, ValueError):
        return False
    stored = stored.get("settings") if isinstance(stored, dict) else None
    return isinstance(stored, dict) and all(stored.get(name) == value for name, value in settings.items())

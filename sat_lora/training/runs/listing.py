"""What the run folders in a folder have come to: for `sat-lora runs`. Reads files alone, and imports no torch."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_lora.files.foreign import parse_json, read_bytes, read_json
from sat_lora.files.step_folders import BEST, LATEST, read_pointer
from sat_lora.printable import printable
from sat_lora.training.metrics.generated import GENERATED, is_code, settled_name
from sat_lora.training.metrics.registry import LOSS
from sat_lora.training.runs.lock_holder import Holder

LOCK_LIMIT = 2**20  # bytes
STATE_LIMIT = 2**26  # bytes of a state.json, of which a rank takes some 30 KB
LINE_LIMIT = 2**16  # bytes of a line of train.jsonl that is looked at


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One run: where it is and what it has come to; None stands for what it does not say.

    state: running, finished, stopped, or what keeps it from being read. step, steps: the last one logged, and those it
    was to take. metric: what its `best` goes by. best_step: of the best validation by that, best_value what it gave,
    valid_loss its loss. score: what the evaluation's first metric, score_metric, gave of base + adapter; exact_match:
    the same of exact matches, in [0, 1]. size: bytes of the folder's files. changed: seconds since 1970.
    """

    folder: str
    state: str
    base: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    metric: str = LOSS
    best_step: int | None = None
    best_value: float | None = None
    valid_loss: float | None = None
    score_metric: str | None = None
    score: float | None = None
    exact_match: float | None = None
    adapter: int | None = None
    size: int = 0
    changed: float = 0.0


def runs_in(root: Path) -> list[RunState]:
    """Return the runs in a folder, and the folder itself if it is one, the one that changed last at the end.

    Raises OSError if the folder cannot be listed.
    """
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    folders = [folder for folder in (root, *(root / name for name in names)) if (folder / "run.json").exists()]
    return sorted(map(read_run, folders), key=lambda run: (run.changed, run.folder))


def read_run(folder: Path) -> RunState:
    """Return what a run folder says. What is broken in it is the run's state, and nothing is raised."""
    size, changed = _size_of(folder)
    try:
        content = read_json(folder / "run.json")
        settings = content["settings"]
        steps = _whole(settings.get("train_iters"))
        base = settings.get("from_pretrained")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return RunState(folder=str(folder), state=f"run.json: {printable(reason)}", size=size, changed=changed)
    step = None
    loss = None
    metric = settings.get("metric") if isinstance(settings.get("metric"), str) else LOSS
    losses: dict[int, float] = {}
    values: dict[int, float] = {}
    for record in _records(folder / "train.jsonl"):
        at = _whole(record.get("step"))
        if at is None:
            continue
        if "loss" in record:
            step = at
            loss = _number(record["loss"])
        value = _number(record.get("valid_loss"))
        if value is not None:
            losses[at] = value
        value = _number(record.get(f"valid_{metric}", record.get(f"valid_{settled_name(metric)}")))
        if value is not None:
            values[at] = value
    best_step = _best_step(values, metric, read_pointer(folder / "adapter" / BEST))
    is_done = step is not None and steps is not None and step >= steps
    is_done = is_done or _has_ended_early(folder, settings)
    evaluation = _content_of(folder / "evaluation.json")
    score_metric, score = _first_score(evaluation)
    return RunState(
        folder=str(folder),
        state="running" if _is_running(folder / "lock") else "finished" if is_done else "stopped",
        base=base if isinstance(base, str) else None,
        step=step,
        steps=steps,
        loss=loss,
        metric=metric,
        best_step=best_step,
        best_value=None if best_step is None else values[best_step],
        valid_loss=None if best_step is None else losses.get(best_step),
        score_metric=score_metric,
        score=score,
        exact_match=_exact_match(evaluation),
        adapter=read_pointer(folder / "adapter" / BEST) or read_pointer(folder / "adapter" / LATEST),
        size=size,
        changed=changed,
    )


def _records(path: Path) -> Iterator[dict]:
    """Yield the objects of a file of lines; a line that is none is passed over, as one cut by a crash."""
    try:
        with open(path, "rb") as lines:
            while line := lines.readline(LINE_LIMIT):
                try:
                    record = parse_json(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record
    except OSError:
        return


def _is_running(lock: Path) -> bool:
    """Return whether a process of this machine that the lock names is alive."""
    try:
        holder = Holder.read(read_bytes(lock, LOCK_LIMIT))
    except (OSError, ValueError):
        return False
    return holder is not None and bool(holder.alive)


def _has_ended_early(folder: Path, settings: dict) -> bool:
    """Return whether --early-stopping has ended the run, by its newest checkpoint."""
    most = _whole(settings.get("early_stopping")) or 0
    step = read_pointer(folder / "checkpoints" / LATEST) if most > 0 else None
    if step is None:
        return False
    try:
        state = read_json(folder / "checkpoints" / str(step) / "state.json", limit=STATE_LIMIT)
        return (_whole(state.get("not_better")) or 0) >= most
    except (OSError, ValueError, AttributeError):
        return False


def _best_step(values: Mapping[int, float], metric: str, named: int | None) -> int | None:
    """Return the step of the best validation: the one that `best` names; else the first of the best values.

    Whether less is better is nothing that a metric of the user's says without its code, which a listing does not run.
    """
    if named in values:
        return named
    if is_code(metric):
        return None
    known = GENERATED.get(settled_name(metric))
    is_lower_better = metric == LOSS or (known is not None and known.lower_is_better)
    sign = 1 if is_lower_better else -1
    return min(values, key=lambda step: sign * values[step], default=None)


def _content_of(path: Path) -> object:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _first_score(result: Any) -> tuple[str | None, float | None]:
    """Return (the metric that stands first in an evaluation's result, its value of base + adapter or of the base)."""
    try:
        name, sides = next(iter(result["metrics"].items()))
        score = _number(sides.get("adapter", sides.get("base"))["value"])
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration):
        score = _exact_match(result)  # of a version that had no others
        name = "exact-match"
    return (None, None) if score is None else (name, score)


def _exact_match(result: Any) -> float | None:
    try:
        return _number(result.get("adapter", result["base"])["exact_match"])
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def _size_of(folder: Path) -> tuple[int, float]:
    """Return the bytes of a folder's files and when one of them changed last; links are not followed."""
    size = 0
    changed = 0.0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(place, name))
            except OSError:  # a run that goes on removes files
                continue
            size += status.st_size
            changed = max(changed, status.st_mtime)
    return size, changed


def as_json(runs: list[RunState]) -> str:
    """Return the runs as a json list of objects."""
    return json.dumps([vars(run) for run in runs], ensure_ascii=False, indent=1)

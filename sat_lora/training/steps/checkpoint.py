"""What a run needs to go on where it stopped, in a form that no parallel layout owns. The base is not in it.

FOLDER/<step>/optimizer.safetensors   `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`: whole tensors in float32
FOLDER/<step>/state.json              steps done and taken, the layout, the samples of a step, the best validation loss,
                                      fp16's loss scale, the random states of every rank; and under `run` what a resumed
                                      run has to share with it, see `resume`
FOLDER/latest                         the step that is whole
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from sat_lora.adapters.read import tensor_problems
from sat_lora.adapters.save_load import Copy, on_the_cpu
from sat_lora.errors import CheckpointError
from sat_lora.files.atomic import replaced_folder
from sat_lora.files.foreign import MEBIBYTE, read_json, stand_in
from sat_lora.files.step_folders import LATEST, point_to, read_pointer, steps_in
from sat_lora.parallel.distributed import World, gather_lists
from sat_lora.printable import printable
from sat_lora.training.settings.config import Schedule
from sat_lora.training.steps.optimizer_state import (
    optimizer_shapes,
    optimizer_tensors,
    set_optimizer_tensors,
    steps_taken,
)
from sat_lora.training.steps.random_state import apply_states, parsed, random_state

TENSORS = "optimizer.safetensors"
STATE = "state.json"
STATE_LIMIT = 512 * MEBIBYTE  # the random states take some 30 KB per rank
MOST = 2**53  # the largest count: what JSON's numbers hold everywhere
# What DeepSpeed's DynamicLossScaler goes on from.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclasses.dataclass(kw_only=True)
class RunState:
    """How far a run is."""

    step: int = 0  # steps done, skipped ones included: the place in the data and in the schedule
    skipped: int = 0  # of them, steps that moved nothing because a value was not finite
    best_loss: float | None = None  # lowest validation loss, of those that are finite
    best_step: int | None = None  # where it was measured, and saved
    best_value: float | None = None  # the same of the metric that `best` goes by, where that is not the loss
    not_better: int = 0  # validations since the best
    good_step: int | None = None  # the newest save whose next step was finite: it can be gone on from
    owes_validation: bool = False  # it was due after the last step, but the run was told to stop


def samples_per_step(schedule: Schedule, data_parallel_size: int) -> int:
    """Return how many samples an optimizer step takes, over all ranks."""
    return schedule.batch_size * schedule.gradient_accumulation_steps * data_parallel_size


@dataclasses.dataclass(frozen=True)
class GatheredCheckpoint:
    """What `save_checkpoint` writes: copies, so that the run can go on meanwhile."""

    step: int
    """Steps done."""
    tensors: dict[str, torch.Tensor]
    """The content of optimizer.safetensors, in float32; empty on every rank but 0."""
    content: dict
    """The content of state.json."""


def gather_checkpoint(
    engine,
    state: RunState,
    world: World,
    samples: int,
    copy: Copy = on_the_cpu,
    *,
    run: Mapping[str, object] | None = None,
) -> GatheredCheckpoint:
    """Return the checkpoint of this moment, complete on rank 0. Every rank has to call it.

    samples: how many a step takes, over all ranks. copy: copies a tensor, which the optimizer goes on to change.
    run: what a resumed run has to share with this one, as JSON's types.
    """
    tensors = {}
    for name, tensor in optimizer_tensors(engine):
        if world.is_main:
            tensors[name] = copy(tensor.float())
    content = {
        **dataclasses.asdict(state),
        "steps_taken": steps_taken(engine),
        "samples_per_step": samples,
        "layout": _layout(world),
        "loss_scale": _loss_scale(engine),
        "random": gather_lists([random_state()]),
        "run": dict(run or {}),
    }
    return GatheredCheckpoint(state.step, tensors, content)


def load_checkpoint(engine, folder: Path, world: World) -> RunState:
    """Let the engine continue from the newest checkpoint in `folder`; return how far its run was. Every rank has to
    call it.

    In another layout the random states are not there for every rank: those that --seed gave stay in use, and
    dropout differs from that of the run before.
    Raises CheckpointError where there is no checkpoint, or it cannot be read or does not fit the model, which is left
    as it was then.
    """
    folder = newest_checkpoint(folder)
    content = read_state(folder)
    try:
        with safetensors.safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    # safetensors 0.8 meets a dtype that torch or its own binding lacks with whatever comes first.
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = stand_in(folder / TENSORS) or printable(error)
        raise CheckpointError(f"--resume: {folder / TENSORS}: cannot be read: {reason}") from error
    problems = sorted(tensor_problems(tensors, optimizer_shapes(engine.module)))
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise CheckpointError(f"--resume: {folder} does not fit the model, {count}:\n  " + "\n  ".join(problems[:20]))
    random_states = None
    if content["layout"] == _layout(world):
        try:
            random_states = parsed(content["random"][world.rank])
        except ValueError as error:
            raise CheckpointError(f"--resume: {folder / STATE}: of rank {world.rank}: {printable(error)}") from error
    set_optimizer_tensors(engine, tensors, content["steps_taken"])
    for name in _loss_scale(engine).keys() & content["loss_scale"].keys():
        setattr(engine.optimizer.loss_scaler, name, content["loss_scale"][name])
    if random_states is not None:
        apply_states(random_states)
    return RunState(**{field.name: content[field.name] for field in dataclasses.fields(RunState)})


def newest_checkpoint(folder: Path) -> Path:
    """Return the folder of the newest whole checkpoint. Raises CheckpointError where there is none."""
    step = read_pointer(folder / LATEST)
    if step is None:
        there = ", ".join(map(str, steps_in(folder)))
        hint = "was --save-interval reached? A new run starts elsewhere, or there with --overwrite"
        raise CheckpointError(
            f"--resume: {printable(folder)} holds no checkpoint (no `latest` that names one)"
            + (f"; it has {there}: write one of them into `latest`" if there else f"; {hint}")
        )
    return folder / str(step)


def read_state(folder: Path) -> dict:
    """Return the state.json of one checkpoint, every value of the type it should have; what older versions lack is None
    or empty.

    Raises CheckpointError where it cannot be read, or says what cannot be; all of it in one message.
    """
    path = folder / STATE
    try:
        content = read_json(path, limit=STATE_LIMIT)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--resume: {printable(path)}: cannot be read: {printable(error)}") from error
    problems = [*_problems_with_state(content, int(folder.name))]
    if problems:
        raise CheckpointError(f"--resume: {printable(path)}: cannot be used: {'; '.join(problems)}")
    content = {"best_step": None, "best_value": None, "not_better": 0, "good_step": None, "run": {}, **content}
    if content["best_loss"] is not None and not math.isfinite(content["best_loss"]):
        content["best_loss"] = None  # of versions that took the first validation for the best, whatever it gave
    return content


def _problems_with_state(content, step: int) -> Iterator[str]:
    """Yield what is wrong with the content of a state.json of that step, each as a clause that names the entry."""
    if not isinstance(content, dict):
        yield f"wanted an object, got {_shown(content)}"
        return
    checks = {
        "step": (f"{step}, as its folder is called", lambda value: type(value) is int and value == step),
        "skipped": ("a number of steps", lambda value: _is_count(value, step)),
        "steps_taken": (f"a number of steps up to {step}", lambda value: _is_count(value, step)),
        "samples_per_step": ("a whole number above 0", lambda value: _is_count(value) and value > 0),
        "best_loss": ("a number or null", lambda value: value is None or _is_number(value)),
        "owes_validation": ("true or false", lambda value: isinstance(value, bool)),
        "layout": ("two numbers of ranks", _is_layout),
        "loss_scale": ("numbers by name", _are_numbers),
        "random": ("the random states of every rank", lambda value: _are_objects(value, content.get("layout"))),
    }
    later = {
        "best_step": ("a step or null", lambda value: value is None or _is_count(value, step)),
        "best_value": ("a number or null", lambda value: value is None or _is_finite(value)),
        "not_better": ("a number of validations", _is_count),
        "good_step": ("a step or null", lambda value: value is None or _is_count(value, step)),
        "run": ("an object", lambda value: isinstance(value, dict)),
    }
    for name, (wanted, is_right) in {**checks, **later}.items():
        if name not in content:
            if name in checks:
                yield f"{name} is missing"
        elif not is_right(content[name]):
            yield f"{name}: wanted {wanted}, got {_shown(content[name])}"


def _is_count(value, most: int = MOST) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_number(value) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= MOST)


def _is_finite(value) -> bool:
    return _is_number(value) and math.isfinite(value)


def _are_numbers(value) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_layout(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(ranks, 2**20) and ranks for ranks in value)


def _are_objects(value, layout) -> bool:
    """Return whether a value is a list of objects, one for each rank of the layout if that is one."""
    is_list = isinstance(value, list) and all(isinstance(state, dict) for state in value)
    return is_list and (not _is_layout(layout) or len(value) == layout[0] * layout[1])


def _shown(value) -> str:
    """Return a JSON value as text for a message, cut where it is long."""
    text = printable(json.dumps(value))
    return text if len(text) <= 60 else text[:60] + "..."


def save_checkpoint(folder: Path, checkpoint: GatheredCheckpoint) -> None:
    """Write FOLDER/<step> from what rank 0 gathered, and let `latest` name it; it needs no other rank.

    Raises CheckpointError where it could not be written.
    """
    step = checkpoint.step
    try:
        with replaced_folder(folder / str(step)) as draft:
            save_file(dict(sorted(checkpoint.tensors.items())), draft / TENSORS)
            (draft / STATE).write_text(json.dumps(checkpoint.content, allow_nan=False), encoding="utf-8")
        point_to(folder, LATEST, step)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / str(step)}: the checkpoint could not be written: {error}") from error


def _layout(world: World) -> list[int]:
    """Return [data-parallel ranks, model-parallel ranks]."""
    return [world.data_parallel_size, world.size // world.data_parallel_size]


def _loss_scale(engine) -> dict:
    """Return the state of fp16's loss scale by LOSS_SCALE's names; empty without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}

"""What a run needs to go on where it stopped, in a form that no parallel layout owns. The base is not in it.

FOLDER/<step>/optimizer.safetensors   `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`: whole tensors in float32
FOLDER/<step>/state.json              steps done and taken, the layout, the samples of a step, the best validation loss,
                                      fp16's loss scale, the random states of every rank
FOLDER/latest                         the step that is whole
"""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from sat_lora.adapter_file import Copy, on_the_cpu
from sat_lora.adapter_format import tensor_problems
from sat_lora.atomic import replaced_folder
from sat_lora.errors import CheckpointError
from sat_lora.step_folders import LATEST, keep_newest, point_to, read_pointer
from sat_lora.training.distributed import World, gather_lists, together
from sat_lora.training.optimizer_state import (
    optimizer_shapes,
    optimizer_tensors,
    set_optimizer_tensors,
    steps_taken,
)
from sat_lora.training.random_state import random_state, set_random_state

TENSORS, STATE = "optimizer.safetensors", "state.json"
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler


@dataclasses.dataclass(kw_only=True)
class RunState:
    """How far a run is."""

    step: int = 0  # steps done, skipped ones included: the place in the data and in the schedule
    skipped: int = 0  # of them, steps that moved nothing because a value was not finite
    best_loss: float | None = None  # lowest validation loss
    owes_validation: bool = False  # it was due after the last step, but the run was told to stop


def samples_per_step(options: Namespace, data_parallel_size: int) -> int:
    return options.batch_size * options.gradient_accumulation_steps * data_parallel_size


@dataclasses.dataclass(frozen=True)
class GatheredCheckpoint:
    """What `write_checkpoint` writes: copies, so that the run can go on meanwhile."""

    step: int
    tensors: dict[str, torch.Tensor]
    content: dict


def save_checkpoint(engine, folder: Path, state: RunState, world: World, samples: int) -> None:
    """Write FOLDER/<step> and let `latest` name it; older ones go afterwards. Every rank has to call it.

    samples: of one step, over all ranks. CheckpointError, on every rank: it could not be written.
    """
    gathered = gather_checkpoint(engine, state, world, samples)
    together(lambda: write_checkpoint(folder, gathered) if world.is_main else None)


def gather_checkpoint(
    engine, state: RunState, world: World, samples: int, copy: Copy = on_the_cpu
) -> GatheredCheckpoint:
    """The checkpoint of this moment, complete on rank 0. Every rank has to call it.

    copy: makes a copy of a tensor, which the optimizer goes on to change.
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
    }
    return GatheredCheckpoint(state.step, tensors, content)


def load_checkpoint(engine, folder: Path, world: World) -> RunState:
    """Continue from the newest checkpoint in `folder`. Every rank has to call it.

    In another layout the random states are not there for every rank: those that `options.seed` gave stay in use, and
    dropout differs from that of the run before. CheckpointError: there is none, or it does not fit the model; then the
    model is left as it was.
    """
    folder = newest_checkpoint(folder)
    content = read_state(folder)
    try:
        with safetensors.safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"--resume: {folder / TENSORS}: cannot be read: {error}") from error
    problems = sorted(tensor_problems(tensors, optimizer_shapes(engine.module)))
    if problems:
        raise CheckpointError(
            f"--resume: {folder} does not fit the model, {len(problems)} problems:\n  " + "\n  ".join(problems[:20])
        )
    set_optimizer_tensors(engine, tensors, content["steps_taken"])
    for name in _loss_scale(engine).keys() & content["loss_scale"].keys():
        setattr(engine.optimizer.loss_scaler, name, content["loss_scale"][name])
    if content["layout"] == _layout(world):
        set_random_state(content["random"][world.rank])
    return RunState(**{field.name: content[field.name] for field in dataclasses.fields(RunState)})


def newest_checkpoint(folder: Path) -> Path:
    """The folder of the newest whole checkpoint; CheckpointError if there is none."""
    step = read_pointer(folder / LATEST)
    if step is None:
        raise CheckpointError(
            f"--resume: {folder} holds no checkpoint (no `latest` that names one); was --save-interval reached?"
        )
    return folder / str(step)


def read_state(folder: Path) -> dict:
    """state.json of one checkpoint; CheckpointError if it cannot be read."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--resume: {folder / STATE}: cannot be read: {error}") from error


def write_checkpoint(folder: Path, checkpoint: GatheredCheckpoint) -> None:
    """Write what rank 0 gathered; it needs no other rank. CheckpointError: it could not be written."""
    step = checkpoint.step
    try:
        with replaced_folder(folder / str(step)) as draft:
            save_file(dict(sorted(checkpoint.tensors.items())), draft / TENSORS)
            (draft / STATE).write_text(json.dumps(checkpoint.content), encoding="utf-8")
        point_to(folder, LATEST, step)
        keep_newest(folder, 1)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / str(step)}: the checkpoint could not be written: {error}") from error


def _layout(world: World) -> list[int]:
    return [world.data_parallel_size, world.size // world.data_parallel_size]


def _loss_scale(engine) -> dict:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}

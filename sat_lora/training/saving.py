"""The saves of a run after a step: the adapter, and the checkpoint to resume from, written while the steps go on."""

import threading
from collections.abc import Callable
from functools import partial

import torch

from sat_lora.adapters.format import SavedAdapter
from sat_lora.adapters.save_load import gather_adapter, write_gathered
from sat_lora.errors import AdapterError
from sat_lora.files.host_copies import HostCopies
from sat_lora.files.step_folders import BEST, LATEST, point_to, prune, read_pointer, steps_in
from sat_lora.parallel.distributed import World, run_on_all_ranks
from sat_lora.training.runs.card_sections import sections_of_run
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.checkpoint import (
    GatheredCheckpoint,
    RunState,
    gather_checkpoint,
    save_checkpoint,
)
from sat_lora.training.steps.observers import NOBODY, Observers


class BackgroundWriter:
    """A thread that does one job at a time. Leaving the context waits for the last one."""

    def __init__(self):
        self.copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a job has ended with an error that nobody has heard of yet."""
        return self._error is not None

    def start(self, job: Callable[[], None]) -> None:
        """Let the thread do a job. The one before it has to have been waited for."""
        self._thread = threading.Thread(target=self._run, args=(job,), name="sat_lora writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the job is done. Raises the error that it ended with, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        """Do the job in the thread, and keep the error that it ends with."""
        try:
            job()
        except BaseException as error:  # `wait` raises it
            self._error = error

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *error) -> None:
        if self._thread is not None:
            self._thread.join()


def start_saving(
    engine,
    run: RunFolder,
    world: World,
    state: RunState,
    writer: BackgroundWriter,
    observers: Observers = NOBODY,
    *,
    step_samples: int,
    keep: int,
) -> None:
    """Begin to write RUN/adapter/<step> and RUN/checkpoints/<step>, then their pointers. Every rank has to call it.

    It returns when rank 0 has copies in host memory, which its writer then writes. `keep` adapters are kept, the best,
    and that of state.good_step, whose checkpoint is kept beside the new one. observers: are told by the writer, once
    the save is on the disk. step_samples: those of a step, over all ranks. Raises AdapterError or CheckpointError, on
    every rank, where the save before this one could not be written.
    """
    finish_saving(writer)
    writer.copies.clear()
    copy = writer.copies.copy if world.is_main else _shape_alone
    adapter = gather_adapter(engine.module, run.adapters / str(state.step), copy=copy)
    facts = {**run.facts, "base": base_as_json(adapter)}
    checkpoint = gather_checkpoint(engine, state, world, step_samples, copy, run=facts)
    if world.is_main:
        writer.copies.wait()
        writer.start(partial(write_save, run, adapter, checkpoint, keep, observers))


def base_as_json(adapter: SavedAdapter) -> dict:
    """Return the base that an adapter was trained on, as a checkpoint's `run` has it and `base_of_state` reads it."""
    return {"fingerprint": adapter.base_fingerprint, **(adapter.base.to_dict() if adapter.base else {})}


def finish_saving(writer: BackgroundWriter) -> None:
    """Wait until the last save is on the disk. Every rank has to call it.

    Raises AdapterError or CheckpointError, on every rank, where it could not be written.
    """
    run_on_all_ranks(writer.wait)


def _shape_alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape without values, as the copy of a rank that writes nothing."""
    return tensor.to("meta")


def write_save(
    run: RunFolder,
    adapter: SavedAdapter,
    checkpoint: GatheredCheckpoint,
    keep: int,
    observers: Observers = NOBODY,
) -> None:
    """Write a save, on rank 0. Raises AdapterError or CheckpointError where it could not be written.

    The checkpoint's own pointer makes a save count: before it moves, the save before this one is there as it was, and
    afterwards a resumed run moves the pointers of the adapters if this run could not. Old saves go at the very end. So
    there is an adapter to load and, once a save has ended, a checkpoint to go on from, whenever the process dies.
    """
    run.check_is_ours()
    step = checkpoint.step
    best = checkpoint.content["best_step"]
    good = checkpoint.content["good_step"]
    write_gathered(run.adapters / str(step), adapter, sections_of_run(run.settings, checkpoint.content))
    try:
        if read_pointer(run.adapters / LATEST) is None:
            point_to(run.adapters, LATEST, step)
    except OSError as error:
        raise AdapterError(f"{run.adapters}: its pointers could not be written: {error}") from error
    save_checkpoint(run.checkpoints, checkpoint)
    try:
        point_to(run.adapters, LATEST, step)
        point_to(run.adapters, BEST, best if best in steps_in(run.adapters) else None)
        prune(run.adapters, newest=step, keep=keep, also={good})
        prune(run.checkpoints, newest=step, keep=1, also={good})
    except OSError as error:
        raise AdapterError(f"{run.path}: its pointers could not be written, or what is old removed: {error}") from error
    observers.on_save(step, run.adapters / str(step), run.checkpoints / str(step))

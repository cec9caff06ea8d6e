"""What a run saves after a step: the adapter, and the checkpoint to resume from."""

from argparse import Namespace

from sat_lora.adapter_file import save_adapter
from sat_lora.errors import AdapterError
from sat_lora.step_folders import BEST, LATEST, keep_newest, point_to
from sat_lora.training.checkpoint import RunState, samples_per_step, save_checkpoint
from sat_lora.training.distributed import World, together
from sat_lora.training.run_folder import RunFolder


def save_run(engine, options: Namespace, run: RunFolder, world: World, state: RunState, *, is_best: bool) -> None:
    """RUN/adapter/<step> with its pointers, then RUN/checkpoints/<step>. Every rank has to call it.

    options.keep adapters are kept, and the best.
    """
    folder = run.adapters
    save_adapter(engine.module, folder / str(state.step))
    together(_point, run, state.step, (LATEST, BEST) if is_best else (LATEST,), options.keep)
    samples = samples_per_step(options, world.data_parallel_size)
    save_checkpoint(engine, run.checkpoints, state, world, samples)
    run.draw()


def _point(run: RunFolder, step: int, pointers: tuple[str, ...], keep: int) -> None:
    if not run.is_writer:
        return
    try:
        for pointer in pointers:
            point_to(run.adapters, pointer, step)
        keep_newest(run.adapters, keep)
    except OSError as error:
        raise AdapterError(f"{run.adapters}: its pointers could not be written: {error}") from error

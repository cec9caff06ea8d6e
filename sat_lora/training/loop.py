"""The training loop over a DeepSpeed engine."""

import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from sat_lora.adapter_file import save_adapter
from sat_lora.training.checkpoint import save_checkpoint
from sat_lora.training.distributed import World
from sat_lora.training.run_folder import RunFolder
from sat_lora.training.schedule import learning_rate_factor
from sat_lora.training.step import train_step, validation_loss


def train(engine, loader: Iterable[dict], valid: Iterable[dict] | None, options, run: RunFolder, world: World, done: int):
    """From step `done` to `options.train_iters`; writes adapters, checkpoints, records and the picture on the way.

    `loader` yields micro-batches without end, from where step `done` left off.
    """
    engine.train()
    batches = iter(loader)
    warmup = options.warmup if options.warmup >= 1 else round(options.warmup * options.train_iters)
    accumulate = options.gradient_accumulation_steps
    per_step = options.batch_size * accumulate * world.data_parallel_size
    clock = time.perf_counter()
    for step in range(done, options.train_iters):
        factor = learning_rate_factor(
            step, total_steps=options.train_iters, warmup_steps=int(warmup), style=options.lr_decay_style
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = options.lr * factor
        micro_batches = list(itertools.islice(batches, accumulate))
        for batch in micro_batches:
            run.report_broken(batch["broken"])
        loss = train_step(engine, micro_batches, world)
        now = time.perf_counter()
        norm = engine.get_global_grad_norm()
        run.log_step(
            step + 1,
            loss=loss,
            lr=options.lr * factor,
            grad_norm=None if norm is None else float(norm),
            samples_per_second=per_step / (now - clock),
            peak_memory_mib=peak_memory_mib(world.device),
        )
        clock = now
        last = step + 1 == options.train_iters
        if valid is not None and (last or _due(step + 1, options.eval_interval)):
            run.log_validation(step + 1, validation_loss(engine, itertools.islice(valid, options.eval_iters), world))
            clock = time.perf_counter()
        if last or _due(step + 1, options.save_interval):
            save_adapter(engine.module, run.path / "adapter")
            save_checkpoint(engine, Path(run.path / "checkpoints"), step + 1)
            run.plot()
            clock = time.perf_counter()


def _due(step: int, interval: int | None) -> bool:
    return bool(interval) and step % interval == 0


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has held: on the device with CUDA, resident in the host without. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

"""The training loop over a DeepSpeed engine."""

import itertools
import time
from argparse import Namespace
from collections.abc import Iterable

from sat_lora.adapter_file import save_adapter
from sat_lora.optimizer_groups import set_learning_rate
from sat_lora.training.broken_samples import BrokenSamples
from sat_lora.training.checkpoint import save_checkpoint
from sat_lora.training.distributed import World, gather_lists
from sat_lora.training.loss import count_answer_tokens, sum_over_data_parallel
from sat_lora.training.progress import peak_memory_mib
from sat_lora.training.run_folder import RunFolder
from sat_lora.training.schedule import learning_rate_factor, warmup_steps
from sat_lora.training.step import train_step, validation_loss


def train(
    engine,
    loader: Iterable[dict],
    valid: Iterable[dict] | None,
    options: Namespace,
    run: RunFolder,
    world: World,
    steps_done: int = 0,
    *,
    dataset_size: int,
) -> None:
    """From step `steps_done` to `options.train_iters`; evaluates, saves and reports on the way and at the end.

    loader: micro-batches of this rank without end, from where `steps_done` left off. valid: a pass over the validation
    batches of this rank, as many on every rank; None if there are none.
    dataset_size: training samples in an epoch. DataError, on every rank at the same step: too many samples are broken.
    """
    total, accumulate = options.train_iters, options.gradient_accumulation_steps
    warmup = warmup_steps(options.warmup, total)
    batches, known = iter(loader), BrokenSamples(dataset_size, options.max_broken_share)
    step_samples = options.batch_size * accumulate * world.data_parallel_size
    samples, clock = 0, time.perf_counter()
    engine.train()
    for step in range(steps_done, total):
        rate = options.lr * learning_rate_factor(
            step, total_steps=total, warmup_steps=warmup, style=options.lr_decay_style, floor=options.min_lr_ratio
        )
        set_learning_rate(engine.optimizer.param_groups, rate)
        micro_batches = list(itertools.islice(batches, accumulate))
        broken = known.new_in(micro_batches)
        tokens, failures = sum_over_data_parallel(
            sum(count_answer_tokens(batch["labels"]) for batch in micro_batches), len(broken), device=world.device
        )
        if failures:
            known.add(broken := gather_lists(broken))
            run.report_broken(broken, step + 1)
        known.check((step + 1 - steps_done) * step_samples)
        loss = train_step(engine, micro_batches, world, tokens)
        samples += step_samples
        last = step + 1 == total
        if last or (step + 1) % options.log_interval == 0:
            norm = engine.get_global_grad_norm()
            run.log_step(
                step + 1,
                loss=loss,
                lr=rate,
                grad_norm=None if norm is None else float(norm),
                samples_per_second=samples / (time.perf_counter() - clock),
                peak_memory_mib=peak_memory_mib(),
            )
            samples, clock = 0, time.perf_counter()
        else:
            run.advance(step + 1, loss=loss, lr=rate)
        paused = time.perf_counter()
        if valid is not None and (last or _due(step + 1, options.eval_interval)):
            run.log_validation(step + 1, validation_loss(engine, valid, world))
        if last or _due(step + 1, options.save_interval):
            save_adapter(engine.module, run.path / "adapter")
            save_checkpoint(engine, run.path / "checkpoints", step + 1)
            run.draw()
        clock += time.perf_counter() - paused


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

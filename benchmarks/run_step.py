"""The step of a run, as `sat_lora.training` makes it: what the benchmarks know of that package's inside is here."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.interleaved import Work, described_as_alone
from sat_lora._sat import BaseModel
from sat_lora.parallel.distributed import World
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.step import train_step
from sat_lora.watchdog.trace import NO_TRACE, NoTrace, Trace

WATCHDOG_LIMIT = 120.0
RATE = 1e-6  # so small that a step can be repeated for ever


@dataclass(frozen=True)
class RunStep:
    """`work` is a step. trace: what a watchdog looks at."""

    work: Work
    trace: NoTrace


def run_step(
    model: BaseModel,
    batch: dict,
    *,
    stage: int,
    watch: bool = True,
    trace_folder: Path | None = None,
    log: RunFolder | None = None,
) -> RunStep:
    """The step under DeepSpeed's engine at that ZeRO stage, for a model with adapters on the device it is on.

    watch: whether the step looks at its gradients. trace_folder: a run's, None: nothing is traced. log: where each
    step writes a line.
    """
    device = next(model.parameters()).device
    world = World(rank=0, size=1, device=device, data_parallel_rank=0, data_parallel_size=1)
    trace = NO_TRACE if trace_folder is None else Trace(trace_folder, model, rank=0, world_size=1)
    with described_as_alone():
        engine = start_engine(model, adapter_optimizer(model, lr=RATE), engine_config(model, batch, stage))
    trace.follow(engine)
    engine.train()
    tokens, step = int((batch["labels"][:, 1:] != -100).sum()), 0

    def work() -> None:
        nonlocal step
        step += 1
        trace.at("data", step=step)
        result = train_step(engine, [batch], world, tokens, checks_gradients=watch, trace=trace)
        trace.at("save")
        if log is not None:
            norm = engine.get_global_grad_norm()
            figures = dict(lr=RATE, samples_per_second=1.0, peak_memory_mib=0.0)
            log.log_step(step, loss=result.loss, grad_norm=None if norm is None else float(norm), **figures)

    return RunStep(work, trace)


def engine_config(model: BaseModel, batch: dict, stage: int) -> dict:
    """The DeepSpeed config that a run of this project makes by default, at that stage and in the model's dtype."""
    return {
        "train_micro_batch_size_per_gpu": len(batch["input_ids"]),
        "gradient_clipping": 1.0,
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000},
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
    }

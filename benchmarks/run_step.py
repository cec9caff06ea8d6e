"""The step of a run, as `sat_lora.training` makes it: what the benchmarks know of that package's inside is here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.interleaved import Work, described_as_alone
from sat_lora._sat import BaseModel
from sat_lora.parallel.distributed import World
from sat_lora.training.runs.traced import traced
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.observers import Figures, Observer, Observers, StepReport
from sat_lora.training.steps.step import train_step
from sat_lora.watchdog.trace import Trace

WATCHDOG_LIMIT = 120.0
RATE = 1e-6  # so small that a step can be repeated for ever


@dataclass(frozen=True)
class RunStep:
    """`work` is a step. trace: what a watchdog looks at, None where nothing is traced."""

    work: Work
    trace: Trace | None


def run_step(
    model: BaseModel,
    batch: dict,
    *,
    stage: int,
    watch: bool = True,
    trace_folder: Path | None = None,
    logs: Sequence[Observer] = (),
) -> RunStep:
    """The step under DeepSpeed's engine at that ZeRO stage, for a model with adapters on the device it is on.

    watch: whether the step looks at its gradients. trace_folder: a run's, None: nothing is traced. logs: are told of
    each step, with its figures.
    """
    device = next(model.parameters()).device
    world = World(rank=0, size=1, device=device, data_parallel_rank=0, data_parallel_size=1)
    trace = None if trace_folder is None else Trace(trace_folder, model, rank=0, world_size=1)
    with described_as_alone():
        engine = start_engine(model, adapter_optimizer(model, lr=RATE), engine_config(model, batch, stage))
    if trace is not None:
        trace.follow(engine)
    observers = Observers([*traced(trace), *logs])
    engine.train()
    tokens, step = int((batch["labels"][:, 1:] != -100).sum()), 0

    def work() -> None:
        nonlocal step
        step += 1
        observers.on_phase("data", step=step)
        result = train_step(engine, [batch], world, tokens, checks_gradients=watch, observers=observers)
        observers.on_phase("save")
        if logs:
            norm = engine.get_global_grad_norm()
            grad_norm = None if norm is None else float(norm)
            figures = Figures(grad_norm=grad_norm, samples_per_second=1.0, peak_memory_mib=0.0)
            observers.on_step(StepReport(step=step, loss=result.loss, lr=RATE, figures=figures))

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

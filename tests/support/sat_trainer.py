"""Runs of SAT's own, unchanged `training_main` on gloo, several in a row in one process."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sat_lora import LoraConfig, adapter_checkpoints
from sat_lora._sat_on_cpu import sat_on_cpu
from sat_lora.training.steps.loss import answer_loss_sum, count_answer_tokens
from tests.support.tiny import tiny_batch

LORA = LoraConfig(r=4, lora_alpha=8)
STEPS, RATE = 5, 0.05
WARM_UP_SHARE = 0.05  # of the rate, which SAT holds for the first hundred steps of a fine-tuning


class Numbers(torch.utils.data.Dataset):
    """Samples that are seeds: `forward_step` makes the batch."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return index


def loss_of(model, seed: int) -> torch.Tensor:
    """The mean loss of the answers of a batch of two rows, one of them with an image."""
    batch = tiny_batch((True, False), seed=seed)
    dtype = next(parameter.dtype for parameter in model.parameters())
    batch["images"] = batch["images"].to(dtype)
    return answer_loss_sum(model, batch) / count_answer_tokens(batch["labels"])


@dataclass
class Run:
    """What a run of `training_main` leaves on this rank."""

    save: Path
    seeds: list[int] = field(default_factory=list)
    """Of its training batches."""
    losses: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    """Losses of its batches without gradients."""
    warnings: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """Parameters of the base with another value, to the bit."""
    trained: list[str] = field(default_factory=list)
    rates: list[tuple[float, float, int]] = field(default_factory=list)
    """(rate, weight decay, parameters) of the optimizer's groups after the run."""


def engine_file(folder: Path, stage: int, **changes) -> Path:
    """A DeepSpeed file of plain SGD at that ZeRO stage."""
    zero = {"stage": stage, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 0}
    engine = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0}  # DeepSpeed clips to 1 by itself
    engine |= {"optimizer": {"type": "SGD", "params": {"lr": RATE}}, "zero_force_ds_cpu_optimizer": False, **changes}
    folder.mkdir(exist_ok=True, parents=True)
    file = folder / "engine.json"
    file.write_text(json.dumps(engine))
    return file


@contextmanager
def collected_warnings():
    """Give a list that takes what sat_lora warns of, inside."""
    warnings, handler = [], logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("sat_lora").addHandler(handler)
    try:
        yield warnings
    finally:
        logging.getLogger("sat_lora").removeHandler(handler)


def whole_values(model) -> dict[str, torch.Tensor]:
    """Copies of this rank's values, of ZeRO-3's partitions the whole."""
    from sat_lora.parallel.sharding import gathered

    with gathered(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_by_sat(
    folder: str | Path,
    build: Callable,
    *,
    stage: int = 0,
    mp_size: int = 1,
    steps: int = STEPS,
    options: Sequence[str] = (),
    engine: dict | None = None,
    loss: Callable = loss_of,
    adapters_alone: bool = True,
) -> Run:
    """`training_main` on the model that `build(args)` gives, its adapters in it. Every rank calls it.

    adapters_alone: inside of `adapter_checkpoints`.
    """
    from sat import get_args
    from sat.training.deepspeed_training import training_main

    folder, run = Path(folder), Run(Path())

    def forward_step(batches, model, args, timers):
        seed = int(next(batches))
        value = loss(model, seed)
        if torch.is_grad_enabled():
            run.seeds.append(seed)
        (run.losses if torch.is_grad_enabled() else run.evaluated).append(float(value))
        return value, {}

    file = engine_file(folder, stage, **(engine or {}))
    defaults = f"--mode finetune --experiment-name run --train-iters {steps} --batch-size 1 --lr {RATE} --num-workers 0"
    defaults += f" --lr-decay-style constant --save-interval {steps} --split 1 --log-interval 1 --train-data numbers"
    words = [*defaults.split(), "--model-parallel-size", str(mp_size), "--save", str(folder), *options]
    with sat_on_cpu(), collected_warnings() as run.warnings:
        args = get_args([*words, "--deepspeed_config", str(file)])
        model = build(args)
        before = (
            {name: p.detach().clone() for name, p in model.named_parameters()} if not isinstance(model, type) else {}
        )
        with adapter_checkpoints() if adapters_alone else nullcontext():
            engine_of_run = training_main(args, model, forward_step, lambda path, args: Numbers())
    inner = engine_of_run.module
    run.save = Path(args.save)
    run.trained = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
    after = whole_values(inner)
    run.changed = [n for n, v in before.items() if n not in run.trained and not torch.equal(after[n].to(v.dtype), v)]
    groups = engine_of_run.optimizer.param_groups
    run.rates = [(g["lr"], g.get("weight_decay", 0.0), sum(p.numel() for p in g["params"])) for g in groups]
    return run

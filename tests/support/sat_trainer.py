"""Runs of SAT's own, unchanged `training_main` on gloo, several in a row in one process."""

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from sat_lora import LoraConfig, adapter_checkpoints, add_lora
from sat_lora._sat_on_cpu import sat_on_cpu
from sat_lora.files.atomic import replace_text
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.sharding import gathered
from sat_lora.training.steps.engine import start_engine
from sat_lora.training.steps.loss import answer_loss_sum, count_answer_tokens
from tests.support.tiny import fill_adapters, tiny_batch, tiny_model
from tests.support.training_runs import adapter_values, engine_config, sgd, step_together

LORA = LoraConfig(r=4, lora_alpha=8)
STEPS, RATE = 5, 0.05
WARM_UP_SHARE = 0.05  # of the rate, which SAT holds for the first hundred steps of a fine-tuning
Build = Callable[..., torch.nn.Module]
"""Makes a model with adapters, given SAT's arguments."""


class Numbers(torch.utils.data.Dataset):
    """Samples that are seeds: `forward_step` makes the batch."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return index


def tiny_cogvlm(
    args=None, dtype=torch.float32, lora: LoraConfig = LORA, fixed_order=False, vit_checkpoint=None
) -> torch.nn.Module:
    """The tiny CogVLM with filled adapters, of the layout and with the checkpointing that SAT's arguments say.

    vit_checkpoint: whether the ViT is recomputed, if not as the language model is.
    """
    checkpoint = getattr(args, "checkpoint_activations", False)
    vit_checkpoint = checkpoint if vit_checkpoint is None else vit_checkpoint
    settings = dict(checkpoint_activations=checkpoint, vit_checkpoint_activations=vit_checkpoint)
    model = tiny_model(dtype, model_parallel_size=getattr(args, "model_parallel_size", 1), **settings)
    add_lora(model, lora, fixed_order=fixed_order)
    fill_adapters(model)
    return model


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
    evaluated: list[tuple[int, int, float]] = field(default_factory=list)
    """(steps before it, seed, loss) of its batches without gradients."""
    warnings: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """Parameters of the base with another value, to the bit."""
    trained: list[str] = field(default_factory=list)
    adapter: dict[str, numpy.ndarray] = field(default_factory=dict)
    """Whole tensors by their names in a file, in float32."""
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
    replace_text(file, json.dumps(engine))  # by every rank, while others read it
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
    with gathered(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_by_sat(
    folder: str | Path,
    build: Build = tiny_cogvlm,
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
            run.losses.append(float(value))
        else:
            run.evaluated.append((len(run.seeds), seed, float(value)))
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
    run.adapter = adapter_values(inner)
    run.rates = [(g["lr"], g.get("weight_decay", 0.0), sum(p.numel() for p in g["params"])) for g in groups]
    return run


def train_by_our_loop(seeds: Sequence[int], *, stage: int, mp_size: int, build: Build = tiny_cogvlm) -> dict:
    """The adapter after our own steps on the same batches, by the same engine, at the rate that SAT takes."""
    world = init_model_parallel(init_distributed(), mp_size)
    model = build(Namespace(model_parallel_size=mp_size)).train()
    engine = start_engine(model, sgd(model, RATE * WARM_UP_SHARE), engine_config(stage, 1))
    for seed in seeds:
        step_together(engine, [tiny_batch((True, False), seed=seed)], world)
    return adapter_values(engine.module)


def train_by_plain_sgd(
    build: Build, seeds: Sequence[Sequence[int]], loss: Callable = loss_of
) -> dict[str, numpy.ndarray]:
    """The adapter after the same steps without any engine, each on the mean of the losses of its seeds."""
    return adapter_values(trained_by_plain_sgd(build, seeds, loss))


def trained_by_plain_sgd(build: Build, seeds: Sequence[Sequence[int]], loss: Callable = loss_of) -> torch.nn.Module:
    """The model after these steps."""
    init_model_parallel(init_distributed())
    model = build().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in seeds:
        mean = sum(loss(model, seed) for seed in step) / len(step)
        gradients = torch.autograd.grad(mean, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients):
                if gradient is not None:
                    parameter -= RATE * WARM_UP_SHARE * gradient
    return model


def difference(left: dict[str, numpy.ndarray], right: dict[str, numpy.ndarray]) -> float:
    """The largest difference of any value; both have the same tensors."""
    if left.keys() != right.keys():
        raise AssertionError(f"other tensors: {sorted(left.keys() ^ right.keys())}")
    return max(float(abs(left[name] - right[name]).max()) for name in left)


def refusal(function: Callable, *args, **kwargs) -> str:
    """The class and the text of what the function raises."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")

"""From options and a DeepSpeed file to the one config that `deepspeed.initialize` gets."""

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from sat_lora.errors import ConfigError
from sat_lora.printable import printable
from sat_lora.terminal.option_types import LARGEST_RATE
from sat_lora.training.settings.config import Optimizer, Origin, Parallel, Precision, TrainConfig
from sat_lora.training.settings.deepspeed_file import (
    ENTRIES,
    DeepSpeedFile,
    enabled,
    is_whole,
    open_deepspeed_file,
    read_deepspeed_file,
    values_of_file,
)
from sat_lora.training.settings.deepspeed_problems import OFFLOADS, UNSUPPORTED, file_problems

BUCKET = 50_000_000  # elements; DeepSpeed's own 500 million take 1 to 4 GB, and hardly anything trains
NEVER = 2**31  # steps_per_print: the run folder and the progress bar report instead


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A config in which nothing is open any more, DeepSpeed's own config, and the warnings on the way to them."""

    config: TrainConfig
    engine: dict
    """The config for `deepspeed.initialize`."""
    warnings: tuple[str, ...]


def settle(config: TrainConfig, *, device: str, environ: Mapping[str, str] = os.environ) -> Settled:
    """Return the config with what its DeepSpeed file, the machine and the number of ranks decide, and DeepSpeed's own.

    Decided here: bf16 and fp16, eval_batch_size and distributed_backend where they were left open, and the factor that
    a file leaves out beside the product `train_batch_size`. `decisions` tells what came from where. The optimizer and
    the schedule are this package's own, so those two sections of the file are read and left out.
    device: `cuda` or `cpu` (an index behind it is ignored). environ: the variables of the process, of which WORLD_SIZE
    is read. Raises ConfigError where the file is missing or wrong, or a rate leaves float32. To settle a config twice
    changes nothing.
    """
    content, warnings = _checked_file(config.parallel.deepspeed_config)
    taken = {name: value for name, value in values_of_file(content).items() if name not in config.given}
    config = config.replaced(Origin.DEEPSPEED, **taken)
    config, of_batch = _with_divided_batch(config, content, environ)
    bf16, fp16 = precision_of(config, content, device)
    config = config.replaced(bf16=bf16, fp16=fp16)
    _refuse_data_type(config.precision, config.parallel, content)
    config = config.replaced(eval_batch_size=config.saving.eval_batch_size or config.schedule.batch_size)
    config, of_backend = _with_backend(config, device)
    _refuse_rates(config.optimizer, config.lora.lr_ratio)
    engine = _engine(config, content)
    return Settled(config=config, engine=engine, warnings=(*warnings, *of_batch, *of_backend))


def _engine(config: TrainConfig, content: dict) -> dict:
    """Return the config for `deepspeed.initialize`: the values of `config`, and what the file says beyond them."""
    removed = {"optimizer", "scheduler", "checkpoint", "train_batch_size", "bfloat16", *OFFLOADS, *UNSUPPORTED}
    kept = {name: value for name, value in content.items() if name not in removed}
    bf16 = content.get("bf16", content.get("bfloat16", {}))
    return {
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": NEVER,
        **kept,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": config.schedule.batch_size,
        "gradient_accumulation_steps": config.schedule.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": {
            "reduce_bucket_size": BUCKET,
            **content.get("zero_optimization", {}),
            "stage": config.parallel.zero_stage,
        },
        "bf16": {**bf16, "enabled": config.precision.bf16},
        "fp16": {**content.get("fp16", {}), "enabled": config.precision.fp16},
    }


def decisions(config: TrainConfig, device: str) -> list[str]:
    """Return a few lines on what the --deepspeed_config file decided, what it left open and where options beat it.

    config: as `settle` gave it. There are no lines without a file. Raises ConfigError where the file cannot be read any
    more.
    """
    if config.parallel.deepspeed_config is None:
        return []
    file = open_deepspeed_file(config.parallel.deepspeed_config)
    taken = []
    beaten = []
    for entry in ENTRIES:
        value = entry.value_in(file.content)
        if value is None:
            continue
        now = config.value(entry.option)
        if entry.option not in config.given:
            taken.append(f"{entry.label} {_text(now)}")
        elif entry.kind(value) != now:
            option = entry.option.replace("_", "-")
            beaten.append(f"--{option} {_text(now)} beats its {_text(entry.kind(value))}")
    if whole := file.content.get("train_batch_size"):
        factors = [entry for entry in ENTRIES[:2] if entry.value_in(file.content) is None]
        for entry in [entry for entry in factors if entry.option not in config.given][:1]:
            if (now := config.value(entry.option)) > 1 and whole % now == 0:
                taken.append(f"{entry.label} {now} (of train_batch_size {_text(whole)})")
    left = [f'"{printable(name)}"' for name in file.auto]
    lines = [
        _precision_decision(config, file, device),
        f"DeepSpeed file decides {', '.join(taken)}" if taken else "",
        f"DeepSpeed file: {', '.join(beaten)}" if beaten else "",
        f'DeepSpeed file leaves {_some(left)} to options and defaults by "auto"' if left else "",
    ]
    return [line for line in lines if line]


def _precision_decision(config: TrainConfig, file: DeepSpeedFile, device: str) -> str:
    """Return the line on the precision, and on what has decided it."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[base_dtype(config.precision)]
    given = sorted(config.given & {"bf16", "fp16"})
    said = [key for key in ("bf16", "bfloat16", "fp16") if "enabled" in file.content.get(key, {})]
    auto = any(place.split(".")[0] in ("bf16", "bfloat16", "fp16") for place in file.auto)
    if given:
        reason = f"--{given[0]}"
    elif any(enabled(file.content, key) for key in said) or (said and name == "fp32"):
        reason = "DeepSpeed file"
    else:
        place = "CUDA" if device.startswith("cuda") else "the CPU"
        reason = f"default on {place}, the DeepSpeed file {'says auto' if auto else 'leaves it open'}"
    return f"precision {name}: {reason}"


def _some(names: list[str]) -> str:
    """Return the first eight names as text, and how many there are beside them."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _text(value) -> str:
    """Return a number, or the numbers of a list, as short text."""
    return " ".join(map(_text, value)) if isinstance(value, list) else f"{value:g}"


def _checked_file(path: str | None) -> tuple[dict, list[str]]:
    """Return (the plain content of the DeepSpeed file, warnings). Raises ConfigError where something is
    wrong with it.
    """
    if path is None:
        return {}, []
    content = read_deepspeed_file(path)
    errors, warnings = file_problems(content, path)
    if errors:
        raise ConfigError("\n".join(errors))
    return content, warnings


def _with_divided_batch(
    config: TrainConfig, content: dict, environ: Mapping[str, str]
) -> tuple[TrainConfig, list[str]]:
    """Return (the config, warnings) with the factor that a file leaves out beside the product `train_batch_size`: the
    batch size, or, as DeepSpeed has it, the accumulation where both are the file's.

    Raises ConfigError where the product does not divide.
    """
    if "train_batch_size" not in content:
        return config, []
    ranks = max(1, int(environ.get("WORLD_SIZE", 1)) // config.parallel.model_parallel_size)
    steps = config.schedule.gradient_accumulation_steps
    whole = int(content["train_batch_size"])
    if "train_micro_batch_size_per_gpu" not in content and "batch_size" not in config.given:
        batch_size, rest = divmod(whole, steps * ranks)
        if rest or not batch_size:
            raise ConfigError(
                f'--deepspeed_config: {config.parallel.deepspeed_config}: "train_batch_size" {whole} does not divide '
                f"by {ranks} data-parallel ranks x {steps} accumulation steps; set "
                '"train_micro_batch_size_per_gpu" instead'
            )
        config = config.replaced(Origin.DEEPSPEED, batch_size=batch_size)
    elif is_accumulation_left(config.given, content, ranks):
        steps = whole // (config.schedule.batch_size * ranks)
        config = config.replaced(Origin.DEEPSPEED, gradient_accumulation_steps=steps)
    product = config.schedule.batch_size * steps * ranks
    if product == whole:
        return config, []
    return config, [
        f'--deepspeed_config: "train_batch_size" {whole} is not used: {config.schedule.batch_size} samples x {steps} '
        f"accumulation steps x {ranks} ranks make {product}"
    ]


def is_accumulation_left(given: Collection[str], content: Mapping, ranks: int) -> bool:
    """Return whether the number of micro-batches in a step follows from a DeepSpeed file that does not name it.

    The file then names the samples of a step and those of a micro-batch, the first is a multiple of the second on
    `ranks` data-parallel ranks, and no option names the number either.
    """
    whole = content.get("train_batch_size")
    micro = content.get("train_micro_batch_size_per_gpu")
    is_said = "gradient_accumulation_steps" in content or {"batch_size", "gradient_accumulation_steps"} & {*given}
    if is_said or not is_whole(whole, 1) or not is_whole(micro, 1):
        return False
    return whole % (micro * ranks) == 0


def _refuse_data_type(precision: Precision, parallel: Parallel, content: dict) -> None:
    """Raise ConfigError for gradients summed in a dtype for which DeepSpeed has no optimizer that is used here."""
    wanted = content.get("data_types", {}).get("grad_accum_dtype")
    own = "bf16" if precision.bf16 else "fp16" if precision.fp16 else "fp32"
    stage = parallel.zero_stage
    if wanted in (None, own) or (wanted == "fp32" and stage > 1):
        return
    raise ConfigError(
        f'--deepspeed_config: {parallel.deepspeed_config}: "data_types": "grad_accum_dtype" is "{wanted}", and '
        f'the run has {own} at ZeRO stage {stage}; leave it out, or take "fp32" at stage 2 or 3'
    )


def _refuse_rates(optimizer: Optimizer, lr_ratio: float) -> None:
    """Raise ConfigError where the largest factor of an optimizer's step is more than float32 bears."""
    factors = {"--lr": optimizer.lr, "--lr_ratio": lr_ratio, "--weight-decay": optimizer.weight_decay}
    if math.prod(max(1.0, value) for value in factors.values()) > LARGEST_RATE:
        shown = " x ".join(f"{name} {value:g}" for name, value in factors.items() if value > 1)
        raise ConfigError(f"{shown}: a step of that size leaves float32; {LARGEST_RATE:g} at most, 1e-4 is usual")


def precision_of(config: TrainConfig, content: dict, device: str) -> tuple[bool, bool]:
    """Return (bf16, fp16): the flag given; else what the file says of each; else bf16 on CUDA and fp32 on CPU.

    content: a file's, made plain. A section without `enabled`, or with "auto", says nothing, and fp16 that is
    disabled says nothing of bf16.
    """
    if config.given & {"bf16", "fp16"}:
        own = config.precision
        return "bf16" in config.given and own.bf16, "fp16" in config.given and own.fp16
    fp16 = enabled(content, "fp16")
    says_bf16 = content.get("bf16", content.get("bfloat16", {})).get("enabled")
    return (device.startswith("cuda") and not fp16) if says_bf16 is None else says_bf16, fp16


def base_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the base."""
    return torch.bfloat16 if precision.bf16 else torch.float16 if precision.fp16 else torch.float32


def _with_backend(config: TrainConfig, device: str) -> tuple[TrainConfig, list[str]]:
    """Return (the config, warnings) with the backend of the process group."""
    on_gpu = device.startswith("cuda")
    backend = config.parallel.distributed_backend
    warnings = []
    if backend == "nccl" and not on_gpu:
        warnings.append("--distributed-backend: nccl needs GPUs and there is none; gloo is used")
    if backend is None or not on_gpu:
        backend = "nccl" if on_gpu else "gloo"
    return config.replaced(distributed_backend=backend), warnings

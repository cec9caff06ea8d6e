"""From options and a DeepSpeed file to the one config that `deepspeed.initialize` gets."""

import math
import os
from argparse import Namespace
from collections.abc import Mapping

import torch

from sat_lora.errors import ConfigError
from sat_lora.lora.config import LARGEST_FACTOR
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn
from sat_lora.terminal.option_types import LARGEST_RATE
from sat_lora.training.settings.deepspeed_file import (
    ENTRIES,
    OFFLOADS,
    UNSUPPORTED,
    DeepSpeedFile,
    enabled,
    file_problems,
    is_whole,
    open_deepspeed_file,
    read_deepspeed_file,
)

LOWEST_USEFUL_RATE = 1e-5
BUCKET = 50_000_000  # elements; DeepSpeed's own 500 million take 1 to 4 GB, and hardly anything trains
NEVER = 2**31  # steps_per_print: the run folder and the progress bar report instead


def deepspeed_config(options: Namespace, *, device: str, environ: Mapping[str, str] = os.environ) -> dict:
    """The config for `deepspeed.initialize`; an option given beats the --deepspeed_config file beats the default.

    What the file decides is written back into `options`: batch_size, gradient_accumulation_steps, clip_grad, lr,
    betas, eps, weight_decay, zero_stage, bf16, fp16. So are eval_batch_size and distributed_backend where they were
    left open. An entry that says "auto" decides nothing. `decisions` tells what came from where.
    The optimizer and the schedule are this package's own, so those two sections are read and left out.
    device: `cuda` or `cpu` (an index behind it is ignored); it decides the precision when nothing else does.
    ConfigError: the file is missing or wrong, or a rate leaves float32. Running it a second time changes nothing.
    """
    content = _checked_file(options, environ)
    for entry in ENTRIES:
        value = entry.value_in(content)
        if value is not None and entry.option not in options.given:
            setattr(options, entry.option, entry.kind(value))
    _divide_batch(options, content, environ)
    options.bf16, options.fp16 = precision_of(options, content, device)
    _refuse_data_type(options, content)
    options.eval_batch_size = options.eval_batch_size or options.batch_size
    _choose_backend(options, device, environ)
    _refuse_rates(options)
    if options.lr < LOWEST_USEFUL_RATE:
        warn(
            f"--lr: {options.lr:g} is very low, LoRA learns next to nothing below {LOWEST_USEFUL_RATE:g}; try 1e-4",
            environ,
        )
    if "scheduler" in content:
        warn('--deepspeed_config: "scheduler" is not used; --lr-decay-style, --warmup, --min-lr-ratio are', environ)
    removed = {"optimizer", "scheduler", "checkpoint", "train_batch_size", "bfloat16", *OFFLOADS, *UNSUPPORTED}
    kept = {name: value for name, value in content.items() if name not in removed}
    bf16 = content.get("bf16", content.get("bfloat16", {}))
    return {
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": NEVER,
        **kept,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "gradient_clipping": options.clip_grad,
        "zero_optimization": {
            "reduce_bucket_size": BUCKET,
            **content.get("zero_optimization", {}),
            "stage": options.zero_stage,
        },
        "bf16": {**bf16, "enabled": options.bf16},
        "fp16": {**content.get("fp16", {}), "enabled": options.fp16},
    }


def decisions(options: Namespace, device: str) -> list[str]:
    """What the --deepspeed_config file decided, what it left open and what options took from it, in a few lines.

    options: as `deepspeed_config` left them. Nothing without a file. ConfigError: the file cannot be read any more.
    """
    if options.deepspeed_config is None:
        return []
    file = open_deepspeed_file(options.deepspeed_config)
    taken, beaten = [], []
    for entry in ENTRIES:
        value = entry.value_in(file.content)
        if value is None:
            continue
        now = getattr(options, entry.option)
        if entry.option not in options.given:
            taken.append(f"{entry.label} {_text(now)}")
        elif entry.kind(value) != now:
            beaten.append(f"--{entry.option.replace('_', '-')} {_text(now)} beats its {_text(entry.kind(value))}")
    if whole := file.content.get("train_batch_size"):
        factors = [entry for entry in ENTRIES[:2] if entry.value_in(file.content) is None]
        for entry in [entry for entry in factors if entry.option not in options.given][:1]:
            if (now := getattr(options, entry.option)) > 1 and whole % now == 0:
                taken.append(f"{entry.label} {now} (of train_batch_size {_text(whole)})")
    left = [f'"{printable(name)}"' for name in file.auto]
    lines = [
        _precision_decision(options, file, device),
        f"DeepSpeed file decides {', '.join(taken)}" if taken else "",
        f"DeepSpeed file: {', '.join(beaten)}" if beaten else "",
        f'DeepSpeed file leaves {_some(left)} to options and defaults by "auto"' if left else "",
    ]
    return [line for line in lines if line]


def _precision_decision(options: Namespace, file: DeepSpeedFile, device: str) -> str:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[base_dtype(options)]
    given = sorted(options.given & {"bf16", "fp16"})
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
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _text(value) -> str:
    return " ".join(map(_text, value)) if isinstance(value, list) else f"{value:g}"


def _checked_file(options: Namespace, environ: Mapping[str, str]) -> dict:
    if options.deepspeed_config is None:
        return {}
    content = read_deepspeed_file(options.deepspeed_config)
    errors, warnings = file_problems(content, options.deepspeed_config)
    if errors:
        raise ConfigError("\n".join(errors))
    for message in warnings:
        warn(message, environ)
    return content


def _divide_batch(options: Namespace, content: dict, environ: Mapping[str, str]) -> None:
    """The factor that a file leaves out beside the product `train_batch_size`: the batch size, or, as DeepSpeed has it,
    the accumulation where both are the file's.
    """
    if "train_batch_size" not in content:
        return
    ranks = max(1, int(environ.get("WORLD_SIZE", 1)) // options.model_parallel_size)
    steps, whole = options.gradient_accumulation_steps, int(content["train_batch_size"])
    if "train_micro_batch_size_per_gpu" not in content and "batch_size" not in options.given:
        options.batch_size, rest = divmod(whole, steps * ranks)
        if rest or not options.batch_size:
            raise ConfigError(
                f'--deepspeed_config: {options.deepspeed_config}: "train_batch_size" {whole} does not divide by '
                f"{ranks} data-parallel ranks x {steps} accumulation steps; set "
                '"train_micro_batch_size_per_gpu" instead'
            )
    elif is_accumulation_left(options, content, ranks):
        options.gradient_accumulation_steps = steps = whole // (options.batch_size * ranks)
    product = options.batch_size * steps * ranks
    if product != whole:
        warn(
            f'--deepspeed_config: "train_batch_size" {whole} is not used: {options.batch_size} samples x {steps} '
            f"accumulation steps x {ranks} ranks make {product}",
            environ,
        )


def is_accumulation_left(options: Namespace, content: Mapping, ranks: int) -> bool:
    """Whether a DeepSpeed file says how many samples a step has and how many a micro-batch, and the first is a multiple
    of the second on that many data-parallel ranks; how many micro-batches a step has is said neither there nor by an
    option.
    """
    whole, micro = content.get("train_batch_size"), content.get("train_micro_batch_size_per_gpu")
    is_said = "gradient_accumulation_steps" in content or {"batch_size", "gradient_accumulation_steps"} & options.given
    if is_said or not is_whole(whole, 1) or not is_whole(micro, 1):
        return False
    return whole % (micro * ranks) == 0


def _refuse_data_type(options: Namespace, content: dict) -> None:
    """ConfigError for gradients summed in a dtype for which DeepSpeed has no optimizer that is used here."""
    wanted = content.get("data_types", {}).get("grad_accum_dtype")
    own = "bf16" if options.bf16 else "fp16" if options.fp16 else "fp32"
    if wanted in (None, own) or (wanted == "fp32" and options.zero_stage > 1):
        return
    raise ConfigError(
        f'--deepspeed_config: {options.deepspeed_config}: "data_types": "grad_accum_dtype" is "{wanted}", and the run '
        f'has {own} at ZeRO stage {options.zero_stage}; leave it out, or take "fp32" at stage 2 or 3'
    )


def _refuse_rates(options: Namespace) -> None:
    """ConfigError where the largest factor of an optimizer's step is more than float32 bears."""
    factors = {"--lr": options.lr, "--lr_ratio": options.lr_ratio, "--weight-decay": options.weight_decay}
    if type(options.lr_ratio) not in (int, float) or not 0 < options.lr_ratio <= LARGEST_FACTOR:
        return  # LoraConfig refuses it
    if math.prod(max(1.0, value) for value in factors.values()) > LARGEST_RATE:
        shown = " x ".join(f"{name} {value:g}" for name, value in factors.items() if value > 1)
        raise ConfigError(f"{shown}: a step of that size leaves float32; {LARGEST_RATE:g} at most, 1e-4 is usual")


def precision_of(options: Namespace, content: dict, device: str) -> tuple[bool, bool]:
    """(bf16, fp16): the flag given; else what the file says of each; else bf16 on CUDA and fp32 on CPU.

    content: of a file, made plain. A section without `enabled`, or with "auto", says nothing, and fp16 that is
    disabled says nothing of bf16.
    """
    if options.given & {"bf16", "fp16"}:
        return "bf16" in options.given and options.bf16, "fp16" in options.given and options.fp16
    fp16 = enabled(content, "fp16")
    says_bf16 = content.get("bf16", content.get("bfloat16", {})).get("enabled")
    return (device.startswith("cuda") and not fp16) if says_bf16 is None else says_bf16, fp16


def base_dtype(options: Namespace) -> torch.dtype:
    """The dtype of the base that options.bf16 and options.fp16 ask for."""
    return torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else torch.float32


def _choose_backend(options: Namespace, device: str, environ: Mapping[str, str]) -> None:
    on_gpu = device.startswith("cuda")
    if options.distributed_backend == "nccl" and not on_gpu:
        warn("--distributed-backend: nccl needs GPUs and there is none; gloo is used", environ)
    if options.distributed_backend is None or not on_gpu:
        options.distributed_backend = "nccl" if on_gpu else "gloo"

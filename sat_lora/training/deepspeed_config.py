"""From options and a DeepSpeed file to the one config that `deepspeed.initialize` gets."""

import os
from argparse import Namespace
from collections.abc import Mapping

import torch

from sat_lora.errors import ConfigError
from sat_lora.training.deepspeed_file import enabled, file_problems, read_deepspeed_file
from sat_lora.training.notice import warn

LOWEST_USEFUL_RATE = 1e-5
BUCKET = 50_000_000  # elements; DeepSpeed's own 500 million take 1 to 4 GB, and hardly anything trains
NEVER = 2**31  # steps_per_print: the run folder and the progress bar report instead


def deepspeed_config(options: Namespace, *, device: str, environ: Mapping[str, str] = os.environ) -> dict:
    """The config for `deepspeed.initialize`; an option given beats the --deepspeed_config file beats the default.

    What the file decides is written back into `options`: batch_size, gradient_accumulation_steps, clip_grad, lr,
    betas, eps, weight_decay, zero_stage, bf16, fp16. So are eval_batch_size and distributed_backend where they were
    left open.
    The optimizer and the schedule are this package's own, so those two sections are read and left out.
    device: `cuda` or `cpu` (an index behind it is ignored); it decides the precision when nothing else does.
    ConfigError: the file is missing or wrong. Running it a second time changes nothing.
    """
    content = _checked_file(options, environ)
    _take_batch(options, content, environ)
    _take(options, "clip_grad", content, "gradient_clipping", float)
    _take_optimizer(options, content)
    _take(options, "zero_stage", content.get("zero_optimization", {}), "stage", int)
    _choose_precision(options, content, device)
    options.eval_batch_size = options.eval_batch_size or options.batch_size
    _choose_backend(options, device, environ)
    if options.lr < LOWEST_USEFUL_RATE:
        warn(
            f"--lr: {options.lr:g} is very low, LoRA learns next to nothing below {LOWEST_USEFUL_RATE:g}; try 1e-4",
            environ,
        )
    if "scheduler" in content:
        warn('--deepspeed_config: "scheduler" is not used; --lr-decay-style, --warmup, --min-lr-ratio are', environ)
    removed = ("optimizer", "scheduler", "train_batch_size", "offload_optimizer", "offload_param", "bfloat16")
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


def _take(options: Namespace, name: str, section: dict, key: str, kind: type) -> None:
    """Set options.<name> from a file's entry, unless the option was given."""
    if key not in section or name in options.given:
        return
    value = section[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f'--deepspeed_config: {options.deepspeed_config}: "{key}" is {value!r}, wanted a number')
    setattr(options, name, kind(value))


def _take_batch(options: Namespace, content: dict, environ: Mapping[str, str]) -> None:
    """Batch size and accumulation; a file with nothing but the product `train_batch_size` decides them too."""
    _take(options, "batch_size", content, "train_micro_batch_size_per_gpu", int)
    _take(options, "gradient_accumulation_steps", content, "gradient_accumulation_steps", int)
    if "train_batch_size" not in content:
        return
    ranks = max(1, int(environ.get("WORLD_SIZE", 1)) // options.model_parallel_size)
    steps, whole = options.gradient_accumulation_steps, content["train_batch_size"]
    if "train_micro_batch_size_per_gpu" not in content and "batch_size" not in options.given:
        options.batch_size, rest = divmod(whole, steps * ranks)
        if rest or not options.batch_size:
            raise ConfigError(
                f'--deepspeed_config: {options.deepspeed_config}: "train_batch_size" {whole} does not divide by '
                f"{ranks} data-parallel ranks x {steps} accumulation steps; set "
                '"train_micro_batch_size_per_gpu" instead'
            )
    product = options.batch_size * steps * ranks
    if product != whole:
        warn(
            f'--deepspeed_config: "train_batch_size" {whole} is not used: {options.batch_size} samples x {steps} '
            f"accumulation steps x {ranks} ranks make {product}",
            environ,
        )


def _take_optimizer(options: Namespace, content: dict) -> None:
    settings = content.get("optimizer", {}).get("params", {})
    for name in ("lr", "eps", "weight_decay"):
        _take(options, name, settings, name, float)
    if "betas" in settings and "betas" not in options.given:
        betas = settings["betas"]
        numbers = isinstance(betas, list) and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
        if not numbers or len(betas) != 2:
            raise ConfigError(f'--deepspeed_config: "betas" is {betas!r}, wanted two numbers from 0 up to 1')
        options.betas = [float(beta) for beta in betas]


def precision_of(options: Namespace, content: dict, device: str) -> tuple[bool, bool]:
    """(bf16, fp16): the flag given, else what the file has a section for, else bf16 on CUDA and fp32 on CPU."""
    if options.given & {"bf16", "fp16"}:
        return "bf16" in options.given and options.bf16, "fp16" in options.given and options.fp16
    if content.keys() & {"bf16", "bfloat16", "fp16"}:
        return enabled(content, "bf16") or enabled(content, "bfloat16"), enabled(content, "fp16")
    return device.startswith("cuda"), False


def base_dtype(options: Namespace) -> torch.dtype:
    """The dtype of the base that options.bf16 and options.fp16 ask for."""
    return torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else torch.float32


def _choose_precision(options: Namespace, content: dict, device: str) -> None:
    options.bf16, options.fp16 = precision_of(options, content, device)


def _choose_backend(options: Namespace, device: str, environ: Mapping[str, str]) -> None:
    on_gpu = device.startswith("cuda")
    if options.distributed_backend == "nccl" and not on_gpu:
        warn("--distributed-backend: nccl needs GPUs and there is none; gloo is used", environ)
    if options.distributed_backend is None or not on_gpu:
        options.distributed_backend = "nccl" if on_gpu else "gloo"

"""The DeepSpeed engine around a model whose adapters train."""

import logging
import warnings

import torch

from sat_lora._deepspeed import skip_shared_memory_build
from sat_lora._sat import BaseModel, mpu
from sat_lora.lora.mixin import lora_mixins, refuse_branches
from sat_lora.lora.optimizer_groups import parameter_groups
from sat_lora.training.steps.zero3_linear import round_once
from sat_lora.training.steps.zero_norm import speed_up_norm


def adapter_optimizer(model: BaseModel, *, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.999), eps: float = 1e-8):
    """Return AdamW over the trainable parameters, B at its own rate; the groups are the same on every rank."""
    return torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=weight_decay), lr=lr, betas=betas, eps=eps)


def set_up_deepspeed() -> None:
    """Hand the process groups to DeepSpeed, quietly; they have to exist. A second call changes nothing."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    skip_shared_memory_build()
    # DeepSpeed 0.19.8 calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def start_engine(model: BaseModel, optimizer: torch.optim.Optimizer, config: dict, *, seed: int = 1234):
    """Return the DeepSpeed engine of a model and its optimizer, with SAT's model parallelism. The process groups have
    to exist.

    seed: of the random states of model-parallel ranks on CUDA. The engine's `config` is the one given but for ZeRO
    stage 0 in half precision, see `without_unfused_optimizer`, and for what makes the host wait for the device, see
    `without_waits`. Raises ConfigError for ZeRO-3 on a model whose graph depends on the data.
    """
    import deepspeed

    config = without_waits(without_unfused_optimizer(config))
    if config.get("zero_optimization", {}).get("stage") == 3:
        refuse_branches(lora_mixins(model))
    set_up_deepspeed()
    if torch.cuda.is_available():
        # SAT checkpoints activations with DeepSpeed's function there, which needs the groups and a seeded tracker.
        deepspeed.checkpointing.configure(mpu, deepspeed_config=config)
        mpu.model_parallel_cuda_manual_seed(seed)
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
    )
    round_once()
    speed_up_norm(engine.optimizer)
    return engine


def without_unfused_optimizer(config: dict) -> dict:
    """Return `config` with ZeRO stage 1 in place of 0 where it asks for bf16 or fp16.

    DeepSpeed 0.19.8 wraps the optimizer of that combination in its FP16_UnfusedOptimizer. That one takes an Adam step
    of zeros when it is made, so that the first real step is a quarter too short, and under model parallelism its
    gradient norm leaves out what other ranks hold, so that clipping is wrong. Stage 1 does the same thing, right.
    """
    half = any(config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16"))
    zero = config.get("zero_optimization", {})
    return {**config, "zero_optimization": {**zero, "stage": 1}} if half and not zero.get("stage", 0) else config


def without_waits(config: dict) -> dict:
    """Return `config` without two waits for the device in DeepSpeed 0.19.8's steps, unless it asks for them itself.

    Its throughput timer, of which nothing is shown here, waits before each forward pass and after each step. In bf16
    it looks for gradients that are not finite, one by one, which `train_step` has done when it comes to that.
    """
    timers = {"throughput": {"enabled": False}} | config.get("timers", {})
    bf16 = config.get("bf16", {})
    if bf16.get("enabled", False):
        bf16 = {"check_grad_overflow": False} | bf16
    return {**config, "timers": timers, "bf16": bf16}

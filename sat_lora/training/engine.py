"""The DeepSpeed engine around a model whose adapters train."""

import logging
import warnings

import torch

from sat_lora._sat import BaseModel, mpu
from sat_lora.optimizer_groups import parameter_groups


def adapter_optimizer(model: BaseModel, *, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.999), eps: float = 1e-8):
    """AdamW over the trainable parameters, B at its own rate; the groups are the same on every rank."""
    return torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=weight_decay), lr=lr, betas=betas, eps=eps)


def set_up_deepspeed() -> None:
    """Hand the process groups to DeepSpeed, quietly; they have to exist. A second call changes nothing."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # DeepSpeed 0.19.8 compiles a shared-memory all-reduce for CPU ranks at its first start, which takes half a
        # minute and a C++ compiler, for what gloo does here anyway.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19.8 calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def start_engine(model: BaseModel, optimizer: torch.optim.Optimizer, config: dict, *, seed: int = 1234):
    """`deepspeed.initialize` with SAT's model parallelism; the process groups have to exist."""
    import deepspeed

    set_up_deepspeed()
    if torch.cuda.is_available():
        # SAT checkpoints activations with DeepSpeed's function there, which needs the groups and a seeded tracker.
        deepspeed.checkpointing.configure(mpu, deepspeed_config=config)
        mpu.model_parallel_cuda_manual_seed(seed)
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
    )
    return engine

"""Loops that are none of this project's: a plain `deepspeed.initialize`, and no engine at all."""

import os
from unittest import mock

import torch

from sat_lora import LoraConfig, add_lora, parameter_groups
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.loss import answer_loss_sum, count_answer_tokens
from tests.support.tiny import tiny_batch, tiny_model

LORA = LoraConfig(r=4, lora_alpha=8, lr_ratio=4)


def loss_of(model, batch):
    return answer_loss_sum(model, batch) / count_answer_tokens(batch["labels"])


def batch_of(step, rank=0):
    return tiny_batch((True, False), seed=100 * rank + step)


def adapted(dtype=torch.float32, **settings):
    """The tiny CogVLM with adapters, in training mode, on ranks that have found each other."""
    world = init_model_parallel(init_distributed(), settings.get("model_parallel_size", 1))
    model = tiny_model(dtype=dtype, **settings).train()
    add_lora(model, LORA)
    return model, world


def plain_engine(model, stage, *, bf16=False, accumulate=1, groups=None):
    """What `deepspeed.initialize` makes, with nothing of this project's but the groups, unless they are given."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler is started
    zero = {"stage": stage, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(groups or parameter_groups(model, lr=1e-3), lr=1e-3)
    with mock.patch.dict(os.environ, {"LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def steps(engine, rank, count=3, *, before=lambda step: None, after_backward=lambda step: None):
    """The losses of that many steps of an engine's loop. before: called with each step, counted from 1."""
    losses = []
    for step in range(1, count + 1):
        before(step)
        loss = loss_of(engine, batch_of(step, rank))
        engine.backward(loss)
        after_backward(step)
        engine.step()
        losses.append(loss.item())
    return losses

"""Training on several ranks: accumulation, learning, and the rate that is set. The rest is in test_matrix."""

import deepspeed
import pytest
import torch

from sat_lora import add_lora
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from tests.support.ranks import run_ranks
from tests.support.tiny import fill_adapters, tiny_model
from tests.support.training_runs import (
    CONFIG,
    STEPS,
    adapter_values,
    engine_config,
    mixed_batch,
    sgd,
    step_together,
    train_alone,
    worst_error,
)


def steps_with_every_batch_twice():
    """Twice the same micro-batch has the gradient of one."""
    world = init_model_parallel(init_distributed())
    model = tiny_model().train()
    add_lora(model, CONFIG)
    fill_adapters(model, std=0.1)
    engine = start_engine(model, sgd(model, 0.1), engine_config(1, 2, accumulate=2))
    losses = [step_together(engine, [mixed_batch(world.data_parallel_rank, step)] * 2, world) for step in range(STEPS)]
    return losses, adapter_values(engine.module)


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    (losses, values), _ = run_ranks(steps_with_every_batch_twice, 2)
    expected = run_ranks(train_alone, 1, 2, torch.float32, mixed_batch, str(tmp_path))[0]
    assert losses == pytest.approx([float(loss) for loss in expected["loss"].values()], rel=1e-5)
    assert worst_error(values, expected["SGD"]) < 1e-5


def twenty_adam_steps(stage, bf16):
    world = init_model_parallel(init_distributed())
    model = tiny_model(torch.bfloat16 if bf16 else torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add_lora(model, CONFIG)
    model.train()
    optimizer = adapter_optimizer(model, lr=3e-3)
    engine = start_engine(model, optimizer, engine_config(stage, 2, clip=1.0, bf16=bf16))
    losses = [step_together(engine, [mixed_batch(world.rank)], world) for _ in range(20)]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        now = engine.module.state_dict()
        assert all(torch.equal(now[k], v) for k, v in before.items()), "a base weight moved"
    return losses


@pytest.mark.parametrize(
    "stage, bf16", [pytest.param(2, False, marks=pytest.mark.matrix), (3, True)], ids=["ZeRO-2, fp32", "ZeRO-3, bf16"]
)
def test_twenty_steps_of_mixed_ranks_complete_and_learn(stage, bf16):
    first, second = run_ranks(twenty_adam_steps, 2, stage, bf16)
    assert first == second
    assert first[-1] < 0.8 * first[0]


def step_with_rate_zero(stage, bf16):
    world = init_model_parallel(init_distributed())
    model = tiny_model(torch.bfloat16 if bf16 else torch.float32)
    add_lora(model, CONFIG)
    model.train()
    engine = start_engine(model, adapter_optimizer(model, lr=1.0), engine_config(stage, 2, bf16=bf16))
    before = adapter_values(engine.module)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    step_together(engine, [mixed_batch(world.rank)], world)
    return worst_error(adapter_values(engine.module), before)


@pytest.mark.parametrize(
    "stage, bf16",
    [
        (1, True),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in ((0, False), (0, True), (2, False), (3, True))),
    ],
)
def test_the_rate_that_the_loop_sets_reaches_the_optimizer(stage, bf16):
    assert run_ranks(step_with_rate_zero, 2, stage, bf16) == [0, 0]

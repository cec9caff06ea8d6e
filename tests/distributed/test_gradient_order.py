"""Every rank sees its gradients in one order, whatever the batches hold: on our CogVLM always, on one that branches
with fixed_order. ZeRO 1 and 2 then train such a model to what one process gets.
"""

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.data.samples import BrokenSample, collate
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import start_engine
from tests.support.branching_cogvlm import branch_on_data
from tests.support.ranks import run_ranks
from tests.support.tiny import fill_adapters, tiny_model
from tests.support.training_runs import (
    STEPS,
    adapter_values,
    engine_config,
    image_batch,
    mixed_batch,
    sgd,
    step_together,
    text_batch,
    train_alone,
    worst_error,
)


def broken_batch(rank, step=0):
    """Rank 1 gets broken samples alone."""
    return collate([BrokenSample("a.png", "zero bytes")], image_size=(21, 21)) if rank else image_batch(rank, step)


KINDS = {"images": image_batch, "one text-only": mixed_batch, "text-only": text_batch, "one broken": broken_batch}


def arrivals(checkpoint, stage, branching):
    """For each kind of batch, the names in the order in which gradients arrive on this rank."""
    if branching:
        branch_on_data()
    world = init_model_parallel(init_distributed())
    model = tiny_model(checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint).train()
    add_lora(model, LoraConfig(r=4, target_modules=["all-linear", "patch-embedding"]), fixed_order=branching)
    order = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    config = engine_config(stage, 2)
    config["zero_optimization"]["reduce_bucket_size"] = 2000  # several buckets a pass
    engine = start_engine(model, sgd(model, 0.1), config)
    found = {"trainable": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)}
    for kind, batch_for in KINDS.items():
        order.clear()
        step_together(engine, [batch_for(world.rank)], world)
        found[kind] = list(order)
    return found


@pytest.mark.parametrize(
    "checkpoint, stage, branching",
    [
        (True, 3, False),
        (False, 2, True),
        *(
            pytest.param(*case, marks=pytest.mark.matrix)
            for case in ((False, 0, False), (False, 2, False), (True, 2, False), (True, 1, True))
        ),
    ],
)
def test_the_order_is_one_on_every_rank_for_every_kind_of_batch(checkpoint, stage, branching):
    ranks = run_ranks(arrivals, 2, checkpoint, stage, branching)
    first = ranks[0]["images"]
    assert sorted(first) == ranks[0]["trainable"]
    for rank, found in enumerate(ranks):
        for kind in KINDS:
            assert found[kind] == first, (rank, kind)


def train_branching(stage, kind):
    branch_on_data()
    world = init_model_parallel(init_distributed())
    model = tiny_model().train()
    add_lora(model, LoraConfig(r=4, lora_alpha=8), fixed_order=True)
    fill_adapters(model, std=0.1)
    config = engine_config(stage, 2)
    config["zero_optimization"]["reduce_bucket_size"] = 2000
    engine = start_engine(model, sgd(model, 0.1), config)
    losses = [step_together(engine, [KINDS[kind](world.rank, step)], world) for step in range(STEPS)]
    return losses, adapter_values(engine.module)


@pytest.mark.parametrize("stage, kind", [(1, "one text-only"), (2, "one text-only"), (2, "images")])
def test_zero_trains_a_branching_model_to_what_one_process_gets(stage, kind, tmp_path):
    ranks = run_ranks(train_branching, 2, stage, kind)
    expected = run_ranks(train_alone, 1, 2, torch.float32, KINDS[kind], str(tmp_path))[0]
    for losses, values in ranks:
        assert losses == pytest.approx([float(loss) for loss in expected["loss"].values()], rel=1e-5)
        assert worst_error(values, expected["SGD"]) < 1e-5

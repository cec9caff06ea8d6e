"""float32 adapters beside DeepSpeed's bf16 and autocast: what dtype computes, and that it learns.

DeepSpeed 0.19.8 refuses fp16 on a CPU; `tests/lora/test_mixin.py` has fp16 without it.
"""

import pytest
import torch

from sat_lora import add_lora
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config, mixed_batch, step_together

PRECISIONS = {
    "bf16": (torch.bfloat16, {"bf16": {"enabled": True}}),
    "autocast": (torch.float32, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
}


def ten_steps(precision, stage):
    """(dtype of A, dtype of the base, losses)"""
    dtype, settings = PRECISIONS[precision]
    world = init_model_parallel(init_distributed())
    model = tiny_model(dtype).train()
    add_lora(model, r=4, adapter_dtype="float32")
    engine = start_engine(model, adapter_optimizer(model, lr=3e-3), {**engine_config(stage, 2), **settings})
    losses = [step_together(engine, [mixed_batch(world.rank)], world) for _ in range(10)]
    adapter = next(iter(adapters_of(engine.module).values()))
    return str(adapter.A.dtype), str(adapter.target.site.module.weight.dtype), losses


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.matrix) for stage in (0, 2)), 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_float32_adapters_train_in_every_precision(precision, stage):
    """In bf16 DeepSpeed gives the whole module its dtype and keeps float32 masters of what trains."""
    (own, base, losses), (_, _, others) = run_ranks(ten_steps, 2, precision, stage)
    dtype = PRECISIONS[precision][0]
    assert (own, base) == (str(dtype), str(dtype))
    assert losses == others and losses[-1] < 0.6 * losses[0]

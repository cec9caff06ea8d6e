"""The norm and the clipping of ZeRO 1 and 2 in a few kernels give DeepSpeed's own values."""

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps import engine as engine_module
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.optimizer_state import create_moments, optimizer_tensors
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config, mixed_batch, step_together


def norms_and_state(stage, model_parallel, bf16, clip, own):
    """Norms of three steps, and masters and moments after them. own: by this package, else by DeepSpeed."""
    world = init_model_parallel(init_distributed(), model_parallel)
    speed_up = engine_module.speed_up_norm
    if not own:
        engine_module.speed_up_norm = lambda optimizer: None
    model = tiny_model(torch.bfloat16 if bf16 else torch.float32, model_parallel_size=model_parallel).train()
    add_lora(model, LoraConfig(r=4, lr_ratio=4, modules_to_save=["boi"]))
    engine = start_engine(model, adapter_optimizer(model, lr=1e-2), engine_config(stage, 2, clip=clip, bf16=bf16))
    engine_module.speed_up_norm = speed_up
    create_moments(engine)
    norms = []
    for step in range(3):
        step_together(engine, [mixed_batch(world.data_parallel_rank, step)], world)
        norms.append(float(engine.get_global_grad_norm()))
    return norms, {name: tensor.float().numpy().tobytes() for name, tensor in optimizer_tensors(engine)}


def compare(*layout):
    return norms_and_state(*layout, own=True), norms_and_state(*layout, own=False)


@pytest.mark.parametrize(
    "ranks, stage, model_parallel, bf16, clip",
    [
        (1, 2, 1, False, 1e-3),
        (2, 1, 2, True, 1e-3),
        pytest.param(2, 2, 1, True, 1e3, marks=pytest.mark.matrix),
        pytest.param(2, 1, 1, False, 0.0, marks=pytest.mark.matrix),
    ],
)
def test_norm_and_steps_are_deepspeeds_bit_for_bit(ranks, stage, model_parallel, bf16, clip):
    for (norms, state), (other_norms, other_state) in run_ranks(compare, ranks, stage, model_parallel, bf16, clip):
        assert norms == other_norms and min(norms) > 0 and len(state) > 30
        assert [name for name, value in other_state.items() if state[name] != value] == []

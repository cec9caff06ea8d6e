"""Training steps of a small CogVLM under DeepSpeed at ZeRO 1, 2 and 3, against plain PyTorch on the CPU."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.inputs.text import IGNORED
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import start_engine
from sat_lora.training.steps.loss import count_answer_tokens
from sat_lora.training.steps.step import train_step
from tests.cuda.processes import run_alone
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model
from tests.support.training_runs import engine_config

STEPS, RATE = 4, 0.1
STAGES = (1, 2, 3)
CONFIG = LoraConfig(r=4, lora_alpha=8)


def adapted_model(dtype=torch.float32, **settings):
    """The same weights and adapters on every device: they are drawn on the CPU."""
    model = tiny_model(dtype, **settings).train()
    add_lora(model, CONFIG)
    fill_adapters(model, std=0.05)
    return model


def optimizer_of(model) -> torch.optim.SGD:
    """Its steps follow the gradients; Adam's would take rounding for a gradient where there is hardly one."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def losses_under_deepspeed(stage: int, dtype: torch.dtype, checkpointing: bool) -> list[float]:
    """The losses of STEPS steps of a run, on a GPU if this process sees one."""
    world = init_model_parallel(init_distributed())
    settings = dict(checkpoint_activations=checkpointing, vit_checkpoint_activations=checkpointing)
    model = adapted_model(dtype, **settings).to(world.device)
    engine = start_engine(model, optimizer_of(model), engine_config(stage, 2, bf16=dtype == torch.bfloat16))
    engine.train()
    batch, losses = tiny_batch(), []
    for _ in range(STEPS):
        result = train_step(engine, [batch], world, count_answer_tokens(batch["labels"]))
        losses.append(result.loss)
    return losses


def all_losses() -> tuple[str, dict]:
    """The device, and the losses for every stage, dtype and with or without recomputation, all in one process."""
    cases = [(stage, torch.float32, False) for stage in STAGES]
    cases += [(2, torch.float32, True), (3, torch.float32, True), (2, torch.bfloat16, True)]
    losses = {case: losses_under_deepspeed(*case) for case in cases}
    return init_model_parallel(init_distributed()).device.type, losses


def plain_losses() -> list[float]:
    """The losses of the same steps in plain PyTorch, in float32 on the CPU."""
    model = adapted_model()
    optimizer, losses = optimizer_of(model), []
    batch = tiny_batch()
    for _ in range(STEPS):
        logits, labels = logits_of(model, batch)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        loss = cross_entropy(logits, labels, ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_at_every_stage_equal_plain_pytorch(device_of_long_test, single_process_group):
    device = device_of_long_test
    expected = plain_losses()
    assert expected[-1] < 0.9 * expected[0]
    kind, losses = run_alone(device.type, all_losses)
    assert kind == device.type
    for (stage, dtype, checkpointing), own in losses.items():
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert own == pytest.approx(expected, rel=tolerance), (stage, dtype, checkpointing)

"""Inputs of recomputed layers in host memory, on a device: the same numbers, and less memory at the peak."""

import numpy
import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.training.steps.loss import answer_loss_sum
from sat_lora.training.steps.step import to_device
from tests.cuda.processes import run_alone
from tests.support.tiny import CONFIG, fill_adapters, tiny_batch, tiny_model

DEEP = {**CONFIG, "num_layers": 8, "eva_args": {**CONFIG["eva_args"], "num_layers": 8}}
ROWS = 16


def steps(device: str, *, with_offload: bool, dtype: torch.dtype) -> tuple[list[numpy.ndarray], int]:
    """(loss and gradients of the second of two steps, bytes at its peak above those before it; 0 on a CPU)."""
    settings = dict(checkpoint_activations=True, vit_checkpoint_activations=True, checkpoint_offload=with_offload)
    model = tiny_model(dtype, config=DEEP, **settings).train().to(device)
    add_lora(model, LoraConfig(r=4, lora_dropout=0.25))
    fill_adapters(model, std=0.1)
    batch = tiny_batch((True,) * ROWS)
    batch = to_device({**batch, "images": batch["images"].to(dtype)}, torch.device(device))
    peak = 0
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(3)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        loss = answer_loss_sum(model, batch)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
    numbers = [loss, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]
    return [number.detach().float().cpu().numpy() for number in numbers], peak


def both_ways(device: str, dtype: torch.dtype):
    """The same without and with the offload, by the checkpointing function of the device."""
    from sat_lora._sat import mpu
    from sat_lora.parallel.distributed import init_distributed, init_model_parallel
    from sat_lora.training.steps.engine import set_up_deepspeed

    init_model_parallel(init_distributed())
    if device == "cuda":
        import deepspeed

        set_up_deepspeed()
        deepspeed.checkpointing.configure(mpu)
        mpu.model_parallel_cuda_manual_seed(1)
    return [steps(device, with_offload=side, dtype=dtype) for side in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_the_same_and_the_peak_is_lower(device_of_long_test, dtype):
    (plain, high), (offloaded, low) = run_alone(device_of_long_test.type, both_ways, device_of_long_test.type, dtype)
    assert len(plain) == len(offloaded) > 30 and all(map(numpy.array_equal, plain, offloaded))
    if device_of_long_test.type == "cuda":
        assert low < high

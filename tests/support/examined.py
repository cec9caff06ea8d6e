"""What the doctor examines in tests, and what it tells of it."""

import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.doctor.batches import kinds_of
from tests.support.tiny import tiny_batch, tiny_model


def tiny(world, config=None, *, checkpoint=False, **settings):
    """The tiny CogVLM with adapters, in training mode, with random numbers of this data-parallel rank."""
    model = tiny_model(checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint, **settings).train()
    add_lora(model, config or LoraConfig(r=4, lora_dropout=0.1))
    torch.manual_seed(world.data_parallel_rank)
    return model


def batches_of(world):
    """This data-parallel rank's batches of every kind that the doctor looks at."""
    return kinds_of(tiny_batch((True, False), seed=world.data_parallel_rank), world.data_parallel_rank)


def told(findings):
    """(code, ranks, module, parameter) of each finding."""
    return [(one.code, one.ranks, one.module, one.parameter) for one in findings]

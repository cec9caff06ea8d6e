"""What a rank holds when it trains bf16 adapters on a bf16 base, by `sat_lora.memory.estimate`."""

import functools
import json

import torch

from benchmarks.models import config_of
from benchmarks.scaling.communication import MicroBatch, Setting
from sat_lora import LoraConfig
from sat_lora.memory.components import Memory, memory_of
from sat_lora.memory.estimate import fake_step
from sat_lora.training.settings.deepspeed_config import BUCKET


def memory(setting: Setting, *, stage: int, parts: int, data_ranks: int) -> Memory:
    """Of a rank among `data_ranks` that hold the same of `parts` parts of the model, under ZeRO `stage` 1, 2 or 3."""
    sizes = json.dumps(setting.sizes.config)
    model, activations = _step(sizes, setting.rank, setting.batch, setting.checkpointing, parts)
    engine = {"zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET}, "bf16": {"enabled": True}}
    return memory_of(model, engine, data_parallel_size=data_ranks, activations=activations)


@functools.cache
def _step(sizes: str, rank: int, batch: MicroBatch, checkpointing: bool, parts: int):
    runtime, sizes = config_of("large"), json.loads(sizes)  # what the sizes leave out
    vit = {**runtime["eva_args"], **sizes["eva_args"]}
    return fake_step(
        {**runtime, **sizes, "eva_args": vit},
        LoraConfig(r=rank),
        dtype=torch.bfloat16,
        batch_size=batch.samples,
        length=batch.length,
        labelled=batch.labelled // batch.samples,
        model_parallel_size=parts,
        checkpoint_activations=checkpointing,
        vit_checkpoint_activations=checkpointing,
    )

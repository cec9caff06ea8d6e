"""The estimate against every tensor that whole steps of DeepSpeed's engines make: exact, where a process's memory is
not, and so for what is small beside weights and activations in most runs.
"""

import gc

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm import build_cogvlm
from sat_lora.memory import components as memory
from sat_lora.memory.estimate import estimate
from sat_lora.memory.live_memory import LiveBytes
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.partitioned import Partitioning
from sat_lora.training.steps.engine import adapter_optimizer, set_up_deepspeed, start_engine
from sat_lora.training.steps.loss import answer_loss_sum
from sat_lora.training.steps.optimizer_state import create_moments
from tests.support.estimated_models import DTYPES, ENGINE, WORDS, rows_of, sizes
from tests.support.ranks import run_ranks

ROWS, BUCKET = 4, 100_000
FEW, MANY = LoraConfig(r=8), LoraConfig(r=64)


def engine_config(stage, dtype, micro_batches, **limits):
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, **limits}
    return {**ENGINE, "gradient_accumulation_steps": micro_batches, "zero_optimization": zero,
            "bf16": {"enabled": dtype == "bf16"}}  # fmt: skip


def estimated_total(lora, stage, dtype, checkpoint, ranks, micro_batches, **limits):
    config = sizes("tiny")
    return estimate(
        config, lora, engine_config(stage, dtype, micro_batches, **limits), dtype=DTYPES[dtype], batch_size=ROWS,
        length=config["image_length"] + 2 + WORDS, labelled=WORDS // 4, data_parallel_size=ranks, on_device=False,
        checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint,
    ).total  # fmt: skip


def counted_peak(lora, stage, dtype, checkpoint, micro_batches, **limits):
    """Bytes of all tensors at their peak over two steps, the model's own included."""
    init_model_parallel(init_distributed())
    config, engine_settings = sizes("tiny"), engine_config(stage, dtype, micro_batches, **limits)
    switches = dict(checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint)
    with LiveBytes() as live:
        model = build_cogvlm(config, dtype=DTYPES[dtype], **switches)
        if stage == 3:
            set_up_deepspeed()
            partitioning = Partitioning(engine_settings)
            for parameter in model.parameters():
                partitioning.partition(parameter)
        add_lora(model, lora)
        engine = start_engine(model.train(), adapter_optimizer(model, lr=1e-3), engine_settings)
        create_moments(engine)
        batch = rows_of(config, ROWS)
        gc.collect()
        live.peak = live.now
        for _ in range(2 * micro_batches):
            engine.backward(answer_loss_sum(engine, batch))
            engine.step()
    return live.peak


@pytest.mark.parametrize(
    "lora, stage, dtype, checkpoint, ranks, micro_batches",
    [
        (MANY, 2, "bf16", True, 1, 1),  # Adam's own temporaries take more than the activations
        (LoraConfig(r=8, target_modules=["vit-mlp"]), 3, "fp32", False, 2, 1),
        (MANY, 0, "fp32", True, 2, 2),  # gradients that are added to those of the micro-batch before
        *(
            pytest.param(*one, marks=pytest.mark.matrix)
            for one in (
                (LoraConfig(r=64, adapter_dtype="float32"), 2, "bf16", True, 2, 1),
                (MANY, 0, "fp32", True, 1, 1),
                (MANY, 1, "fp32", True, 2, 1),
                (MANY, 1, "bf16", True, 2, 2),
                (MANY, 2, "bf16", False, 2, 2),
                (FEW, 3, "bf16", False, 1, 1),
                (FEW, 3, "bf16", False, 2, 1),
                (FEW, 0, "fp32", False, 1, 1),
                (LoraConfig(r=8, init_lora_weights="pissa", use_dora=True), 2, "bf16", False, 1, 1),
            )
        ),
    ],
)
def test_every_tensor_of_a_step_is_estimated(lora, stage, dtype, checkpoint, ranks, micro_batches):
    (found,) = run_ranks(estimated_total, 1, lora, stage, dtype, checkpoint, ranks, micro_batches)
    for peak in run_ranks(counted_peak, ranks, lora, stage, dtype, checkpoint, micro_batches):
        # The bucket is counted beside the gradients, many of which lie in it, and is gone at some peaks.
        bucket = BUCKET * DTYPES[dtype].itemsize if stage else 0
        assert 0.95 * peak < found < 1.05 * peak + bucket, found / peak


@pytest.mark.parametrize(
    "limits",
    [
        dict(live=200_000, threshold=1_000),  # most are used again soon enough to be kept all the same
        pytest.param(dict(live=200_000, reuse=50_000), marks=pytest.mark.matrix),  # all are too small to be let go
        pytest.param(dict(live=200_000, reuse=50_000, threshold=1_000), marks=pytest.mark.matrix),
    ],
)
def test_what_zero_3_gathers_is_estimated_by_its_limits(limits):
    names = dict(live="max_live_parameters", reuse="max_reuse_distance", threshold="param_persistence_threshold")
    limits = {f"stage3_{names[name]}": limit for name, limit in limits.items()}
    limits |= {"stage3_prefetch_bucket_size": 20_000}
    (found,) = run_ranks(estimated_total, 1, FEW, 3, "fp32", True, 2, 1, **limits)
    for peak in run_ranks(counted_peak, 2, FEW, 3, "fp32", True, 1, **limits):
        # Embeddings, which no backward pass needs, are counted as if they were kept; and gloo's buffers are no tensors.
        assert 0.95 * peak < found < 1.15 * peak, found / peak


def test_what_a_process_has_already_is_there_for_it(monkeypatch):
    """The estimate counts the weights, which are loaded when the doctor asks."""
    kib = {"MemAvailable": 8 * 2**20, "RssAnon": 3 * 2**20}
    monkeypatch.setattr(memory, "_kib", lambda path, name: kib[name])
    assert memory.device_memory(torch.device("cpu"), 4) == (8 / 4 + 3) * 2**30

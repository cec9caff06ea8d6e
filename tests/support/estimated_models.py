"""Models and batches whose memory is estimated and measured."""

import torch

from benchmarks.models import batch_of, config_of

WORDS = 24
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENGINE = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}


def sizes(name):
    """A model_config.json: tiny, or large enough for a process's memory to be a measure (82 million weights)."""
    config = config_of("small" if name == "large" else "tiny")
    vit = {**config["eva_args"], "num_attention_heads": 4}
    return {**config, "num_layers": 2 if name == "large" else 3, "num_attention_heads": 4, "eva_args": vit}


def rows_of(config, rows):
    """A batch as `collate` makes it, with images in float32, which the model casts."""
    one = batch_of(config, WORDS, torch.device("cpu"), torch.float32)
    return {key: value.repeat(rows, *[1] * (value.dim() - 1)) for key, value in one.items()}

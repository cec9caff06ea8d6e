"""A tiny CogVLM and batches for it, random and seeded."""

import zlib

import torch

from sat_lora.cogvlm.checkpoints.load import shardings_of
from sat_lora.cogvlm.inputs.text import IGNORED, position_ids_for
from sat_lora.cogvlm.network.model import CogVLMModel, build_cogvlm
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.sharding import model_parallel_layout

PATCHES = 9
CONFIG = dict(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=1024,
    layernorm_order="pre",
    max_sequence_length=64,
    inner_hidden_size=96,
    image_length=PATCHES,
    use_bias=False,
    eva_args=dict(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        vocab_size=1,
        layernorm_order="post",
        max_sequence_length=10,
        inner_hidden_size=72,
        use_final_layernorm=False,
        layernorm_epsilon=1e-6,
        row_parallel_linear_final_bias=False,
        image_size=[21, 21],
        pre_len=1,
        post_len=0,
        in_channels=3,
        patch_size=7,
    ),
)
WIDE = {
    **CONFIG,
    **(sizes := dict(hidden_size=128, inner_hidden_size=256)),
    "eva_args": {**CONFIG["eva_args"], **sizes},
}
"""Sizes of which blocks of 64 divide each row, on two model-parallel ranks too."""


def tiny_model(dtype=torch.float32, seed=0, config=CONFIG, **settings) -> CogVLMModel:
    """Random weights large enough that every part of the network shows in the logits."""
    model = build_cogvlm(config, dtype=dtype, **settings)
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter seeded values: matrices of unit gain, norms near one, the rest small.

    Whole tensors are drawn and then cut, so that the values do not depend on the model-parallel size.
    """
    shardings, layout = shardings_of(model), model_parallel_layout()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = seeded_noise(shardings[name].full_shape(parameter.shape, layout[1]), seed, name)
            if "norm" in name and name.endswith("weight"):
                whole = 1 + 0.1 * noise
            elif noise.dim() > 1:
                whole = noise / noise[0].numel() ** 0.5
            else:
                whole = 0.1 * noise
            parameter.copy_(shardings[name].shard(whole, *layout))


def fill_adapters(model, seed=0, std=0.2) -> None:
    """Give A and B seeded values, so that the delta is not zero."""
    layout = model_parallel_layout()
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            for leaf, parameter in (("A", adapter.A), ("B", adapter.B)):
                sharding = adapter.shardings[leaf]
                whole = seeded_noise(sharding.full_shape(parameter.shape, layout[1]), seed, name + leaf) * std
                parameter.copy_(sharding.shard(whole, *layout))


def seeded_noise(shape, seed: int, name: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + zlib.crc32(name.encode())))


def tiny_batch(with_image=(True, False), seed=0, length=20, answer=4) -> dict:
    """One row per entry of `with_image`: BOS, the image's places if it has one, then words; the last are the answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(with_image)
    ids = torch.randint(1, 1000, (rows, length), generator=generator)
    embed = torch.zeros(rows, length, dtype=torch.long)
    vision, patches = embed.clone(), embed.clone()
    for row, has_image in enumerate(with_image):
        if has_image:
            embed[row, 1 : PATCHES + 3] = 1
            vision[row, 1 : PATCHES + 2] = 1
            patches[row, 2 : PATCHES + 2] = 1
    labels = torch.full_like(ids, IGNORED)
    labels[:, -answer:] = ids[:, -answer:]
    images = torch.randn(sum(with_image), 3, 21, 21, generator=generator)
    return dict(
        input_ids=ids,
        position_ids=torch.stack([position_ids_for(row) for row in patches]),
        labels=labels,
        image_embed_mask=embed,
        vision_expert_mask=vision,
        images=images,
        broken=[],
    )


def logits_of(model, batch: dict) -> torch.Tensor:
    keys = ("images", "cross_images", "image_embed_mask", "vision_expert_mask")
    return model(batch["input_ids"], batch["position_ids"], -1, **{key: batch[key] for key in keys if key in batch})[0]


def adapter_gradients(model, batch):
    model.train()
    logits_of(model, batch).float().pow(2).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

"""Prompts to answer, and the answers without a cache."""

import torch

from sat_lora import add_lora
from tests.support.tiny import PATCHES, fill_adapters, logits_of, tiny_batch, tiny_model

NEVER = -1  # an end of sequence that no model says


def adapted_model(dtype=torch.float32):
    """The tiny CogVLM with a filled adapter, in evaluation mode."""
    model = tiny_model(dtype).eval()
    add_lora(model, r=4)
    fill_adapters(model)
    return model


@torch.no_grad()
def without_cache(model, batch, count):
    """The same tokens, each from a forward pass over everything before it. New tokens are language."""
    batch = dict(batch)
    for _ in range(count):
        token = logits_of(model, batch)[:, -1:].argmax(-1)
        zeros = torch.zeros_like(token)
        grown = {
            "input_ids": token,
            "position_ids": batch["position_ids"][:, -1:] + 1,
            "image_embed_mask": zeros,
            "vision_expert_mask": zeros,
        }
        batch |= {key: torch.cat([batch[key], value], 1) for key, value in grown.items()}
    return batch["input_ids"][:, -count:].tolist()


def joined(batches):
    """One batch of several with other lengths, padded on the right with what must not matter."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(key, fill):
        rows = [torch.nn.functional.pad(b[key], (0, longest - b[key].shape[1]), value=fill) for b in batches]
        return torch.cat(rows)

    return dict(
        input_ids=padded("input_ids", 7),
        position_ids=padded("position_ids", 3),
        image_embed_mask=padded("image_embed_mask", 0),
        vision_expert_mask=padded("vision_expert_mask", 0),
        images=torch.cat([batch["images"] for batch in batches if batch["image_embed_mask"].any()]),
        lengths=torch.tensor([batch["input_ids"].shape[1] for batch in batches for _ in batch["input_ids"]]),
    )


def prompts_of_many_kinds():
    """With an image and without, of four lengths; one ends with its image."""
    return [
        tiny_batch((True,), seed=1, length=20),
        tiny_batch((False,), seed=2, length=5),
        tiny_batch((True,), seed=3, length=PATCHES + 3),
        tiny_batch((False,), seed=4, length=26),
    ]

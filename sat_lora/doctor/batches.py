"""Batches of each kind that a run may meet, made of one real batch."""

import torch

from sat_lora.cogvlm.inputs.text import IGNORED, position_ids_for
from sat_lora.training.steps.loss import count_answer_tokens

IMAGES = "images"
TEXT = "text alone"
MIXED = "images on some ranks"
_SEQUENCES = ("input_ids", "position_ids", "labels", "image_embed_mask", "vision_expert_mask")


def kinds_of(batch: dict, data_parallel_rank: int = 0) -> dict[str, dict]:
    """Return {kind: batch} of a collated batch: with images, its text alone, and one of the two by rank.

    A batch without images is there as text alone.
    """
    text = text_alone(batch)
    if not bool(batch["image_embed_mask"].any()):
        return {TEXT: text}
    return {IMAGES: batch, TEXT: text, MIXED: text if data_parallel_rank % 2 else batch}


def text_alone(batch: dict) -> dict:
    """Return the batch with the images' places taken out of its rows and without images, as `collate` gives it."""
    rows = []
    for number in range(len(batch["input_ids"])):
        keep = batch["image_embed_mask"][number] == 0
        row = {name: batch[name][number][keep] for name in _SEQUENCES}
        row["position_ids"] = position_ids_for(torch.zeros_like(row["input_ids"]))
        rows.append(row)
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"labels": IGNORED}
    stacked = {
        name: torch.stack([_padded(row[name], length, fill.get(name, 0)) for row in rows]) for name in _SEQUENCES
    }
    images = {name: batch[name][:0] for name in ("images", "cross_images") if name in batch}
    return {**batch, **stacked, **images, "broken": [], "broken_samples": []}


def has_labels(batch: dict) -> bool:
    """Return whether some token of the batch is to be learnt."""
    return count_answer_tokens(batch["labels"]) > 0


def _padded(values: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    return torch.cat([values, values.new_full((length - len(values),), fill)])

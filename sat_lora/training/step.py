"""One training step and the validation loss."""

import warnings
from collections.abc import Iterable

import torch

from sat_lora.training.distributed import World
from sat_lora.training.loss import answer_loss_sum, count_answer_tokens, sum_over_data_parallel

MODEL_INPUTS = ("input_ids", "position_ids", "images", "image_embed_mask", "vision_expert_mask")


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a collated batch on `device`; what is no tensor is left out."""
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}


def forward(model, batch: dict) -> torch.Tensor:
    """Logits (batch, seq, vocabulary) for a batch on the model's device."""
    inputs = {key: batch[key] for key in MODEL_INPUTS}
    return model(inputs.pop("input_ids"), inputs.pop("position_ids"), -1, **inputs)[0]


def train_step(engine, micro_batches: list[dict], world: World, tokens: float) -> float:
    """One optimizer step; returns the mean loss per answer token over all ranks and micro-batches.

    tokens: answer tokens of the step over all ranks. Each micro-batch's loss is a sum divided
    by it. DeepSpeed then averages over micro-batches and data-parallel ranks, so it is multiplied by both: the gradient
    is that of the joined batch, however the tokens are spread.
    """
    weight = len(micro_batches) * world.data_parallel_size / max(tokens, 1)
    total = torch.zeros((), device=world.device)
    for batch in micro_batches:
        batch = to_device(batch, world.device)
        loss = answer_loss_sum(forward(engine, batch), batch["labels"])
        engine.backward(loss * weight)
        engine.step()
        total += loss.detach()
    (total,) = sum_over_data_parallel(total.item(), device=world.device)
    return total / max(tokens, 1)


@torch.no_grad()
def validation_loss(engine, batches: Iterable[dict], world: World) -> float:
    """Mean loss per answer token over `batches` of all ranks; every rank has the same number of them."""
    engine.eval()
    total, tokens = 0.0, 0
    with warnings.catch_warnings():
        # Checkpointed layers run here as well, and torch warns that nothing asks for a gradient.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        for batch in batches:
            tokens += count_answer_tokens(batch["labels"])
            batch = to_device(batch, world.device)
            total += answer_loss_sum(forward(engine, batch), batch["labels"]).item()
    engine.train()
    total, tokens = sum_over_data_parallel(total, tokens, device=world.device)
    return total / max(tokens, 1)

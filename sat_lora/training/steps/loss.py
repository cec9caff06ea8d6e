"""The training loss, weighted so that every answer token counts the same, wherever in the cluster it sits."""

import torch

from sat_lora._sat import mpu
from sat_lora.cogvlm.inputs.text import IGNORED
from sat_lora.cogvlm.network.head import OnLogits

MODEL_INPUTS = ("input_ids", "position_ids", "images", "image_embed_mask", "vision_expert_mask", "labels")
CROSS_IMAGES = "cross_images"  # only in batches for a model with a second vision encoder, and there not without images


def answer_loss_sum(model, batch: dict, on_logits: OnLogits | None = None) -> torch.Tensor:
    """Return the cross-entropy summed over the answer tokens of a batch, a scalar in float32.

    model: a CogVLM, or an engine around one, on the device of the batch. The head runs on the answers alone; without
    gradients, on_logits is given what it makes of them.
    """
    inputs = {key: batch[key] for key in MODEL_INPUTS}
    if CROSS_IMAGES in batch:
        inputs[CROSS_IMAGES] = batch[CROSS_IMAGES]
    if on_logits is not None:
        inputs["on_logits"] = on_logits
    return model(inputs.pop("input_ids"), inputs.pop("position_ids"), -1, **inputs)[0]


def count_answer_tokens(labels: torch.Tensor) -> int:
    """Return how many of the labels (batch, seq) take part in the loss."""
    return int((labels[:, 1:] != IGNORED).sum())


def sum_over_data_parallel(*values: torch.Tensor | float, device: torch.device) -> list[float]:
    """Return each value summed over the data-parallel ranks, as numbers; the host waits for the device."""
    return sum_on_device(*values, device=device).tolist()


def sum_on_device(*values: float, device: torch.device) -> torch.Tensor:
    """Return each value summed over the data-parallel ranks, float64 (values,) on the device: the host does
    not wait.
    """
    sums = torch.stack([on_device(value, device) for value in values])
    torch.distributed.all_reduce(sums, group=mpu.get_data_parallel_group())
    return sums


def sum_over_ranks(*values: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Return each value summed over all ranks, those that share a sample included: float64 (values,) on the device.

    The host waits neither for values that are tensors nor for the sums.
    """
    sums = torch.stack([on_device(value, device) for value in values])
    torch.distributed.all_reduce(sums)
    return sums


def on_device(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Return a value as a float64 scalar on the device.

    A number is written there by a kernel: a copy from the host would wait for the device.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)

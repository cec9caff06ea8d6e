"""The training loss, weighted so that every answer token counts the same, wherever in the cluster it sits."""

import torch
from torch.nn import functional as F

from sat_lora._sat import mpu
from sat_lora.cogvlm.text import IGNORED


def answer_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over answer tokens of the cross-entropy, in float32. logits (batch, seq, vocabulary), labels (batch, seq)."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def count_answer_tokens(labels: torch.Tensor) -> int:
    """Labels that take part in the loss."""
    return int((labels[:, 1:] != IGNORED).sum())


def sum_over_data_parallel(*values: torch.Tensor | float, device: torch.device) -> list[float]:
    """Each value summed over the data-parallel ranks."""
    return sum_on_device(*values, device=device).tolist()


def sum_on_device(*values: float, device: torch.device) -> torch.Tensor:
    """The same as a float64 tensor (values,) on the device: the host does not wait for it."""
    sums = torch.stack([on_device(value, device) for value in values])
    torch.distributed.all_reduce(sums, group=mpu.get_data_parallel_group())
    return sums


def sum_over_ranks(*values: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Each value summed over all ranks, those that share a sample included: float64 (values,) on the device.

    The host waits neither for values that are tensors nor for the sums.
    """
    sums = torch.stack([on_device(value, device) for value in values])
    torch.distributed.all_reduce(sums)
    return sums


def on_device(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A scalar in float64. A number is written there by a kernel: a copy from the host would wait for the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)

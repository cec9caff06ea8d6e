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


def sum_over_data_parallel(*values: float, device: torch.device) -> list[float]:
    """Each value summed over the data-parallel ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, group=mpu.get_data_parallel_group())
    return tensor.tolist()


def sum_over_ranks(*values: torch.Tensor | float, device: torch.device) -> list[float]:
    """Each value summed over all ranks, those that share a sample included; tensors are not waited for before."""
    tensor = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()

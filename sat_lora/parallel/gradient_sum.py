"""A correction for the end of SAT's transformer under model parallelism.

SAT 0.4.12 passes the final hidden state of every transformer through `copy_to_model_parallel_region`, whose backward
sums the gradient over the ranks. That is right only if what follows gives each rank a part of the gradient. What
follows here gives each rank the whole: the column-parallel head sums by itself, and CogVLM's projector is the same on
every rank. So at model-parallel size n every gradient below would come out n times too large.
"""

from typing import Any

import torch

from sat_lora.parallel.sharding import model_parallel_layout


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, divisor: int) -> torch.Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad / ctx.divisor, None


def undo_gradient_sum(final_hidden: torch.Tensor) -> torch.Tensor:
    """Return what a `final_forward` hook receives; its gradient is divided by the model-parallel size."""
    _, size = model_parallel_layout()
    if size == 1:
        return final_hidden
    divided: torch.Tensor = _DivideGradient.apply(final_hidden, size)
    return divided

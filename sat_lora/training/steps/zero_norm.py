"""The gradient norm and the clipping of ZeRO 1 and 2, in a few kernels and without waiting for the device.

DeepSpeed 0.19.8 converts each parameter's gradient to float64 and takes its norm, two calls for each of CogVLM-17B's
1,152 adapter parameters; then, for every group of the optimizer, it copies a constant to the device and brings a flag
back. Each of these waits. What comes out here is the same, bit for bit.
"""

from collections.abc import Sequence

import torch
from deepspeed import comm
from deepspeed.runtime.utils import is_model_parallel_parameter


def speed_up_norm(optimizer) -> None:
    """Give a ZeRO 1 or 2 optimizer the norm and the clipping of this module; others are left as they are."""
    if not hasattr(optimizer, "get_grad_norm_direct") or not hasattr(optimizer, "single_partition_of_fp32_groups"):
        return
    if optimizer.cpu_offload:
        return

    def get_grad_norm_direct(gradients: Sequence[torch.Tensor], params, norm_type: int = 2) -> torch.Tensor:
        """Return the norm of one group's gradients over all ranks, -1 if it is not finite: a float32 scalar."""
        own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        if optimizer.model_parallel_rank:  # what all model-parallel ranks hold counts once
            own = [gradient for gradient, p in zip(own, params) if is_model_parallel_parameter(p)]
        total = torch.zeros((), dtype=torch.float32, device=optimizer.device)
        if own:
            norms = torch._foreach_norm(own, norm_type, dtype=torch.float64)
            total = torch.stack(norms).square().sum().float()
        comm.all_reduce(total, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=total, op=comm.ReduceOp.SUM)
        norm = total.sqrt()
        return norm.masked_fill(~norm.isfinite(), -1.0)

    def unscale_and_clip_grads(gradients: Sequence[torch.Tensor], total_norm: torch.Tensor) -> None:
        """Divide by the loss scale, and by as much as `total_norm` is above the norm to clip to."""
        scale = optimizer.loss_scale
        if optimizer.clip_grad > 0.0:
            norm = total_norm.masked_fill(total_norm < 0, float("inf"))
            scale = (((norm / scale) + 1e-6) / optimizer.clip_grad).clamp(min=1.0) * scale
        elif scale == 1.0:
            return
        for gradient in gradients:
            gradient.mul_(1.0 / scale)

    optimizer.get_grad_norm_direct = get_grad_norm_direct
    optimizer.unscale_and_clip_grads = unscale_and_clip_grads

"""The linear that ZeRO-3 puts in place of torch's, rounding as often as torch's does."""

import torch

from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.quantized.quantized_weight import linear as quantized_linear


def round_once() -> None:
    """Let ZeRO-3's linear add the bias before it rounds; where it is not in use, nothing changes.

    DeepSpeed 0.19.8 replaces `torch.nn.functional.linear` by one that does not keep gathered weights for backward. It
    adds the bias within the product if x is (tokens, in), but to the rounded product if x has another shape, so that a
    layer in half precision would compute other values than under ZeRO-2.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if torch.nn.functional.linear is zero3_linear_wrap:
        torch.nn.functional.linear = linear_of_zero3


def linear_of_zero3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the linear (..., out) of x (..., in) by ZeRO-3's function, which gets x as (tokens, in) if it is to add a
    bias; by its own where the weight is quantised, of which nothing is gathered.
    """
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if bias is None:
        return zero3_linear_wrap(x, weight)
    return zero3_linear_wrap(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

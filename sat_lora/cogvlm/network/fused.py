"""Rotary embedding of fused q/k/v, and SiLU(gate) * up, in one pass over memory each way on a GPU.

rotary      (batch, seq, (heads + 2 key heads) head_dim) -> q (batch, heads, seq, head_dim), k and v with the key heads,
            q and k turned;
            backward turns the gradients by the opposite angles and keeps the angles alone
silu_mul    backward makes both gradients from gate and up, the only tensors that it keeps

The Triton kernels compute in float32 and round once. Elsewhere plain torch does the same, seen by autograd.
"""

import torch
from torch.nn import functional as F

from sat_lora._triton import device_of
from sat_lora.cogvlm.network.rotary import rotate

BLOCK = 1024  # elements of one program


def rotary(
    mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, key_heads: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Return q (batch, heads, seq, head_dim), k and v (batch, key heads, seq, head_dim), q and k turned.

    mixed: (batch, seq, (heads + 2 key heads) head_dim), the blocks q, k and v. cos, sin: (batch, 1, seq, head_dim / 2),
    in its dtype. key_heads: None is as many as there are of q.
    """
    if _has_kernels(mixed):
        return _Rotary.apply(mixed, cos, sin, head_dim, key_heads)
    if key_heads is None:
        query, key, value = mixed.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    else:
        heads = mixed.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        query, key, value = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], dim=1)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return SiLU(gate) * up, both of one shape."""
    return _SiluMul.apply(gate, up) if _has_kernels(gate) else F.silu(gate) * up


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, head_dim, key_heads=None):
        batch, seq, width = mixed.shape
        key_heads = width // 3 // head_dim if key_heads is None else key_heads
        heads = width // head_dim - 2 * key_heads
        mixed = mixed.contiguous()
        cos = cos.contiguous()
        sin = sin.contiguous()
        parts = tuple(
            mixed.new_empty(batch, seq, count, head_dim).transpose(1, 2) for count in (heads, key_heads, key_heads)
        )
        _launch_rotary(mixed, parts, cos, sin, inverse=False)
        ctx.save_for_backward(cos, sin)
        return parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        cos, sin = ctx.saved_tensors
        batch, heads, seq, head_dim = gradients[0].shape
        parts = tuple(gradient if gradient.stride(-1) == 1 else gradient.contiguous() for gradient in gradients)
        mixed = parts[0].new_empty(batch, seq, (heads + 2 * gradients[1].shape[1]) * head_dim)
        _launch_rotary(mixed, parts, cos, sin, inverse=True)
        return mixed, None, None, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate = gate.contiguous()
        up = up.contiguous()
        product = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        _launch_elementwise("silu_mul", product, gate, up)
        return product

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        _launch_elementwise("silu_mul_backward", d_gate, d_up, gradient.contiguous(), gate, up)
        return d_gate, d_up


def _launch_rotary(mixed, parts, cos, sin, *, inverse: bool) -> None:
    from sat_lora.cogvlm.network import kernels

    batch, heads, seq, head_dim = parts[0].shape
    if mixed.numel() == 0:
        return
    half = head_dim // 2
    strides = [stride for part in parts for stride in part.stride()[:3]]
    with device_of(mixed):
        kernels.rotary[(batch * seq, 3)](
            mixed, *parts, cos, sin, seq, heads, parts[1].shape[1], half, *strides,
            INVERSE=inverse, HEADS=_power_of_two(heads), HALF=_power_of_two(half),
        )  # fmt: skip


def _launch_elementwise(name: str, *tensors: torch.Tensor) -> None:
    from sat_lora.cogvlm.network import kernels

    size = tensors[0].numel()
    if size:
        with device_of(tensors[0]):
            getattr(kernels, name)[(-(-size // BLOCK),)](*tensors, size, BLOCK=BLOCK)


def _has_kernels(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()

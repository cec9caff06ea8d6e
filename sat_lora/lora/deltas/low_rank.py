"""The arithmetic of one adapted linear, as one autograd Function and as a plain reference.

Shapes: y (tokens, out), x (tokens, in), A (slots * r, in), B (adapted rows of y, r), S = x A^T (tokens, slots * r).
A linear such as fused q/k/v has several slots: slot i owns columns [i r, (i + 1) r) of S and a range of y's columns.

    forward     S = (x * mask) A^T            y_slot += scale S_slot B_slot^T
    backward    dS_slot = dy_slot B_slot      dB_slot = scale dy_slot^T S_slot
                dA = scale dS^T (x * mask)    dx = scale (dS A) * mask        dy passes through unchanged

That is two products forward, and four backward beside the frozen dy W, with the scale inside them. Slots of equal width
that lie evenly spaced are one batched product.

Model parallelism: a column-parallel linear sums dS over the ranks (each sees its own part of y), a row-parallel one
sums S (each sees its own part of x). Both are tokens x r: no other communication.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.functional import linear  # torch's own: ZeRO-3 puts another one into `functional`

from sat_lora._sat import mpu
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.quantized.quantized_weight import QuantizedWeight

# From how many elements on the kernels of `delta_kernels` are used: launching one takes the host longer than torch's
# does, and cuBLAS is as fast where y is not large.
ADDITION_KERNEL_FROM = 2**25  # of y
DROPOUT_KERNELS_FROM = 2**25  # of x


@dataclass(frozen=True)
class RandomDropout:
    """Dropout of the inputs of A, each with a probability, drawn from torch's generator of the device.

    What is kept is told by a mask, which `project` draws: ones and zeros (tokens, in) in uint8 on a CPU; in bool on
    CUDA, where one kernel draws, multiplies and writes it; and for a large x there the seed alone, from which each of
    `delta_kernels` draws the mask anew.
    """

    probability: float

    def project(self, x: torch.Tensor, a: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return S (tokens, slots * r) of what is left of x (tokens, in), the mask, and the scale of the delta.

        The scale is the one given, or divided by the probability of keeping an input, where S has not been.
        """
        if _has_kernels(x, DROPOUT_KERNELS_FROM):
            from sat_lora.lora.deltas import delta_kernels

            seed = torch.empty((), dtype=torch.int64, device=x.device).random_()
            s = delta_kernels.project(x, a, seed, self._dropped)
            return s, seed, scale / (1 - self._dropped / 2**16)
        if x.is_cuda:
            x, mask = torch.native_dropout(x, self.probability, True)
            return x.mm(a.t()), mask, scale
        mask, keep_prob = dropout_mask(x, self.probability)
        return (x * mask).mm(a.t()), mask, scale / keep_prob

    def gradient_of_x(self, ds: torch.Tensor, a: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return dS A (tokens, in), dropped as x was."""
        if mask.dim():
            return self._drop(ds.mm(a), mask)
        from sat_lora.lora.deltas import delta_kernels

        return delta_kernels.spread(ds, a, mask, self._dropped)

    def gradient_of_a(
        self, ds: torch.Tensor, x: torch.Tensor, a: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return scale dS^T x (slots * r, in), of what is left of x (tokens, in); A gives its shape alone."""
        if mask.dim():
            return torch.addmm(a, ds.t(), self._drop(x, mask), beta=0, alpha=scale)
        from sat_lora.lora.deltas import delta_kernels

        return delta_kernels.gradient_of_a(ds, x, mask, self._dropped, scale)

    def _drop(self, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if mask.dtype is not torch.bool:
            return tensor * mask
        factor = 1 / (1 - self.probability)
        return torch.ops.aten.native_dropout_backward(tensor, mask, factor)  # tensor * mask * factor, in one kernel

    @property
    def _dropped(self) -> int:
        """How many of 2^16 numbers drop an element."""
        return round(self.probability * 2**16)


def _has_kernels(tensor: torch.Tensor, elements: int) -> bool:
    """Return whether `delta_kernels` take the tensor."""
    return tensor.is_cuda and tensor.numel() >= elements and tensor.dtype is not torch.float64


def _sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor, group=mpu.get_model_parallel_group())
    return tensor


def _add_slots(
    y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scale: float, layout: DeltaLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add scale S_slot B_slot^T to y_slot, in place; y (tokens, out), contiguous.

    What comes back is S and B as `_gradients_of_s_and_b` takes them: where one batched product served all slots, the
    views S (slots, tokens, r) and B (slots, r, width) that it was made of, else the two as they are.
    """
    if _has_kernels(y, ADDITION_KERNEL_FROM):
        from sat_lora.lora.deltas import delta_kernels

        delta_kernels.add_slots(y, s, b, scale, layout)
        return s, b
    if layout.is_whole:
        y.addmm_(s, b.t(), alpha=scale)
        return s, b
    rank = b.shape[1]
    runs = layout.runs
    for run in runs:
        columns = run.columns(y)
        ranks = run.ranks(s, rank)
        rows_transposed = run.rows_transposed(b)
        if y.is_cuda or y.itemsize > 2:
            columns.baddbmm_(ranks, rows_transposed, alpha=scale)
        else:  # on a CPU, oneDNN refuses a strided batch in half precision, and torch 2.13 warns of it
            for y_slot, s_slot, b_slot in zip(columns, ranks, rows_transposed):
                y_slot.addmm_(s_slot, b_slot, alpha=scale)
    return (ranks, rows_transposed) if len(runs) == 1 else (s, b)


_Constants = tuple[
    torch.Tensor | None,  # the product to be fused
    torch.Tensor | None,  # else W and the two biases to make it with, see `product_of`
    torch.Tensor | None,
    torch.Tensor | None,
    RandomDropout | None,
    float,
    DeltaLayout,
]
_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]
"""The gradients of y, x, A, B and the constants, None where one is not needed."""


class _AddDelta(torch.autograd.Function):
    """The autograd Function of one adapted linear.

    It is written out in one piece: it runs for every adapted linear of every pass, and each call of a helper shows.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: torch.Tensor | None,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        constants: _Constants,
    ) -> torch.Tensor:
        # `constants` is one tuple, since every further tensor among the arguments costs host time. What is fused
        # comes in it: an argument that is given back would be a view, which a model cannot change in place.
        product, weight, bias, added, dropout, scale, layout = constants
        dtype = x.dtype
        shape = x.shape
        rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        if y is not None:
            out = y.clone(memory_format=torch.contiguous_format)
        elif product is not None:
            out = product
        else:
            out = product_of(x, weight, bias, added)
        a_cast = a if a.dtype is dtype else a.to(dtype)
        b_cast = b if b.dtype is dtype else b.to(dtype)
        if dropout is None:
            s = linear(rows, a_cast)
            mask = None
        else:
            s, mask, scale = dropout.project(rows, a_cast, scale)
        if layout.sums_s:
            s = _sum_over_ranks(s)
        s, b_saved = _add_slots(out if len(shape) == 2 else out.view(-1, out.shape[-1]), s, b_cast, scale, layout)
        _, _, need_a, need_b, _ = ctx.needs_input_grad
        # LoRA-FA freezes A: backward does without x. What is cast is cast again, rather than kept.
        b_saved = b_saved if b_cast is b else b
        ctx.save_for_backward(rows if need_a else None, s if need_b else None, a, b_saved, mask, weight)
        ctx.constants = scale, layout, dropout, shape
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> _Gradients:
        # `once_differentiable` costs microseconds, and matters only where backward itself is recorded.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: FunctionCtx, dy: torch.Tensor) -> _Gradients:
    x, s, a, b, mask, weight = ctx.saved_tensors
    need_y, need_x, need_a, _, _ = ctx.needs_input_grad
    scale, layout, dropout, shape = ctx.constants
    dtype = dy.dtype
    rows = dy if len(shape) == 2 else dy.reshape(-1, dy.shape[-1])
    a_cast = a if a.dtype is dtype else a.to(dtype)
    b_cast = b if b.dtype is dtype else b.to(dtype)
    dx = None
    da = None
    ds, ds_transposed, db = _gradients_of_s_and_b(rows, s, b_cast, scale, layout, need_x or need_a)
    if db is not None and b_cast is not b:
        db = db.to(b.dtype)
    if ds is not None and need_x and weight is not None:
        dx = ds.mm(a_cast) if dropout is None else dropout.gradient_of_x(ds, a_cast, mask)
        if type(weight) is QuantizedWeight:  # what torch would ask of it, asked at once
            weight = weight.decoded_for(rows)
        dx.addmm_(rows, weight, beta=scale)  # the large product adds the small one where it writes
        if layout.sums_ds:
            dx = _sum_over_ranks(dx)
    if ds is not None and layout.sums_ds and (need_a or weight is None):
        ds = _sum_over_ranks(ds.contiguous())
        ds_transposed = ds.t()
    if ds is not None and need_x and weight is None:
        dx = (ds.mm(a_cast) if dropout is None else dropout.gradient_of_x(ds, a_cast, mask)).mul_(scale)
    if need_a:
        if dropout is None:
            da = torch.addmm(a_cast, ds_transposed, x, beta=0, alpha=scale)  # A gives its shape alone
        else:
            da = dropout.gradient_of_a(ds, x, a_cast, mask, scale)
        if a_cast is not a:
            da = da.to(a.dtype)
    if dx is not None and len(shape) != 2:
        dx = dx.view(shape)
    return dy if need_y else None, dx, da, db, None


_backward_once = torch.autograd.function.once_differentiable(_backward)

# What torch 2.13's `Function.apply` ends in. Before, it prepares the arguments for functorch, in Python, which shows
# in what a delta costs, and is of no use to a Function without `setup_context`.
_apply_directly = super(torch.autograd.Function, _AddDelta).apply


class _NoTokens(torch.autograd.Function):
    """The autograd Function of an adapted linear for no tokens: A and B get zeros, and nothing is multiplied."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, width: int) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        return x.new_empty((*x.shape[:-1], width))

    @staticmethod
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(
            torch.zeros_like(t) if need else None for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad)
        ), None


def _gradients_of_s_and_b(
    dy: torch.Tensor, s: torch.Tensor | None, b: torch.Tensor, scale: float, layout: DeltaLayout, need_s: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return dS (tokens, slots * r), not yet scaled, dS^T, and dB (adapted rows, r), from dy (tokens, out).

    Each of them is None where it is not needed.
    s: None where dB is not needed. S and B as they are, or as `_add_slots` gives them back. In the products with beta
    0, B gives the shape alone.
    """
    if layout.is_whole:
        ds = dy.mm(b) if need_s else None
        db = None if s is None else torch.addmm(b, dy.t(), s, beta=0, alpha=scale)
        return ds, None if ds is None else ds.t(), db
    rank = b.shape[1]
    ds_parts = []
    db_parts = []
    for run in layout.runs:
        columns = run.columns_transposed(dy)
        rows_transposed = b if b.dim() == 3 else run.rows_transposed(b)
        if need_s:
            ds_parts.append(torch.bmm(rows_transposed, columns))  # (count, r, tokens): joined, it is dS^T as it lies
        if s is not None:
            ranks = s if s.dim() == 3 else run.ranks(s, rank)
            db_parts.append(torch.baddbmm(rows_transposed.mT, columns, ranks, beta=0, alpha=scale))
    ds_transposed = _joined(ds_parts) if need_s else None
    return ds_transposed if ds_transposed is None else ds_transposed.t(), ds_transposed, _joined(db_parts)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Return (count, n, m) parts as one tensor (sum of count * n, m), a view of a single part; None without any."""
    if len(parts) == 1:
        count, rows, columns = parts[0].shape
        return parts[0].view(count * rows, columns)
    return torch.cat([part.flatten(0, 1) for part in parts]) if parts else None


def add_delta(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dropout: RandomDropout | None,
    scale: float,
    layout: DeltaLayout,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return y (..., out) with the low-rank delta of x (..., in) added.

    Without a weight y is left as it is and passes its gradient on. With one, y = x W^T is fused with the delta: that
    goes into y in place, what y came from gets no gradient, and that of x, dy W + dS A, is made in one buffer, which
    saves autograd a pass over two more.

    y and x have one dtype, and y is contiguous where it is fused; A and B may have another dtype and are cast, x never
    is. dropout: works on x (tokens, in).
    """
    # Under functorch's transforms (vmap, grad) torch's own `apply` says that they cannot be used.
    apply = _AddDelta.apply if torch._C._are_functorch_transforms_active() else _apply_directly
    if weight is None:
        return apply(y, x, a, b, (None, None, None, None, dropout, scale, layout))
    return apply(None, x, a, b, (y.detach(), weight, None, None, dropout, scale, layout))


def product_of(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, added: torch.Tensor | None
) -> torch.Tensor:
    """Return x W^T + bias, and `added` to what that is rounded to: (..., out), as the layer itself would."""
    if type(weight) is QuantizedWeight:  # likewise
        weight = weight.decoded_for(x)
    y = F.linear(x, weight, bias)
    return y if added is None else y + added


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    added: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    dropout: RandomDropout | None,
    scale: float,
    layout: DeltaLayout,
) -> torch.Tensor:
    """Return `product_of` (..., out) with the low-rank delta of x added, W and biases frozen.

    It is `add_delta` that makes the product as well: autograd hears of the one Function alone, and nothing of the
    layer's own is called.
    """
    if x.numel() == 0 and layout.mp_size == 1:  # ranks of model parallelism go on to meet where they always do
        return _NoTokens.apply(x, a, b, layout.width)
    apply = _AddDelta.apply if torch._C._are_functorch_transforms_active() else _apply_directly
    return apply(None, x, a, b, (None, weight, bias, added, dropout, scale, layout))


def add_delta_in_place(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dropout: RandomDropout | None,
    scale: float,
    layout: DeltaLayout,
) -> None:
    """Add the delta to y (..., out) itself, contiguous, where autograd does not record. One dtype for all four."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if dropout is None:
        s = linear(rows, a)
    else:
        s, _, scale = dropout.project(rows, a, scale)
    if layout.sums_s:
        s = _sum_over_ranks(s)
    _add_slots(y if y.dim() == 2 else y.view(-1, y.shape[-1]), s, b, scale, layout)


def dropout_mask(x: torch.Tensor, probability: float) -> tuple[torch.Tensor, float]:
    """Return (mask (tokens, in) of ones and zeros in uint8, the probability of a one, that of keeping an input).

    It comes from 16 random bits each, which is a quarter of the time of `bernoulli_` on a CPU; the probability is
    rounded to 2^-16. Multiplying by uint8 takes a CPU a third of the time of multiplying by bool.
    """
    count = x.numel()
    dropped = round(probability * 2**16)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    mask = (bits.view(torch.int16)[:count] >= dropped - 2**15).view(torch.uint8)
    return mask.view(-1, x.shape[-1]), 1 - dropped / 2**16


def add_delta_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dropout: RandomDropout | None,
    scale: float,
    layout: DeltaLayout,
) -> torch.Tensor:
    """Return what `add_delta` does, by plain autograd and SAT's communication functions: slow, and easy to read."""
    if dropout is not None:
        rows = x.detach().reshape(-1, x.shape[-1])
        _, mask, scale = dropout.project(rows, a.detach().to(x.dtype), scale)
        ones = x.new_ones(len(rows), 1), x.new_ones(1, x.shape[-1])
        x = x * dropout.gradient_of_x(*ones, mask).view(x.shape)  # what every element is multiplied by
    s = F.linear(x, a.to(x.dtype))
    if layout.kind == "row":
        s = mpu.reduce_from_model_parallel_region(s)
    elif layout.kind == "column":
        s = mpu.copy_to_model_parallel_region(s)
    parts = {columns.start: y[..., columns] for columns in layout.gaps()}
    for columns, rows, ranks in layout.pieces(b.shape[1]):
        parts[columns.start] = y[..., columns] + scale * F.linear(s[..., ranks], b[rows].to(x.dtype))
    return torch.cat([parts[start] for start in sorted(parts)], dim=-1)

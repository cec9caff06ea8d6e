"""The Triton kernels of `fused`. Importing this imports triton, so it is imported where a kernel is launched."""

import triton
import triton.language as tl


@triton.jit
def rotary(
    mixed, query, key, value, cos, sin, seq, heads, key_heads, half,
    q_batch, q_head, q_seq, k_batch, k_head, k_seq, v_batch, v_head, v_seq,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Turn one token's q, k or v on its way from `mixed` to the heads; with INVERSE back from there, turned back."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch = token // seq
    place = token % seq
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    before = tl.where(part == 0, 0, heads + (part - 1) * key_heads)  # heads of the token that lie before this part's
    inside = (head < tl.where(part == 0, heads, key_heads)) & (column < half)
    in_mixed = mixed + (token * (heads + 2 * key_heads) + before + head) * 2 * half + column
    if part == 0:
        in_heads = query + batch * q_batch + place * q_seq + head * q_head + column
    elif part == 1:
        in_heads = key + batch * k_batch + place * k_seq + head * k_head + column
    else:
        in_heads = value + batch * v_batch + place * v_seq + head * v_head + column
    angle = token * half + column
    c = tl.load(cos + angle, mask=column < half, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
        source = in_heads
        target = in_mixed
    else:
        source = in_mixed
        target = in_heads
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    turns = part < 2  # v is handed on
    to_first = tl.where(turns, first * c - second * s, first)
    to_second = tl.where(turns, second * c + first * s, second)
    tl.store(target, to_first.to(target.dtype.element_ty), mask=inside)
    tl.store(target + half, to_second.to(target.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(product, gate, up, size, BLOCK: tl.constexpr):
    """Compute product = SiLU(gate) * up, each of `size` elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + place, (g * tl.sigmoid(g) * u).to(product.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_backward(d_gate, d_up, d_product, gate, up, size, BLOCK: tl.constexpr):
    """Compute the gradients of gate and up from that of their product, each of `size` elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    d = tl.load(d_product + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(d_gate + place, (d * u * (sigmoid + silu * (1 - sigmoid))).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + place, (d * silu).to(d_up.dtype.element_ty), mask=inside)

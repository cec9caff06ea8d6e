"""Softmax attention that never materialises the scores when the mask is causal or full."""

import torch
from torch.nn import functional as F

CAUSAL = "causal"
FULL = "full"
MASKED = "masked"


def mask_kind(mask: torch.Tensor | int | None, query_length: int) -> str:
    """Return what SAT's `attention_mask` means: None is full, a negative number causal, a tensor is looked at once.

    A tensor is (..., query, key) with 1 where a query may look. Asking it synchronises with the device, so this is
    done once per batch and never in a layer.
    """
    if mask is None:
        return FULL
    if isinstance(mask, int):
        return CAUSAL
    if bool((mask > 0).all()):
        return FULL
    if mask.shape[-2:] == (query_length, query_length) and torch.equal(mask > 0, torch.ones_like(mask).tril() > 0):
        return CAUSAL
    return MASKED


def attend(query, key, value, mask, kind: str, dropout_p: float = 0.0) -> torch.Tensor:
    """Return softmax attention (batch, heads, seq, head_dim) of three such tensors, scaled by head_dim^-0.5.

    Keys and values may have fewer heads, of which each serves as many of the query's in a row.
    """
    key = repeat_heads(key, query.shape[1])
    value = repeat_heads(value, query.shape[1])
    allowed = (mask > 0) if kind == MASKED else None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, dropout_p=dropout_p, is_causal=kind == CAUSAL
    )


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Return x (batch, fewer heads, seq, head_dim) as (batch, heads, seq, head_dim), each head so many times in a row.

    x itself where it has as many.
    """
    if x.shape[1] == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)

"""SAT's rotary embedding without Triton, for models that run on the CPU."""

import torch
from sat.model.position_embedding.triton_rotary_embeddings import FastRotaryEmbedding
from torch import nn


class PlainRotary(nn.Module):
    """What `FastRotaryEmbedding` computes: that is a Triton kernel for CUDA alone, and writes in place.

    It turns the first `dim` columns of each head: the first half against the second, or (ChatGLM2 and 3) each even
    column against the odd one beside it.
    """

    def __init__(self, fast: FastRotaryEmbedding):
        super().__init__()
        self.dim, self.interleaved = fast.dim, fast.interleaved
        self.register_buffer("inv_freq", fast.inv_freq.clone())

    def forward(self, q, k, position_ids, max_seqlen=None, layer_id=0):
        """q (batch, heads, seq, head), k (batch, key heads, seq, head), position_ids (batch, seq): both, turned."""
        angles = position_ids[:, None, :, None].to(q.dtype) * self.inv_freq.to(q.dtype)
        return self._turn(q, angles.cos(), angles.sin()), self._turn(k, angles.cos(), angles.sin())

    def _turn(self, x, cos, sin):
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        first, second = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, -1)
        first, second = first * cos - second * sin, second * cos + first * sin
        turned = torch.stack([first, second], -1).flatten(-2) if self.interleaved else torch.cat([first, second], -1)
        return torch.cat([turned, rest], -1)


def with_plain_rotary(model: nn.Module) -> nn.Module:
    """The model, with every Triton rotary embedding in it replaced, wherever it sits (a mixin or the transformer)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FastRotaryEmbedding):
                setattr(module, name, PlainRotary(child))
    return model

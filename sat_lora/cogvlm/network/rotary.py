"""Rotary position embedding in plain torch: any device, and every step seen by autograd. `fused` has it as one kernel.

SAT's own is a Triton kernel that writes in place: CUDA only, and invisible to autograd's version counter.
The buffer keeps the published name, `rotary_emb.inv_freq`.
"""

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    """Half-rotation over the whole head dimension (RoFormer, arXiv 2104.09864): the first half against the second.

    Angles are computed in the buffer's own dtype, as the published model does (`pos_idx_in_fp32=False`).
    """

    def __init__(self, head_dim: int, base: float = 10000.0):
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inv_freq", 1.0 / base**exponents)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines for (batch, seq) positions, each (batch, 1, seq, head_dim / 2) in `dtype`."""
        angles = position_ids[:, None, :, None].to(self.inv_freq.dtype) * self.inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x (batch, heads, seq, head_dim) turned by the angles of its positions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

"""Codes and scales of which each data-parallel rank holds a part, gathered where they are used."""

from dataclasses import dataclass

import torch

# As torch 2.13 calls it, which warns of the name that it had before.
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


@dataclass(frozen=True)
class Partition:
    """How the bytes of codes (out, in / elements_per_code) and scales (out, in / block) are cut over a group's ranks.

    They are laid end to end and cut into equal parts, the last one filled up with zeros.
    """

    group: torch.distributed.ProcessGroup
    codes_shape: tuple[int, int]
    codes_dtype: torch.dtype
    scales_shape: tuple[int, int]

    @property
    def part_bytes(self) -> int:
        """The bytes that each rank holds."""
        size = torch.distributed.get_world_size(self.group)
        return -(-sum(self._sizes) // size)

    @property
    def _sizes(self) -> tuple[int, int]:
        codes = torch.Size(self.codes_shape).numel() * self.codes_dtype.itemsize
        return codes, torch.Size(self.scales_shape).numel() * torch.bfloat16.itemsize

    def part(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return this rank's bytes (part_bytes,) of whole codes and scales, in memory of their own."""
        count = self.part_bytes
        start = count * torch.distributed.get_rank(self.group)
        part = torch.zeros(count, dtype=torch.uint8, device=codes.device)
        edge = 0
        for whole in (codes, scales):
            flat = whole.contiguous().view(-1).view(torch.uint8)
            first = max(start - edge, 0)
            last = min(start + count - edge, len(flat))
            if first < last:
                part[first + edge - start : last + edge - start] = flat[first:last]
            edge += len(flat)
        return part

    def gathered(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whole codes and scales, of every rank's part; every rank of the group has to call it."""
        size = torch.distributed.get_world_size(self.group)
        whole = torch.empty(size * len(part), dtype=torch.uint8, device=part.device)
        _all_gather(whole, part, group=self.group)
        codes, scales = whole[: sum(self._sizes)].split(self._sizes)
        scales = scales.clone().view(torch.bfloat16) if self._sizes[0] % 2 else scales.view(torch.bfloat16)
        return codes.view(self.codes_dtype).view(self.codes_shape), scales.view(self.scales_shape)

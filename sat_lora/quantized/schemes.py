"""The schemes by which a weight is held in fewer bits.

W (out, in) is cut into blocks along its rows, none of which crosses a row. Each block has one scale in bfloat16 and a
code for each element:

    scheme   bits of a code   what a block decodes to                     bits in all, with blocks of 64
    nf4      4                scale * one of 16 levels (QLoRA, 2305.14314)   4.25
    int8     8                scale * a whole number from -127 to 127        8.25

A block knows nothing beyond itself, so the slice that a model-parallel rank encodes has the values of the whole's.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch.nn import functional as F

from sat_lora.quantized.kernels import decode_nf4, has_kernels

BLOCKS = (64, 32)  # the first that divides a row
ENCODED_AT_ONCE = 2**20  # elements: the temporaries take some 16 bytes each
DECODED_AT_ONCE = 2**22  # the same, 6 bytes each


class Scheme(Protocol):
    """How the elements of blocks become codes and scales, and back."""

    name: str
    codes_dtype: torch.dtype
    elements_per_code: int
    """How many elements of W an element of the codes holds."""

    def encode(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes (blocks, block / elements_per_code) and the scales (blocks,) in bfloat16 of W's blocks
        (blocks, block).
        """
        ...

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return W (out, in) of its codes (out, in / elements_per_code) and scales (out, in / block), rounded once to
        `dtype`.
        """
        ...


class NF4:
    """Four bits: the quantiles of a normal distribution, as levels from -1 to 1 of the largest of a block.

    Codes and values are those of bitsandbytes without double quantisation, whose scales are rounded to bfloat16: two
    codes to a byte, the earlier one in its upper half.
    """

    name = "nf4"
    codes_dtype = torch.uint8
    elements_per_code = 2
    levels = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )

    def __init__(self) -> None:
        self._pairs: dict[torch.device, torch.Tensor] = {}

    def encode(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales of blocks; each element takes the nearest level."""
        blocks = blocks.float()
        largest = blocks.abs().amax(1, keepdim=True)
        levels = torch.tensor(self.levels, device=blocks.device)
        shares = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
        return (codes[:, ::2] << 4) | codes[:, 1::2], largest[:, 0].bfloat16()

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return W; on CUDA by the kernel of bitsandbytes, where that is installed."""
        if has_kernels(codes, block_of(self, codes, scales), dtype):
            return decode_nf4(codes, scales, dtype)
        return _in_parts(self._decode, codes, scales, dtype, codes.shape[1] * self.elements_per_code)

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        values = F.embedding(codes.int(), self._pairs_on(codes.device))  # (out, in / 2, 2)
        values = values.view(*scales.shape, -1).mul_(scales.float().unsqueeze(-1))
        return values.to(dtype).view(len(codes), -1)

    def _pairs_on(self, device: torch.device) -> torch.Tensor:
        """Return the two levels that each byte stands for: (256, 2), made once for a device."""
        pairs = self._pairs.get(device)
        if pairs is None:
            byte = torch.arange(256, device=device)
            levels = torch.tensor(self.levels, device=device)
            pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], 1)
            if has_values(pairs):
                self._pairs[device] = pairs
        return pairs


class Int8:
    """Eight bits: whole numbers of steps, as long as the 127th part of the largest of a block."""

    name = "int8"
    codes_dtype = torch.int8
    elements_per_code = 1

    def encode(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales of blocks; each element takes the nearest number of rounded steps."""
        blocks = blocks.float()
        scales = (blocks.abs().amax(1) / 127).bfloat16()
        steps = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        return (blocks / steps).round_().clamp_(-127, 127).to(torch.int8), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return W."""
        return _in_parts(self._decode, codes, scales, dtype, codes.shape[1])

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Code and scale have 15 bits together: only a dtype that cannot hold every scale needs float32.
        via = torch.float32 if dtype is torch.float16 else dtype
        values = codes.view(*scales.shape, -1).to(via).mul_(scales.to(via).unsqueeze(-1))
        return values.to(dtype).view(len(codes), -1)


SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in (NF4(), Int8())})
"""Every scheme by its name."""


def block_for(columns: int) -> int | None:
    """Return how many elements a block of a row of so many has; None where none of BLOCKS divides it."""
    return next((block for block in BLOCKS if columns and columns % block == 0), None)


def block_of(scheme: Scheme, codes: torch.Tensor, scales: torch.Tensor) -> int:
    """Return how many elements each block of encoded rows has."""
    return codes.shape[1] * scheme.elements_per_code // scales.shape[1]


def encode(weight: torch.Tensor, scheme: Scheme, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes (out, in / elements_per_code) and scales (out, in / block) of a weight (out, in).

    It is encoded some rows at a time, so that the temporaries stay small beside it.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // scheme.elements_per_code, dtype=scheme.codes_dtype, device=weight.device)
    scales = torch.empty(rows, columns // block, dtype=torch.bfloat16, device=weight.device)
    for part in _parts(rows, max(1, ENCODED_AT_ONCE // columns)) if has_values(weight) else ():
        part_codes, part_scales = scheme.encode(weight[part].reshape(-1, block))
        codes[part] = part_codes.view(-1, codes.shape[1])
        scales[part] = part_scales.view(-1, scales.shape[1])
    return codes, scales


def _in_parts(
    decode: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor],
    codes: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    columns: int,
) -> torch.Tensor:
    """Return W (out, in = columns), decoded some rows at a time for the same reason."""
    parts = [*_parts(len(codes), max(1, DECODED_AT_ONCE // columns))]
    if len(parts) < 2:
        return decode(codes, scales, dtype)
    weight = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
    for part in parts if has_values(codes) else parts[:1]:  # the others would take no more memory
        weight[part] = decode(codes[part], scales[part], dtype)
    return weight


def has_values(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds numbers; neither one on "meta" does, nor a fake one, of an estimate."""
    return type(tensor) is torch.Tensor and not tensor.is_meta


def _parts(rows: int, count: int) -> Iterator[slice]:
    """Yield the rows by `count` at a time."""
    yield from (slice(start, start + count) for start in range(0, rows, count))

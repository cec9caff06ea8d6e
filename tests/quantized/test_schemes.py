"""Codes and values of the schemes, against float64 arithmetic and against bitsandbytes."""

import importlib.util

import pytest
import torch

from sat_lora.quantization.config import NAMES
from sat_lora.quantized import schemes
from sat_lora.quantized.kernels import decode_nf4
from sat_lora.quantized.schemes import SCHEMES, block_for, encode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def weight(rows=12, columns=256, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Values as a linear has them, with a row and a block of zeros, a small row and a large element."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul_(0.02)
    drawn[3] = 0
    drawn[5, 64:128] = 0
    drawn[7] *= 1e-4
    drawn[8, 3] = 5.0
    return drawn.to(dtype)


def decoded(tensor: torch.Tensor, name: str, block=64) -> torch.Tensor:
    return SCHEMES[name].decode(*encode(tensor, SCHEMES[name], block), tensor.dtype)


def test_the_schemes_are_those_that_options_name():
    assert tuple(SCHEMES) == NAMES


@pytest.mark.parametrize(("name", "bits"), [("nf4", 4.25), ("int8", 8.25)])
def test_an_element_takes_so_many_bits(name, bits):
    codes, scales = encode(weight(), SCHEMES[name], 64)
    assert (codes.nbytes + scales.nbytes) * 8 / weight().numel() == bits


def test_nf4_takes_the_nearest_level_of_the_largest_element_of_a_block():
    blocks = weight().double().view(-1, 64)
    levels = torch.tensor(SCHEMES["nf4"].levels, dtype=torch.float64)
    largest = blocks.abs().amax(1, keepdim=True)
    distances = (blocks / largest.clamp_min(1e-30)).unsqueeze(-1).sub(levels).abs()
    wanted = levels[distances.argmin(-1)] * largest.bfloat16().double()
    assert torch.equal(decoded(weight(), "nf4").double(), wanted.float().double().view(12, 256))


def test_int8_is_off_by_half_a_step_at_most():
    blocks = weight().double().view(-1, 64)
    error = (decoded(weight(), "int8").double().view(-1, 64) - blocks).abs()
    largest = blocks.abs().amax(1, keepdim=True)  # the scale may be rounded up; or down, and then the largest is cut
    assert bool((error <= largest / 127 * (1 + 2**-8) / 2 + blocks.abs() * 2**-8).all())
    assert error[:12].norm() / blocks[:12].norm() < 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_once(name, dtype):
    codes, scales = encode(weight(dtype=dtype), SCHEMES[name], 64)
    exact = SCHEMES[name].decode(codes, scales, torch.float32)
    assert torch.equal(SCHEMES[name].decode(codes, scales, dtype), exact.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    assert not decoded(weight(), name)[3].any() and not decoded(weight(), name)[5, 64:128].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_has_the_values_of_the_whole(name):
    whole = decoded(weight(), name)
    by_rows = [decoded(part, name) for part in weight().chunk(3)]
    by_columns = [decoded(part.contiguous(), name) for part in weight().chunk(4, 1)]
    assert torch.equal(torch.cat(by_rows), whole) and torch.equal(torch.cat(by_columns, 1), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [32, 64])
def test_what_is_encoded_and_decoded_in_parts_is_the_same(name, block, monkeypatch):
    at_once = encode(weight(), SCHEMES[name], block)
    decoded_at_once = SCHEMES[name].decode(*at_once, torch.bfloat16)
    monkeypatch.setattr(schemes, "ENCODED_AT_ONCE", 256 * 5)
    monkeypatch.setattr(schemes, "DECODED_AT_ONCE", 256 * 7)
    assert all(map(torch.equal, encode(weight(), SCHEMES[name], block), at_once))
    assert torch.equal(SCHEMES[name].decode(*at_once, torch.bfloat16), decoded_at_once)


@pytest.mark.parametrize(("columns", "block"), [(64, 64), (96, 32), (224, 32), (1344, 64), (48, None), (0, None)])
def test_a_block_divides_a_row(columns, block):
    assert block_for(columns) == block


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes, of the extra `test`, is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_that_of_bitsandbytes(dtype):
    from bitsandbytes.functional import quantize_4bit

    codes, scales = encode(weight(dtype=dtype), SCHEMES["nf4"], 64)
    its_codes, state = quantize_4bit(weight(dtype=dtype), blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(codes.view(-1), its_codes.view(-1))
    assert torch.equal(scales.view(-1), state.absmax.bfloat16())
    assert torch.equal(decode_nf4(codes, scales, dtype), SCHEMES["nf4"].decode(codes, scales, dtype))

"""Codes, values and products of quantised weights on a device: those of the CPU, whichever kernels decode there."""

import pytest
import torch

from sat_lora.quantization.config import NAMES
from sat_lora.quantized.kernels import decode_nf4, problem_with_kernels
from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.quantized.schemes import SCHEMES
from tests.support.quantized_layers import DTYPES


def weight(dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    drawn[3] = 0
    return drawn.to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("scheme", NAMES)
def test_codes_and_values_are_those_of_a_cpu(device, scheme, dtype):
    here = QuantizedWeight.of(weight(dtype), SCHEMES[scheme])
    there = QuantizedWeight.of(weight(dtype).to(device), SCHEMES[scheme])
    assert torch.equal(here, there.cpu())
    assert torch.equal(here.decoded(), there.decoded().cpu())
    assert torch.equal(here.decoded(), here.to(device).decoded().cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", NAMES)
def test_a_product_is_that_of_the_decoded_weight(device, scheme, dtype):
    quantized = QuantizedWeight.of(weight(dtype).to(device), SCHEMES[scheme])
    results = []
    for matrix in (quantized, quantized.decoded()):
        x = torch.ones(5, 256, dtype=dtype, device=device, requires_grad=True)
        y = torch.nn.functional.linear(x, matrix)
        y.sum().backward()
        results.append((y, x.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_the_kernel_of_bitsandbytes_gives_torchs_values(dtype):
    if not torch.cuda.is_available() or problem_with_kernels() is not None:
        pytest.skip("needs a GPU and bitsandbytes")
    quantized = QuantizedWeight.of(weight(dtype), SCHEMES["nf4"])
    on_device = quantized.to("cuda")
    assert torch.equal(decode_nf4(on_device.codes, on_device.scales, dtype).cpu(), quantized.decoded())

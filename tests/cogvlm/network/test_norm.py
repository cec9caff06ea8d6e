"""RMSNorm in one kernel against SAT's five."""

import pytest
import torch

from sat_lora._sat import RMSNorm as SatRMSNorm
from sat_lora.cogvlm.network.model import RMSNorm
from tests.support.tiny import tiny_model


def pair(dtype, width):
    torch.manual_seed(0)
    ours, theirs = (cls(width, eps=1e-5).to(dtype) for cls in (RMSNorm, SatRMSNorm))
    with torch.no_grad():
        ours.weight.copy_(1 + 0.1 * torch.randn(width))
        theirs.weight.copy_(ours.weight)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 4096), (2, 7, 48), (0, 48)])
def test_it_equals_sats_bit_for_bit(dtype, shape):
    ours, theirs = pair(dtype, shape[-1])
    for scale in (1e-3, 1.0, 30.0):
        x = (scale * torch.randn(shape)).to(dtype)
        assert torch.equal(ours(x), theirs(x))


def test_a_float64_model_is_computed_in_float64():
    ours, theirs = pair(torch.float64, 48)
    x = torch.randn(64, 48, dtype=torch.float64, requires_grad=True)
    exact = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight
    (expected,) = torch.autograd.grad(exact.pow(2).sum(), x, retain_graph=True)
    (got,) = torch.autograd.grad(ours(x).pow(2).sum(), x)
    torch.testing.assert_close(ours(x), exact, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert (theirs(x) - exact).abs().max() > 1e-9


def test_weight_decay_and_checkpoints_see_sats_norm():
    model = tiny_model()
    norms = [module for module in model.transformer.modules() if isinstance(module, SatRMSNorm)]
    assert len(norms) == 2 * len(model.transformer.layers) + 1
    assert all(type(module) is RMSNorm and set(module.state_dict()) == {"weight"} for module in norms)

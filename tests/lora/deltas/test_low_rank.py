"""The fused Function against plain autograd, finite differences and float64."""

import pytest
import torch

from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.lora.deltas.low_rank import RandomDropout, add_delta, add_delta_reference, dropout_mask

LAYOUTS = {
    "whole": DeltaLayout(((0, 6),), 6),
    "q, k, v": DeltaLayout(((0, 2), (2, 4), (4, 6)), 6),
    "q and v": DeltaLayout(((0, 2), (4, 6)), 6),
    "v alone": DeltaLayout(((4, 6),), 6),
    "grouped": DeltaLayout(((0, 4), (4, 5), (5, 6)), 6),
}
RANK, TOKENS, IN = 2, 5, 4


def operands(layout, dtype=torch.float64, tokens=TOKENS, seed=0):
    torch.manual_seed(seed)
    rows = sum(stop - start for start, stop in layout.slots)
    shapes = dict(y=(tokens, layout.width), x=(tokens, IN), a=(len(layout.slots) * RANK, IN), b=(rows, RANK))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes.values()]


class DropoutBy(RandomDropout):
    """Leaves what a mask (tokens, in) says."""

    def __init__(self, mask):
        self.__dict__["mask"] = mask.byte()

    def project(self, x, a, scale):
        return (x * self.mask).mm(a.t()), self.mask, scale


def dropout_by(mask):
    return None if mask is None else DropoutBy(mask)


@pytest.fixture(autouse=True, scope="module")
def one_model_parallel_rank(single_process_group):
    """SAT's communication functions want a group, even of one."""


@pytest.mark.parametrize("function", [add_delta, add_delta_reference])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dropout", [False, True])
def test_gradcheck_in_float64(function, layout, dropout):
    mask = torch.rand(TOKENS, IN) > 0.3 if dropout else None
    assert torch.autograd.gradcheck(lambda *t: function(*t, dropout_by(mask), 1.7, layout), operands(layout))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_fused_equals_the_reference(layout, tokens):
    mask = torch.rand(tokens, IN) > 0.3
    results = []
    for function in (add_delta, add_delta_reference):
        tensors = operands(layout, tokens=tokens)
        out = function(*tensors, dropout_by(mask), 0.5, layout)
        out.pow(2).sum().backward()
        results.append([out, *(t.grad for t in tensors)])
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_equals_the_formula():
    layout = LAYOUTS["q and v"]
    y, x, a, b = operands(layout)
    expected = y.clone()
    expected[:, 0:2] += 3 * (b[0:2] @ (a[0:2] @ x.T)).T
    expected[:, 4:6] += 3 * (b[2:4] @ (a[2:4] @ x.T)).T
    torch.testing.assert_close(add_delta(y, x, a, b, None, 3.0, layout), expected)


def test_no_token_gives_zero_gradients():
    y, x, a, b = operands(LAYOUTS["q, k, v"], tokens=0)
    add_delta(y, x, a, b, None, 1.0, LAYOUTS["q, k, v"]).sum().backward()
    assert a.grad.shape == a.shape and not a.grad.any() and not b.grad.any()


def test_float32_adapter_on_a_bfloat16_base_gets_float32_gradients():
    layout = LAYOUTS["whole"]
    y, x, _, _ = operands(layout, torch.bfloat16)
    _, _, a, b = operands(layout, torch.float32)
    out = add_delta(y, x, a, b, None, 1.0, layout)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_asked_for_is_computed(wanted):
    tensors = operands(LAYOUTS["whole"])
    for number, tensor in enumerate(tensors):
        tensor.requires_grad_(number == wanted)
    add_delta(*tensors, None, 1.0, LAYOUTS["whole"]).sum().backward()
    assert [t.grad is not None for t in tensors] == [number == wanted for number in range(4)]


def test_x_is_saved_and_no_copy_of_it():
    saved = []
    y, x, a, b = operands(LAYOUTS["whole"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_delta(y, x, a, b, dropout_by(torch.ones(TOKENS, IN, dtype=torch.bool)), 1.0, LAYOUTS["whole"])
    own = [t for t in saved if t.data_ptr() not in {x.data_ptr(), a.data_ptr(), b.data_ptr()}]
    assert sum(t.numel() * t.element_size() for t in own) == TOKENS * RANK * 8 + TOKENS * IN  # S and a one-byte mask


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_the_mask_keeps_its_share_everywhere_and_repeats_with_the_seed(probability):
    x = torch.empty(400, 1001)
    torch.manual_seed(3)
    mask, share = dropout_mask(x, probability)
    torch.manual_seed(3)
    assert torch.equal(mask, dropout_mask(x, probability)[0])
    assert mask.shape == x.shape and mask.dtype == torch.uint8 and set(mask.unique().tolist()) == {0, 1}
    assert share == pytest.approx(1 - probability, abs=2**-17)
    for dim, size in ((0, 400), (1, 1001)):
        deviation = (mask.double().mean(dim) - share).abs().max()
        assert deviation < 6 * (share * (1 - share) / size) ** 0.5


def test_the_mask_of_no_token_is_empty():
    assert dropout_mask(torch.empty(0, 7), 0.5)[0].shape == (0, 7)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_may_change_the_output_in_place(fuse):
    """`hidden += residual` behind an adapted linear."""
    _, x, a, b = operands(LAYOUTS["whole"])
    weight, layout = torch.randn(6, IN, dtype=torch.float64), LAYOUTS["whole"]
    results = []
    for function in (add_delta, add_delta_reference):
        more = (weight,) if fuse and function is add_delta else ()
        out = function((x @ weight.T).view(1, TOKENS, 6), x.view(1, TOKENS, IN), a, b, None, 1.0, layout, *more)
        out += 1
        out *= 2
        results.append([out, *torch.autograd.grad(out.sum(), [x, a, b])])
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_a_product_taken_over_has_the_gradients_of_product_and_delta(layout, dropout, tokens):
    """Against plain autograd over y = x W^T with the delta added; y's own graph gets nothing to do."""
    torch.manual_seed(1)
    weight, mask = torch.randn(6, IN, dtype=torch.float64), (torch.rand(tokens, IN) > 0.3) if dropout else None
    results = []
    for fuse in (True, False):
        _, x, a, b = operands(layout, tokens=tokens)
        y, seen = x @ weight.T, []
        y.register_hook(seen.append)
        if fuse:
            out = add_delta(y, x, a, b, dropout_by(mask), 1.7, layout, weight)
        else:
            out = add_delta_reference(y, x, a, b, dropout_by(mask), 1.7, layout)
        out.pow(2).sum().backward()
        assert len(seen) == (0 if fuse else 1)
        results.append([out, *(t.grad for t in (x, a, b))])
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_a_product_taken_over():
    layout, (_, x, a, b) = LAYOUTS["q and v"], operands(LAYOUTS["q and v"])
    weight = torch.randn(6, IN, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: add_delta(t[0] @ weight.T, *t, None, 1.7, layout, weight), (x, a, b))


def test_functorch_is_refused_in_torchs_own_words():
    _, x, a, b = (tensor.detach() for tensor in operands(LAYOUTS["whole"]))
    weight = torch.randn(6, IN, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: add_delta(x @ weight.T, x, a, b, None, 1.0, LAYOUTS["whole"], weight).sum())(x)

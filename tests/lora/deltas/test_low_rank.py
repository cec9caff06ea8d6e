"""The fused Function against plain autograd, finite differences and float64."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sat_lora.lora.deltas import low_rank
from sat_lora.lora.deltas.layout import DeltaLayout, SlotRun
from sat_lora.lora.deltas.low_rank import (
    RandomDropout,
    adapted_linear,
    add_delta,
    add_delta_in_place,
    add_delta_reference,
    dropout_mask,
    product_of,
)

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


def sums_of_two_ranks(monkeypatch):
    """Lets each sum over the ranks double what it is given, as two ranks with equal parts would; the sums so far."""
    sums = []

    def double(tensor):
        sums.append(tuple(tensor.shape))
        return tensor.mul_(2)

    monkeypatch.setattr(low_rank, "_sum_over_ranks", double)
    return sums


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", ["linear", "column", "row"])
@pytest.mark.parametrize("take_over", [False, True])
def test_what_is_summed_over_the_ranks_is_s_or_ds(monkeypatch, layout, dropout, kind, take_over):
    """Against the formulas in float64, with a sum that doubles."""
    sums = sums_of_two_ranks(monkeypatch)
    layout, scale = replace(layout, kind=kind, mp_size=2), 1.7
    y, x, a, b = operands(layout)
    weight = torch.randn(6, IN, dtype=torch.float64)
    keep = torch.rand(TOKENS, IN) > 0.3 if dropout else None
    mask = torch.ones(TOKENS, IN, dtype=torch.float64) if keep is None else keep.double()
    out = add_delta(x @ weight.T if take_over else y, x, a, b, dropout_by(keep), scale, layout, *[weight] * take_over)
    dy = torch.randn_like(out)
    out.backward(dy)

    with torch.no_grad():
        in_forward, in_backward = 1 + (kind == "row"), 1 + (kind == "column")
        s, ds, db = in_forward * ((x * mask) @ a.T), torch.zeros(TOKENS, len(a), dtype=torch.float64), []
        expected = x @ weight.T if take_over else y.clone()
        for columns, rows, ranks in layout.pieces(RANK):
            expected[:, columns] += scale * s[:, ranks] @ b[rows].T
            ds[:, ranks] = in_backward * (dy[:, columns] @ b[rows])
            db.append(scale * dy[:, columns].T @ s[:, ranks])
        dx = scale * (ds @ a) * mask + (in_backward * (dy @ weight) if take_over else 0)
    for got, wanted in ((out, expected), (x.grad, dx), (a.grad, scale * ds.T @ (x * mask)), (b.grad, torch.cat(db))):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    in_s = [(TOKENS, len(a))]
    in_ds = [(TOKENS, IN), (TOKENS, len(a))] if take_over else [(TOKENS, len(a))]
    assert sums == {"linear": [], "row": in_s, "column": in_ds}[kind]
    assert y.grad is None if take_over else torch.equal(y.grad, dy)


@pytest.mark.parametrize("kind", ["linear", "column", "row"])
@pytest.mark.parametrize("shape", [(TOKENS,), (1, TOKENS), ()])
def test_without_autograd_the_delta_goes_into_the_output_itself(monkeypatch, kind, shape):
    sums = sums_of_two_ranks(monkeypatch)
    layout = replace(LAYOUTS["q and v"], kind=kind, mp_size=2)
    y, x, a, b = (tensor.detach() for tensor in operands(layout, tokens=TOKENS if shape else 1))
    y, x = y.view(*shape, 6), x.view(*shape, IN)
    expected = y.clone()
    expected[..., 0:2] += 3 * (1 + (kind == "row")) * (x @ a[0:2].T @ b[0:2].T)
    expected[..., 4:6] += 3 * (1 + (kind == "row")) * (x @ a[2:4].T @ b[2:4].T)
    assert add_delta_in_place(y, x, a, b, None, 3.0, layout) is None
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert len(sums) == (kind == "row")


def test_without_autograd_what_is_dropped_is_dropped():
    layout = LAYOUTS["whole"]
    y, x, a, b = (tensor.detach() for tensor in operands(layout))
    keep = torch.rand(TOKENS, IN) > 0.5
    expected = y + 3 * (x * keep) @ a.T @ b.T
    add_delta_in_place(y, x, a, b, dropout_by(keep), 3.0, layout)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_a_product_has_both_biases_and_its_delta_goes_on_top():
    layout = LAYOUTS["q and v"]
    _, x, a, b = operands(layout)
    weight, bias, added = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, IN), (6,), (6,)))
    for biases in ((None, None), (bias, None), (None, added), (bias, added)):
        plain = x @ weight.T + sum(one for one in biases if one is not None)
        torch.testing.assert_close(product_of(x, weight, *biases), plain, rtol=1e-12, atol=1e-12)
        out = adapted_linear(x, weight, *biases, a, b, None, 1.7, layout)
        torch.testing.assert_close(out, add_delta_reference(plain, x, a, b, None, 1.7, layout), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mp_size", [1, 2])
@pytest.mark.parametrize("frozen", ["", "x", "a", "b"])
def test_for_no_tokens_there_are_zero_gradients_and_ranks_still_meet(monkeypatch, mp_size, frozen):
    sums = sums_of_two_ranks(monkeypatch)
    layout = replace(LAYOUTS["whole"], kind="row", mp_size=mp_size)
    tensors = dict(zip("yxab", operands(layout, tokens=0)))
    x, a, b = (tensors[name].requires_grad_(name != frozen) for name in "xab")
    x = x.detach().view(1, 0, IN).requires_grad_(frozen != "x")
    out = adapted_linear(x, torch.ones(6, IN, dtype=torch.float64), None, None, a, b, None, 1.7, layout)
    assert out.shape == (1, 0, 6) and out.dtype == torch.float64 and len(sums) == mp_size - 1
    out.sum().backward()
    for name, tensor in (("x", x), ("a", a), ("b", b)):
        if name == frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


def test_slots_are_one_run_where_they_are_evenly_spaced():
    runs = {name: layout.runs for name, layout in LAYOUTS.items()}
    assert runs["whole"] == (SlotRun(0, 6, 6, 1, 0, 0),)
    assert runs["q, k, v"] == (SlotRun(0, 2, 2, 3, 0, 0),)
    assert runs["q and v"] == (SlotRun(0, 2, 4, 2, 0, 0),)
    assert runs["v alone"] == (SlotRun(4, 2, 2, 1, 0, 0),)
    assert runs["grouped"] == (SlotRun(0, 4, 4, 1, 0, 0), SlotRun(4, 1, 1, 2, 4, 1))
    uneven = DeltaLayout(((0, 2), (4, 6), (7, 9), (10, 12)), 12)
    assert uneven.runs == (SlotRun(0, 2, 4, 2, 0, 0), SlotRun(7, 2, 3, 2, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_of_every_kind_are_the_formula(dtype):
    layout = DeltaLayout(((0, 2), (4, 6), (7, 9), (10, 11)), 12)
    y, x, a, b = operands(layout, dtype)
    results = []
    for function in (add_delta, add_delta_reference):
        for tensor in (y, x, a, b):
            tensor.grad = None
        out = function(y, x, a, b, None, 0.5, layout)
        out.float().pow(2).sum().backward()
        results.append([out, *(tensor.grad for tensor in (y, x, a, b))])
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("run", [SlotRun(0, 2, 4, 2, 0, 0), SlotRun(3, 2, 3, 2, 4, 1)])
def test_the_views_of_a_run_are_its_slots(run):
    """In tensors that lie at an offset, y with gaps between its rows."""
    memory = torch.arange(400.0)
    y = memory[7 : 7 + 5 * 20].view(5, 20)[:, :10]
    b, s = memory[3 : 3 + 24].view(8, 3), memory[5 : 5 + 45].view(5, 9)
    starts = [run.start + number * run.distance for number in range(run.slots)]
    columns = torch.stack([y[:, start : start + run.width] for start in starts])
    assert torch.equal(run.columns(y), columns)
    assert torch.equal(run.columns_transposed(y), columns.mT)
    rows = [run.row + number * run.width for number in range(run.slots)]
    assert torch.equal(run.rows_transposed(b), torch.stack([b[row : row + run.width].T for row in rows]))
    ranks = [3 * (run.slot + number) for number in range(run.slots)]
    assert torch.equal(run.ranks(s, 3), torch.stack([s[:, rank : rank + 3] for rank in ranks]))


def test_a_mask_of_bool_drops_and_makes_up_for_it():
    """As CUDA's own dropout leaves it, whose scale stays as it is."""
    mask, tensor = torch.tensor([[True, False], [True, True]]), torch.ones(2, 2, dtype=torch.float64)
    ds, a = torch.eye(2, dtype=torch.float64), torch.full((2, 2), 3.0, dtype=torch.float64)
    expected = torch.tensor([[4.0, 0.0], [4.0, 4.0]], dtype=torch.float64)
    dropout = RandomDropout(0.25)
    torch.testing.assert_close(dropout.gradient_of_x(ds, a, mask), expected)
    torch.testing.assert_close(dropout.gradient_of_a(ds, tensor, a, mask, 6.0), expected * 2)


class Kernels(SimpleNamespace):
    """In place of `delta_kernels`: the same arithmetic in torch, with a mask that the seed gives."""

    def mask(self, shape, seed, dropped):
        self.calls.append((int(seed), dropped))
        return (torch.rand(shape, generator=torch.Generator().manual_seed(int(seed))) >= dropped / 2**16).double()

    def project(self, x, a, seed, dropped):
        return (x * self.mask(x.shape, seed, dropped)) @ a.T

    def spread(self, ds, a, seed, dropped):
        product = ds @ a
        return product * self.mask(product.shape, seed, dropped)

    def gradient_of_a(self, ds, x, seed, dropped, scale):
        return scale * ds.T @ (x * self.mask(x.shape, seed, dropped))

    def add_slots(self, y, s, b, scale, layout):
        self.calls.append("add_slots")
        for columns, rows, ranks in layout.pieces(b.shape[1]):
            y[:, columns] += scale * s[:, ranks] @ b[rows].T


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_large_tensors_of_a_gpu_go_through_the_kernels_with_one_seed(monkeypatch, layout):
    kernels = Kernels(calls=[])
    monkeypatch.setitem(sys.modules, "sat_lora.lora.deltas.delta_kernels", kernels)
    monkeypatch.setattr("sat_lora.lora.deltas.delta_kernels", kernels, raising=False)
    monkeypatch.setattr(low_rank, "_has_kernels", lambda tensor, elements: True)
    y, x, a, b = operands(layout)
    torch.manual_seed(3)
    out = add_delta(y, x, a, b, RandomDropout(0.25), 1.7, layout)
    dy = torch.randn_like(out)
    out.backward(dy)
    (seed, dropped), addition, *others = kernels.calls
    assert addition == "add_slots" and dropped == 2**14 and others == [(seed, dropped)] * 2
    mask = kernels.mask(x.shape, seed, dropped)
    scale = 1.7 / 0.75
    plain = [tensor.detach().requires_grad_() for tensor in (y, x, a, b)]
    expected = add_delta_reference(plain[0], plain[1] * mask, plain[2], plain[3], None, scale, layout)
    expected.backward(dy)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for tensor, one in zip((y, x, a, b), plain):
        torch.testing.assert_close(tensor.grad, one.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "is_cuda, count, dtype, expected",
    [
        (True, 100, torch.bfloat16, True),
        (True, 101, torch.float32, True),
        (True, 99, torch.bfloat16, False),
        (False, 100, torch.bfloat16, False),
        (True, 100, torch.float64, False),
    ],
)
def test_kernels_take_large_tensors_of_a_gpu(is_cuda, count, dtype, expected):
    tensor = SimpleNamespace(is_cuda=is_cuda, numel=lambda: count, dtype=dtype)
    assert low_rank._has_kernels(tensor, 100) is expected


def test_the_share_that_is_kept_is_made_up_for():
    """0.3 is rounded to 2^-16."""
    x, a = torch.ones(64, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    s, mask, scale = RandomDropout(0.3).project(x, a, 2.0)
    assert torch.equal(s, mask.double()) and scale == 2.0 / (1 - round(0.3 * 2**16) / 2**16)
    assert RandomDropout(0.3)._dropped == 19661


def test_a_second_derivative_is_refused_and_a_recorded_backward_is_not_wrong():
    layout = LAYOUTS["q and v"]
    tensors = operands(layout)
    plain = torch.autograd.grad(add_delta(*tensors, None, 1.7, layout).pow(2).sum(), tensors)
    recorded = torch.autograd.grad(add_delta(*tensors, None, 1.7, layout).pow(2).sum(), tensors, create_graph=True)
    for got, expected in zip(recorded, plain):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        recorded[3].sum().backward()

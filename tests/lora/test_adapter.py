"""The adapter of each kind of layer: finite differences, merged weights, precision, what is kept for backward."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.func import functional_call

from sat_lora import LoraConfig
from sat_lora._sat import ColumnParallelLinear
from sat_lora.lora import adapter as adapter_module
from sat_lora.lora.deltas.low_rank import dropout_mask
from sat_lora.parallel.sharding import sharding_of
from tests.support.single_layer import LAYERS, LINEAR, LOOKUP, adapter_for, build_layer, inputs_for

pytestmark = pytest.mark.usefixtures("single_process_group")


def slotted_layer(blocks=(2, 1, 1), unit=3, in_features=6, dtype=torch.float64, seed=0):
    """A column-parallel linear whose output is q, k, v in these shares."""
    torch.manual_seed(seed)
    rows = unit * sum(blocks)
    layer = ColumnParallelLinear(in_features, rows, stride=list(blocks), gather_output=False, params_dtype=dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter).requires_grad_(False)
    return layer


@pytest.mark.parametrize("layer_name", LAYERS)
def test_finite_differences_agree(layer_name):
    layer = build_layer(layer_name)
    adapter = adapter_for(layer, LoraConfig(r=2, lora_alpha=3), seed=5)
    x = inputs_for(layer)

    def run(*tensors):
        values = tensors[-1] if tensors[-1].requires_grad and x.requires_grad else x
        return functional_call(adapter, dict(zip("AB", tensors)), (layer(values), values, layer))

    assert torch.autograd.gradcheck(run, [adapter.A, adapter.B, *([x] if x.requires_grad else [])])


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_output_is_that_of_the_merged_weight(layer_name, use_dora):
    """The only oracle here is the layer itself, run with another weight."""
    if layer_name in LOOKUP and use_dora:
        return  # refused, see test_targets
    layer = build_layer(layer_name)
    adapter = adapter_for(layer, LoraConfig(r=4, lora_alpha=6, use_dora=use_dora), seed=5)
    x = inputs_for(layer)
    adapted = adapter(layer(x), x, layer)
    assert not torch.allclose(adapted, layer(x), atol=0.1)
    layer.weight.copy_(adapter.merged_weight(layer))
    torch.testing.assert_close(adapted, layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_name", LAYERS)
def test_the_merged_weight_is_the_formula(layer_name):
    layer = build_layer(layer_name)
    adapter = adapter_for(layer, LoraConfig(r=4, lora_alpha=6), seed=5)
    delta = 6 / adapter.rank * adapter.B @ adapter.A
    expected = layer.weight + (delta.T if layer_name in LOOKUP else delta.view_as(layer.weight))
    torch.testing.assert_close(adapter.merged_weight(layer), expected)
    torch.testing.assert_close(adapter.merged_weight(layer, 0.5), (layer.weight + expected) / 2)


@pytest.mark.parametrize("chosen", ["qkv", "qv", "k"])
def test_dora_scales_only_the_rows_of_adapted_slots(chosen):
    layer = named("query_key_value", slotted_layer(unit=6, in_features=12))
    adapter = adapter_for(layer, LoraConfig(r=2, lora_alpha=3, use_dora=True, qkv_slots=chosen), seed=5)
    x = inputs_for(layer)
    out = adapter(layer(x), x, layer)
    row, expected = 0, layer.weight.clone()
    for number, (start, stop) in enumerate(adapter.target.rows):
        a, b = adapter.A[2 * number : 2 * number + 2], adapter.B[row : row + stop - start]
        direction = layer.weight[start:stop] + 1.5 * b @ a
        lengths = adapter.magnitude[row : row + stop - start]
        expected[start:stop] = lengths[:, None] * direction / direction.norm(dim=1, keepdim=True)
        row += stop - start
    torch.testing.assert_close(out, torch.nn.functional.linear(x, expected, layer.bias), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapter.merged_weight(layer), expected, rtol=1e-10, atol=1e-10)


def named(name, layer):
    """The adapter's site takes this name, which says whether there are slots."""
    layer.site_name = name
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer_name", ["linear", "column", "row", "conv2d"])
def test_a_fresh_dora_is_the_base_bit_for_bit(layer_name, dtype):
    layer = build_layer(layer_name, dtype)
    adapter = adapter_for(layer, LoraConfig(r=4, use_dora=True))
    x = inputs_for(layer, dtype)
    assert torch.equal(adapter(layer(x), x, layer), layer(x))


def test_a_row_of_zeros_stays_zero_and_finite_under_dora():
    layer = build_layer("linear without bias")
    layer.weight[3] = 0
    adapter = adapter_for(layer, LoraConfig(r=4, use_dora=True))
    x = inputs_for(layer)
    out = adapter(layer(x), x, layer)
    out.sum().backward()
    assert not out[..., 3].any() and out.isfinite().all() and adapter.magnitude.grad.isfinite().all()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 24), st.lists(st.integers(1, 5), min_size=3, max_size=3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=shapes,
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    slots=st.sets(st.sampled_from("qkv"), min_size=1),
    tokens=st.integers(0, 9),
    dropout=st.booleans(),
)
def test_any_shape_rank_dtype_and_slots_are_the_formula(
    single_process_group, shape, rank, dtype, slots, tokens, dropout
):
    """Output and all gradients against plain autograd in float64, on the values as the dtype holds them."""
    unit, in_features, blocks = shape
    layer = named("query_key_value", slotted_layer(tuple(blocks), unit, in_features, dtype))
    config = LoraConfig(r=rank, lora_alpha=2, qkv_slots="".join(sorted(slots)), lora_dropout=0.5 * dropout)
    adapter = adapter_for(layer, config, seed=5).train()
    x = torch.randn(tokens, in_features, dtype=dtype, requires_grad=True)
    torch.manual_seed(8)
    y = adapter(layer(x), x, layer)
    weights = torch.randn(y.shape, dtype=dtype)
    (y * weights).sum().backward()

    torch.manual_seed(8)
    mask = dropout_mask(x, 0.5)[0].double() * 2 if dropout else 1.0
    a, b, wide = (t.detach().double().requires_grad_() for t in (adapter.A, adapter.B, x))
    parts, row = [], 0
    for start, stop in layer_blocks(layer):
        out = wide @ layer.weight[start:stop].double().T + layer.bias[start:stop].double()
        if (start, stop) in adapter.target.rows:
            number = adapter.target.rows.index((start, stop))
            s = (wide * mask) @ a[number * adapter.rank : (number + 1) * adapter.rank].T
            out = out + adapter.scale * s @ b[row : row + stop - start].T
            row += stop - start
        parts.append(out)
    expected = torch.cat(parts, -1)
    (expected * weights.double()).sum().backward()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for got, wanted in ((y, expected), (adapter.A.grad, a.grad), (adapter.B.grad, b.grad), (x.grad, wide.grad)):
        assert got.dtype == dtype
        assert (got.double() - wanted).abs().max() <= tolerance * (1 + wanted.abs().max()) if wanted.numel() else True


def layer_blocks(layer):
    unit, edge, blocks = layer.weight.shape[0] // sum(layer.stride), 0, []
    for size in layer.stride:
        blocks.append((edge, edge + unit * size))
        edge += unit * size
    return blocks


@pytest.mark.parametrize("layer_name", [name for name in LAYERS if name not in LOOKUP])
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast_gives_its_dtype_and_the_right_values(layer_name, adapter_dtype, use_dora):
    layer, exact = build_layer(layer_name, torch.float32), build_layer(layer_name)
    exact.load_state_dict(layer.state_dict())
    config = LoraConfig(r=4, lora_alpha=6, use_dora=use_dora, adapter_dtype=adapter_dtype)
    adapter = adapter_for(layer, config, seed=5)
    wide = adapter_for(exact, LoraConfig(r=4, lora_alpha=6, use_dora=use_dora))
    with torch.no_grad():
        for leaf, parameter in wide.named_parameters():
            parameter.copy_(adapter.get_parameter(leaf))
    x = inputs_for(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        base = layer(x)
        y = adapter(base, x, layer)
    y.float().pow(2).mean().backward()
    x64 = x.detach().double().requires_grad_()
    expected = wide(exact(x64), x64, exact)
    expected.pow(2).mean().backward()
    assert y.dtype == base.dtype and adapter.A.grad.dtype == getattr(torch, adapter_dtype)
    for got, wanted in (
        (y, expected),
        (x.grad, x64.grad),
        (adapter.A.grad, wide.A.grad),
        (adapter.B.grad, wide.B.grad),
    ):
        assert (got.double() - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("layer_name", LAYERS)
def test_a_float32_adapter_on_a_bfloat16_base_keeps_the_activations_dtype(layer_name):
    layer = build_layer(layer_name, torch.bfloat16)
    adapter = adapter_for(layer, LoraConfig(r=4, adapter_dtype="float32"), seed=5)
    x = inputs_for(layer, torch.bfloat16)
    y = adapter(layer(x), x, layer)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and adapter.A.grad.dtype == adapter.B.grad.dtype == torch.float32


def saved_bytes(run, *known):
    """Bytes of the distinct tensors kept for backward, without the known ones."""
    saved = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t)
    with hooks:
        out = run()
    skip = {t.data_ptr() for t in known}
    return sum(t.numel() * t.element_size() for p, t in saved.items() if p not in skip), out


@pytest.mark.parametrize("layer_name", LINEAR)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_backward_keeps_x_once_or_not_at_all(layer_name, dropout, freeze_a):
    """S (tokens x r) and, with dropout, a byte per input; x itself is the base's. LoRA-FA keeps no x and no mask of it
    unless the input needs a gradient."""
    layer = build_layer(layer_name)
    adapter = adapter_for(layer, LoraConfig(r=4, lora_dropout=dropout, freeze_a=freeze_a), seed=5).train()
    x = inputs_for(layer)
    y = layer(x)
    count, out = saved_bytes(lambda: adapter(y, x, layer), layer.weight, adapter.A, adapter.B)
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    kept = 8 * tokens * (4 + (0 if freeze_a else width)) + (tokens * width if dropout else 0)
    assert count == kept
    out.sum().backward()
    assert (adapter.A.grad is None) == freeze_a and adapter.B.grad.any() and x.grad.any()


def test_lora_fa_trains_b_as_lora_does():
    layer = build_layer("linear")
    gradients = []
    for freeze_a in (False, True):
        adapter = adapter_for(layer, LoraConfig(r=4, freeze_a=freeze_a), seed=5)
        x = inputs_for(layer)
        adapter(layer(x), x, layer).pow(2).sum().backward()
        gradients.append((adapter.B.grad, x.grad))
    assert all(map(torch.equal, *gradients))


def test_an_id_outside_the_vocabulary_gets_no_delta():
    layer = build_layer("vocab")
    adapter = adapter_for(layer, LoraConfig(r=4), seed=5)
    ids = torch.tensor([[3, 30, 31, -1]])
    out = adapter(layer(ids), ids, layer)
    assert out[0, 0].any() and not out[0, 1:].any()


class Twice(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change", [lambda layer: layer, torch.nn.utils.parametrizations.weight_norm], ids=["subclass", "weight norm"]
)
def test_only_a_plain_product_is_taken_over(change):
    """The gradient of x, and of parameters that train, goes through whatever else the layer does."""
    torch.manual_seed(0)
    layer = change((Twice if change.__name__ == "<lambda>" else torch.nn.Linear)(12, 10).double())
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    adapter = adapter_for(layer, LoraConfig(r=4, lora_alpha=4), seed=5)
    base = [p for n, p in layer.named_parameters() if "layer" not in n]
    results = []
    for is_untouched in (True, False):
        out = adapter(layer(x), x, layer, output_is_untouched=is_untouched)
        results.append(torch.autograd.grad(out.pow(2).sum(), [x, adapter.A, adapter.B, *base]))
    assert all(torch.allclose(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("layer_name", LINEAR)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fused_product_has_the_gradients_of_one_left_alone(layer_name, dropout):
    layer = build_layer(layer_name)
    adapter = adapter_for(layer, LoraConfig(r=4, lora_dropout=dropout), seed=5).train()
    results = []
    for is_untouched in (True, False):
        x = inputs_for(layer)
        torch.manual_seed(2)
        y = layer(x)
        before = y.detach().clone()
        out = adapter(y, x, layer, output_is_untouched=is_untouched)
        assert torch.equal(y, before) != is_untouched, "fused, y is changed in place; left alone, it is not"
        results.append([out, *torch.autograd.grad(out.pow(2).sum(), [x, adapter.A, adapter.B])])
    for fused, alone in zip(*results):
        torch.testing.assert_close(fused, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layer_name", ["linear", "column", "row", "vocab", "conv2d"])
def test_parameters_are_cut_as_the_weight_is(monkeypatch, layer_name, size, use_dora):
    """As if this process were the last of so many model-parallel ranks; the weight is whole here."""
    if layer_name == "vocab" and use_dora:
        return  # refused, see test_targets
    layer, config = build_layer(layer_name), LoraConfig(r=4, lora_alpha=6, use_dora=use_dora)
    whole = adapter_for(layer, config)
    monkeypatch.setattr(adapter_module, "model_parallel_layout", lambda: (size - 1, size))
    monkeypatch.setattr(adapter_module.LoraAdapter, "_row_norms", lambda *args: torch.zeros(1))
    part = adapter_for(layer, config)
    cut = sharding_of(layer, "weight").dim
    out, width = whole.target.site.out_features, whole.target.site.in_features
    shapes = {
        "A": (4, width // size if layer_name in ("row", "vocab") else width),
        "B": (out // size if layer_name == "column" else out, 4),
    }
    assert {leaf: tuple(getattr(part, leaf).shape) for leaf in "AB"} == shapes
    if use_dora:
        assert part.magnitude.shape == shapes["B"][:1]
        assert (part.shardings["magnitude"].dim == 0) == (layer_name == "column")
    assert part.layout.width == shapes["B"][0] and part.layout.slots == ((0, shapes["B"][0]),)
    assert (part.layout.kind, part.layout.mp_size) == (part.kind.name, size)
    for leaf in "AB":
        expected = whole.shardings[leaf].shard(getattr(whole, leaf), size - 1, size)
        assert torch.equal(getattr(part, leaf), expected)
        is_cut = whole.shardings[leaf].dim is not None
        assert is_cut == (cut is not None and leaf == ("B" if layer_name == "column" else "A"))
        assert getattr(getattr(part, leaf), "model_parallel", False) == is_cut


def test_the_rows_of_slots_are_cut_within_each(monkeypatch):
    layer = slotted_layer(blocks=(2, 1, 1), unit=4)
    layer.site_name = "query_key_value"
    whole = adapter_for(layer, LoraConfig(r=1, qkv_slots="qv"), seed=5)
    monkeypatch.setattr(adapter_module, "model_parallel_layout", lambda: (1, 2))
    part = adapter_for(layer, LoraConfig(r=1, qkv_slots="qv"))
    assert whole.layout.slots == ((0, 8), (12, 16)) and part.layout.slots == ((0, 4), (6, 8))
    assert part.A.shape == (2, 6) and part.B.shape == (6, 1)
    part.load_tensors({"A": whole.A.detach(), "B": whole.B.detach()})
    assert torch.equal(part.A, whole.A) and torch.equal(part.B, torch.cat([whole.B[4:8], whole.B[10:12]]))


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_an_origin_is_a_copy_that_does_not_train_and_is_subtracted(scheme):
    layer = build_layer("linear")
    adapter = adapter_for(layer, LoraConfig(r=4, lora_alpha=6, init_lora_weights=scheme))
    x = inputs_for(layer)
    assert adapter.has_origin and adapter.delta_rank == 8 and not adapter.is_plain
    assert torch.equal(adapter.origin_A, adapter.A) and torch.equal(adapter.origin_B, adapter.B)
    assert not adapter.origin_A.requires_grad and not adapter.origin_B.requires_grad
    assert {*adapter.state_dict()} == {"A", "B", "origin_A", "origin_B"}
    torch.testing.assert_close(adapter(layer(x), x, layer), layer(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        adapter.A.add_(0.5)
        adapter.B.mul_(2)
    delta = adapter.scale * (adapter.B @ adapter.A - adapter.origin_B @ adapter.origin_A)
    torch.testing.assert_close(adapter(layer(x), x, layer), layer(x) + x @ delta.T, rtol=1e-10, atol=1e-10)


def test_both_pairs_of_a_file_are_taken_apart():
    """Slot by slot in A: the pair of q, the origin of q, then those of v."""
    layer = slotted_layer()
    layer.site_name = "query_key_value"
    fields = dict(r=1, init_lora_weights="olora", qkv_slots="qv")
    adapter, other = adapter_for(layer, LoraConfig(**fields), seed=5), adapter_for(layer, LoraConfig(**fields))
    with torch.no_grad():
        adapter.origin_A.mul_(3)
        adapter.origin_B.mul_(-2)
    a, b = (tensor.detach() for tensor in adapter._factors({}))
    assert torch.equal(a, torch.cat([adapter.A[:1], adapter.origin_A[:1], adapter.A[1:], adapter.origin_A[1:]]))
    assert torch.equal(b, torch.cat([adapter.B, -adapter.origin_B], 1))
    other.load_tensors({"A": a, "B": b})
    for leaf in ("A", "B", "origin_A", "origin_B"):
        assert torch.equal(getattr(other, leaf), getattr(adapter, leaf)), leaf
    in_place = {"A": torch.zeros_like(a[:2]), "B": torch.ones_like(adapter.B)}
    a, b = other._factors(in_place)
    assert not a[[0, 2]].any() and torch.equal(a[[1, 3]], adapter.origin_A)
    assert (b[:, 0] == 1).all() and torch.equal(b[:, 1:], -adapter.origin_B)


def test_without_an_origin_the_pair_is_the_delta():
    adapter = adapter_for(build_layer("linear"), LoraConfig(r=4), seed=5)
    assert not adapter.has_origin and adapter.delta_rank == 4
    assert adapter._factors({}) == (adapter.A, adapter.B) and adapter.magnitude_or_none is None
    assert adapter._factors({"A": adapter.B}) == (adapter.B, adapter.B)


@pytest.mark.parametrize(
    "layer_name, fields, on_one_rank, on_two",
    [
        ("linear", {}, True, True),
        ("column", {}, True, True),
        ("column, gathered", {}, True, False),
        ("row", {}, True, True),
        ("row, input whole", {}, True, False),
        ("conv2d", {}, False, False),
        ("linear", {"use_dora": True}, False, False),
        ("linear", {"init_lora_weights": "olora"}, False, False),
    ],
)
def test_a_plain_delta_is_one_that_each_rank_adds_to_its_own_columns(
    monkeypatch, layer_name, fields, on_one_rank, on_two
):
    adapter = adapter_for(build_layer(layer_name), LoraConfig(r=4, **fields))
    assert adapter.is_plain is on_one_rank
    monkeypatch.setattr(adapter_module, "model_parallel_layout", lambda: (1, 2))
    assert adapter.is_plain is on_two


def test_an_adapter_shows_its_name_rank_and_slots():
    layer = slotted_layer()
    layer.site_name = "query_key_value"
    adapter = adapter_for(layer, LoraConfig(r=1, lora_alpha=3, qkv_slots="qv"))
    assert repr(adapter) == "LoraAdapter(query_key_value, r=1, scale=3, slots=('q', 'v'))"
    assert repr(adapter_for(build_layer("linear"), LoraConfig(r=4))) == "LoraAdapter(layer, r=4, scale=8)"


@pytest.mark.parametrize("ratio, noted", [(1.0, None), (16.0, 16.0)])
def test_only_another_rate_of_b_is_noted_on_it(ratio, noted):
    """SAT's trainer multiplies the rate of a parameter by its `lr_scale`."""
    adapter = adapter_for(torch.nn.Linear(8, 8), LoraConfig(r=2, lr_ratio=ratio))
    assert getattr(adapter.B, "lr_scale", None) == noted and not hasattr(adapter.A, "lr_scale")

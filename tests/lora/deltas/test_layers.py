"""The kinds of layer: what of them is left for several ranks, and when a product is taken over."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sat_lora import LoraConfig
from sat_lora._sat import ColumnParallelLinear
from sat_lora.lora.deltas import layers
from sat_lora.lora.deltas.kinds import KINDS, kind_of
from sat_lora.lora.deltas.layers import LayerDelta
from tests.support.single_layer import LAYERS, adapter_for, build_layer, inputs_for

pytestmark = pytest.mark.usefixtures("single_process_group")


def delta_of(adapter, **fields):
    return LayerDelta(adapter.A, adapter.B, adapter.scale, layout=adapter.layout, **fields)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_kind_of_its_name(name):
    layer = build_layer(name)
    kind = kind_of(layer)
    assert kind.name == name.partition(",")[0].partition(" ")[0].rstrip("123d") and kind is KINDS[kind.name]
    assert kind.is_linear == (kind.name in ("linear", "column", "row"))
    assert kind.is_embedding == (kind.name in ("embedding", "vocab"))
    assert kind.cut == {"column": "out", "row": "in", "vocab": "in"}.get(kind.name)
    adapter = adapter_for(layer, LoraConfig(r=2))
    assert kind.matrix(layer.weight).shape == (adapter.target.site.out_features, adapter.target.site.in_features)
    output = layer(inputs_for(layer))
    assert output.shape[kind.channel_dim(layer)] == 10


def test_what_is_no_such_layer_has_no_kind():
    assert kind_of(nn.LayerNorm(3)) is None and kind_of(nn.ConvTranspose1d(1, 1, 1)) is None


def test_a_gathered_column_adds_the_delta_of_its_own_columns_and_gathers_it(monkeypatch):
    """As if this process were one of two ranks with equal parts."""
    layer = build_layer("column, gathered")
    adapter = adapter_for(layer, LoraConfig(r=2), seed=5)
    x = inputs_for(layer)
    own = x @ (adapter.scale * adapter.B @ adapter.A).T
    y = torch.randn(2, 5, 20, dtype=torch.float64)
    monkeypatch.setattr(layers, "model_parallel_layout", lambda: (0, 2))
    monkeypatch.setattr(layers.mpu, "gather_from_model_parallel_region", lambda t: torch.cat([t, t], -1))
    before = y.clone()
    out = adapter.kind.add(layer, y, x, delta_of(adapter, output_is_untouched=True))
    torch.testing.assert_close(out, y + torch.cat([own, own], -1), rtol=1e-12, atol=1e-12)
    assert torch.equal(y, before)
    assert adapter.kind.across_ranks(layer, torch.arange(10.0)).tolist() == [*range(10), *range(10)]
    layer.gather_output = False
    assert adapter.kind.across_ranks(layer, torch.arange(10.0)).tolist() == [*range(10)]
    torch.testing.assert_close(adapter.kind.add(layer, y[..., :10], x, delta_of(adapter)), y[..., :10] + own)


@pytest.mark.parametrize("name", ["column, gathered", "linear"])
def test_the_gain_and_the_bias_of_dora_are_gathered_with_the_output(monkeypatch, name):
    layer = build_layer(name)
    adapter = adapter_for(layer, LoraConfig(r=2, use_dora=True), seed=5)
    x = inputs_for(layer)
    y, expected = layer(x).detach(), adapter(layer(x), x, layer)
    monkeypatch.setattr(layers, "model_parallel_layout", lambda: (0, 2))
    monkeypatch.setattr(layers.mpu, "gather_from_model_parallel_region", lambda t: torch.cat([t, t], -1))
    if name == "linear":  # nothing of it is on another rank
        assert torch.equal(adapter(y, x, layer), expected)
    else:
        torch.testing.assert_close(adapter(torch.cat([y, y], -1), x, layer), torch.cat([expected, expected], -1))


def test_of_one_rank_nothing_is_gathered(monkeypatch):
    layer = build_layer("column, gathered")
    adapter = adapter_for(layer, LoraConfig(r=2), seed=5)
    monkeypatch.setattr(layers.mpu, "gather_from_model_parallel_region", lambda t: pytest.fail("it was gathered"))
    x = inputs_for(layer)
    expected = layer(x) + x @ (adapter.scale * adapter.B @ adapter.A).T
    torch.testing.assert_close(adapter.kind.add(layer, layer(x), x, delta_of(adapter)), expected)
    assert adapter.kind.across_ranks(layer, torch.arange(10.0)).tolist() == [*range(10)]


@pytest.mark.parametrize("is_parallel", [False, True])
def test_a_row_takes_its_part_of_a_whole_input(monkeypatch, is_parallel):
    layer = build_layer("row" if is_parallel else "row, input whole")
    adapter = adapter_for(layer, LoraConfig(r=2), seed=5)
    monkeypatch.setattr(layers.mpu, "scatter_to_model_parallel_region", lambda t: t[..., :12])
    x = inputs_for(layer)
    given = x if is_parallel else torch.cat([x, x], -1)
    expected = layer(x) + x @ (adapter.scale * adapter.B @ adapter.A).T
    torch.testing.assert_close(adapter.kind.add(layer, layer(x), given, delta_of(adapter)), expected)


def test_a_rank_looks_up_the_ids_that_it_holds():
    layer = build_layer("vocab")
    adapter = adapter_for(layer, LoraConfig(r=2), seed=5)
    layer.vocab_start_index, layer.vocab_end_index = 100, 130
    ids = torch.tensor([[99, 100, 107, 129, 130, 0]])
    y = torch.zeros(1, 6, 10, dtype=torch.float64)
    out = adapter.kind.add(layer, y, ids, delta_of(adapter))
    columns = adapter.scale * (adapter.B @ adapter.A).T
    expected = torch.stack([y[0, 0], columns[0], columns[7], columns[29], y[0, 0], y[0, 0]])
    torch.testing.assert_close(out[0], expected, rtol=1e-12, atol=1e-12)


def test_an_id_of_padding_gets_its_delta_and_no_gradient():
    layer = nn.Embedding(5, 10, padding_idx=2, dtype=torch.float64).requires_grad_(False)
    adapter = adapter_for(layer, LoraConfig(r=2), seed=5)
    ids = torch.tensor([2, 3])
    out = adapter.kind.add(layer, layer(ids), ids, delta_of(adapter))
    expected = layer(ids) + adapter.scale * (adapter.B @ adapter.A).T[ids]
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert not adapter.A.grad[:, 2].any() and adapter.A.grad[:, 3].any()


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_in_training_some_inputs_are_dropped(name):
    layer = build_layer(name)
    adapter = adapter_for(layer, LoraConfig(r=2), seed=5)
    x = inputs_for(layer)
    without = adapter.kind.add(layer, layer(x), x, delta_of(adapter))
    torch.manual_seed(0)
    dropped = adapter.kind.add(layer, layer(x), x, delta_of(adapter, dropout=0.5))
    assert not torch.allclose(dropped, without)
    assert torch.equal(
        adapter.kind.add(layer, layer(x), x, replace(delta_of(adapter, dropout=0.5), dropout=0.0)), without
    )


class Other(nn.Linear):
    pass


def as_it_is(layer):
    return layer


def partitioned(layer):
    layer.weight.ds_id = 0
    return layer


def of_another_dtype(layer):
    return layer.float()


def trained(layer):
    layer.bias.requires_grad_()
    return layer


def parametrized(layer):
    return nn.utils.parametrizations.weight_norm(layer).requires_grad_(False)


def of_a_subclass(layer):
    return Other(12, 10, dtype=torch.float64).requires_grad_(False)


@pytest.mark.parametrize("change", [as_it_is, partitioned, of_another_dtype, trained, parametrized, of_a_subclass])
def test_a_product_is_taken_over_where_it_is_w_x_and_w_is_frozen_and_whole(change):
    layer = change(build_layer("linear"))
    kind, x = KINDS["linear"], torch.ones(1, 12, dtype=torch.float64)
    assert kind.can_fuse(layer, x) is (change is as_it_is)


def test_a_column_parallel_linear_is_taken_over_by_its_own_kind_alone():
    layer = ColumnParallelLinear(12, 10, params_dtype=torch.float64).requires_grad_(False)
    x = torch.ones(1, 12, dtype=torch.float64)
    assert KINDS["column"].can_fuse(layer, x) is True and KINDS["row"].can_fuse(layer, x) is False

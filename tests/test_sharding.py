"""Cutting and joining tensors, with SAT's own `partition` as the oracle."""

import pytest
import torch
from sat.mpu import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from sat_lora.sharding import REPLICATED, Sharding, mark_sharded, model_parallel_layout, sharding_of

LAYERS = {
    "column": lambda: ColumnParallelLinear(6, 24, bias=True),
    "column, stride 3": lambda: ColumnParallelLinear(6, 24, stride=3),
    "column, grouped-query": lambda: ColumnParallelLinear(6, 24, stride=[4, 1, 1]),
    "column, key and value": lambda: ColumnParallelLinear(6, 24, stride=2),
    "row": lambda: RowParallelLinear(24, 6),
    "vocabulary": lambda: VocabParallelEmbedding(24, 6),
}
pytestmark = pytest.mark.usefixtures("single_process_group")


def filled(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    return layer


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_shards_are_those_of_sats_partition(kind, size):
    layer = filled(LAYERS[kind]())
    weights, biases = layer.partition(size)
    expected = {"weight": weights} | ({"bias": biases} if biases else {})
    for name, shards in expected.items():
        sharding, full = sharding_of(layer, name), getattr(layer, name).detach()
        got = [sharding.shard(full, rank, size) for rank in range(size)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, shards, strict=True)), name
        assert torch.equal(sharding.unshard(shards), full), name
        assert {sharding.full_shape(shard.shape, size) for shard in shards} == {tuple(full.shape)}, name


def test_a_bias_is_cut_with_the_columns_and_whole_with_the_rows():
    assert sharding_of(LAYERS["column, stride 3"](), "bias") == Sharding(0, (1, 1, 1))
    assert sharding_of(LAYERS["row"](), "bias") == REPLICATED


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4), nn.Conv2d(3, 4, 2)])
def test_what_is_no_parallel_layer_is_the_same_on_every_rank(layer):
    sharding = sharding_of(layer, "weight")
    assert sharding == REPLICATED
    assert sharding.shard(layer.weight, 1, 2) is layer.weight
    assert sharding.unshard([layer.weight, layer.weight]) is layer.weight
    assert sharding.full_shape(layer.weight.shape, 2) == tuple(layer.weight.shape)


def test_unequal_blocks_of_a_factor_are_cut_one_by_one():
    """B of a grouped-query linear adapted in q and v alone: blocks of 16 and 4 rows."""
    full = torch.arange(20.0).view(20, 1)
    sharding = Sharding(0, (16, 4))
    second = sharding.shard(full, 1, 2).flatten().tolist()
    assert second == [8, 9, 10, 11, 12, 13, 14, 15, 18, 19]
    assert torch.equal(sharding.unshard([sharding.shard(full, rank, 2) for rank in range(2)]), full)


def test_a_cut_without_blocks_is_a_view():
    """A rank that loads from a mapped file reads its own slice alone."""
    full = torch.zeros(8, 4)
    assert Sharding(0).shard(full, 1, 2).untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
    assert Sharding(1).shard(full, 1, 2).untyped_storage().data_ptr() == full.untyped_storage().data_ptr()


def test_only_cut_parameters_carry_the_parallel_flags():
    cut, whole = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert mark_sharded(cut, Sharding(0)) is cut and cut.model_parallel and cut.tensor_model_parallel
    mark_sharded(whole, REPLICATED)
    assert not hasattr(whole, "model_parallel") and not hasattr(whole, "tensor_model_parallel")


def test_one_process_is_a_layout_of_one():
    assert model_parallel_layout() == (0, 1)

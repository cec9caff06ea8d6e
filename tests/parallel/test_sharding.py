"""Cutting and joining tensors, with SAT's own `partition` as the oracle."""

import pytest
import torch
from sat.mpu import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from sat_lora.parallel.sharding import REPLICATED, Sharding, mark_sharded, model_parallel_layout, sharding_of

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


def without_holes(sharding, rank, size, saved, length=48, rows=None):
    """One rank's part put together from those of `saved` ranks, and what it should be."""
    full = torch.arange(length * 6.0).view((length, 6) if sharding.dim == 0 else (6, length))
    expected = sharding.shard(full, rank, size)
    parts = {other: sharding.shard(full, other, saved) for other, _, _ in sharding.pieces(length, saved, rank, size)}
    target = torch.full_like(expected, -1, memory_format=torch.contiguous_format)
    sharding.fill(target, parts, saved=saved, rank=rank, size=size, rows=rows)
    return target, expected


@pytest.mark.parametrize("saved", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "sharding", [Sharding(0), Sharding(0, (1, 1, 1)), Sharding(0, (4, 1, 1)), Sharding(1), REPLICATED], ids=str
)
def test_parts_saved_by_any_number_of_ranks_make_the_part_of_any_other(sharding, saved, size):
    for rank in range(size):
        target, expected = without_holes(sharding, rank, size, saved, length=144)
        assert torch.equal(target, expected), rank


@pytest.mark.parametrize("sharding", [Sharding(0, (1, 1, 1)), Sharding(1), REPLICATED], ids=str)
def test_only_the_rows_asked_for_are_written(sharding):
    target, expected = without_holes(sharding, 1, 2, 4, rows=range(2, 5))
    assert torch.equal(target[2:5], expected[2:5])
    assert (target[:2] == -1).all() and (target[5:] == -1).all()


def test_a_rank_needs_the_files_that_overlap_its_own_part_and_no_others():
    def needed(saved, rank, size):
        return sorted({other for other, _, _ in Sharding(0, (1, 1, 1)).pieces(72, saved, rank, size)})

    assert needed(4, 1, 2) == [2, 3]
    assert needed(2, 2, 4) == [1]
    assert needed(3, 0, 2) == [0, 1]
    assert needed(2, 1, 2) == [1]


def test_what_a_saved_rank_holds_follows_from_what_one_holds():
    assert Sharding(1).saved_shape(torch.Size((5, 8)), 2, 4) == (5, 4)
    assert REPLICATED.saved_shape(torch.Size((5, 8)), 2, 4) == (5, 8)
    assert Sharding(0).saved_shape(torch.Size((5, 8)), 2, 4) is None

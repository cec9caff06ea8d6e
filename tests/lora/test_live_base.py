"""The values by which a live base is known, from ranks that hold parts of it: each is pretended in turn."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sat_lora import add_lora
from sat_lora._sat import ColumnParallelLinear
from sat_lora.lora import live_base
from sat_lora.lora.base_identity import fingerprint_of
from sat_lora.lora.live_base import _own_values, base_tensors, identity_of_model, whole_shape
from sat_lora.parallel.sharding import REPLICATED, Sharding
from tests.support.tiny import tiny_model

WHOLE = torch.arange(1.0, 97.0).view(12, 8)
INDEX = torch.tensor([0, 7, 8, 37, 52, 95])
CUTS = {
    "whole": REPLICATED,
    "by rows": Sharding(0),
    "by rows of q, k, v": Sharding(0, (1, 1, 1)),
    "by rows of unequal blocks": Sharding(0, (4, 1, 1)),
    "by columns": Sharding(1),
}


class Partition:
    """A tensor that ZeRO-3 has cut over `ranks`: flat, with padding at the end."""

    def __init__(self, local: torch.Tensor, rank: int, ranks: int, device="cpu"):
        size = math.ceil(local.numel() / ranks)
        flat = torch.cat([local.reshape(-1), torch.full((size * ranks - local.numel(),), 1e9)])
        self.ds_id, self.ds_process_group = 1, SimpleNamespace(rank=rank)
        self.ds_shape, self.ds_numel, self.shape = local.shape, local.numel(), torch.Size((0,))
        self.ds_tensor = flat[size * rank : size * (rank + 1)].clone()
        self.ds_tensor.ds_numel = size
        self.device = torch.device(device)


@pytest.fixture
def layout(monkeypatch):
    """Sets the rank and the size that the model-parallel group seems to have."""
    place = [0, 1]
    monkeypatch.setattr(live_base, "model_parallel_layout", lambda: tuple(place))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group.rank)

    def choose(rank, size):
        place[:] = rank, size

    return choose


def values_of(tensor, sharding, *, gives_whole=True, original=None):
    values = _own_values(tensor, original, sharding, tuple(WHOLE.shape), INDEX, gives_whole=gives_whole)
    assert values.dtype == torch.float32 and values.shape == INDEX.shape
    return values


@pytest.mark.parametrize("sharding", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("size", [1, 2])
def test_each_value_comes_from_one_model_parallel_rank(layout, sharding, size):
    parts = []
    for rank in range(size):
        layout(rank, size)
        parts.append(values_of(sharding.shard(WHOLE, rank, size), sharding))
    assert torch.equal(torch.stack(parts).sum(0), WHOLE.flatten()[INDEX])
    assert (torch.stack(parts) != 0).sum() == len(INDEX)


@pytest.mark.parametrize("sharding", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("size, ranks", [(1, 2), (2, 2), (1, 5)])
def test_each_value_comes_from_one_partition_and_none_from_padding(layout, sharding, size, ranks):
    parts = []
    for rank in range(size):
        layout(rank, size)
        for data_rank in range(ranks):
            partition = Partition(sharding.shard(WHOLE, rank, size), data_rank, ranks)
            parts.append(values_of(partition, sharding, gives_whole=data_rank == 0))
    assert torch.equal(torch.stack(parts).sum(0), WHOLE.flatten()[INDEX])
    assert (torch.stack(parts) != 0).sum() == len(INDEX)


def test_of_ranks_that_hold_the_same_one_gives_its_values(layout):
    assert torch.equal(values_of(WHOLE, REPLICATED, gives_whole=True), WHOLE.flatten()[INDEX])
    assert not values_of(WHOLE, REPLICATED, gives_whole=False).any()


@pytest.mark.parametrize("size", [1, 2])
def test_an_original_stands_for_what_was_trained(layout, size):
    sharding = Sharding(0)
    parts = []
    for rank in range(size):
        layout(rank, size)
        local = sharding.shard(WHOLE, rank, size)
        parts.append(values_of(local + 1, sharding, original=local.clone()))
    assert torch.equal(torch.stack(parts).sum(0), WHOLE.flatten()[INDEX])


def test_an_original_is_a_partition_or_whole_as_it_was_kept(layout):
    kept, whole = [], []
    for rank in range(2):
        partition = Partition(WHOLE + 1, rank, 2)
        gives_whole = rank == 0
        kept.append(
            values_of(partition, REPLICATED, original=Partition(WHOLE, rank, 2).ds_tensor, gives_whole=gives_whole)
        )
        whole.append(values_of(partition, REPLICATED, original=WHOLE, gives_whole=gives_whole))
    for parts in (kept, whole):
        assert torch.equal(torch.stack(parts).sum(0), WHOLE.flatten()[INDEX])


@pytest.mark.parametrize("is_quantised", [False, True])
def test_a_partition_that_is_not_in_memory_as_it_is_counts_is_gathered(layout, monkeypatch, is_quantised):
    """It was offloaded to a disk, or quantised."""
    partition = Partition(WHOLE, 0, 2)
    if is_quantised:
        partition.ds_tensor.ds_quant_scale = torch.ones(1)
    else:
        partition.ds_tensor = torch.empty(0)
        partition.ds_tensor.ds_numel = 48
    gathered = []

    class Gathering:
        def __init__(self, tensors):
            self.tensors = tensors

        def __enter__(self):
            gathered.extend(self.tensors)
            partition.detach = lambda: WHOLE

        def __exit__(self, *error):
            del partition.detach

    monkeypatch.setattr(live_base, "gathered", Gathering)
    assert torch.equal(values_of(partition, REPLICATED), WHOLE.flatten()[INDEX])
    assert gathered == [partition]


def test_a_whole_shape_is_that_before_any_cut(layout, single_process_group):
    linear = ColumnParallelLinear(4, 6, stride=3, gather_output=False)
    layout(1, 3)
    assert whole_shape(linear, "weight", torch.empty(2, 4)) == (6, 4)
    partition = torch.empty(0)
    partition.ds_shape = torch.Size((2, 4))
    assert whole_shape(linear, "weight", partition) == (6, 4)


def test_the_base_is_what_its_checkpoint_holds_and_no_mixin_of_ours(single_process_group):
    model = tiny_model()
    expected = model.state_dict()
    add_lora(model, r=2, target_modules=["attention.dense"])
    model.mixins["lora"].register_buffer("other", torch.zeros(1))
    tensors = base_tensors(model)
    assert tensors.keys() == expected.keys()
    for name, (module, leaf, tensor) in tensors.items():
        assert getattr(module, leaf) is tensor and name.endswith(leaf)
        assert torch.equal(tensor, expected[name])


def test_buffers_that_no_checkpoint_holds_and_what_is_none_do_not_count():
    module = nn.Linear(2, 2, bias=False)
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("made", torch.zeros(1), persistent=False)
    assert base_tensors(module).keys() == {"weight", "kept"}


def test_the_identity_of_a_model_says_what_is_known_of_it(single_process_group):
    model = tiny_model()
    model.base_name = "cogvlm"
    identity = identity_of_model(model)
    state = model.state_dict()
    assert (identity.name, identity.family) == ("cogvlm", "CogVLM")
    assert identity.parameters == sum(tensor.numel() for tensor in state.values())
    assert identity.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert not identity.values.requires_grad and identity.values.abs().sum() > 0


def test_without_the_originals_nothing_is_known_but_names_and_shapes(single_process_group):
    model = tiny_model()
    (mixin, *_) = add_lora(model, r=2, target_modules=["attention.dense"])
    mixin.merge(keep_original=False)
    identity = identity_of_model(model)
    assert identity.values is None and identity.parameters is None
    assert identity.fingerprint == fingerprint_of(
        {name: tuple(t.shape) for name, (*_, t) in base_tensors(model).items()}
    )


@pytest.mark.parametrize("size", [1, 2])
def test_the_values_are_summed_over_the_ranks_that_hold_parts(monkeypatch, single_process_group, size):
    model = tiny_model()
    expected = identity_of_model(model)
    monkeypatch.setattr(live_base, "model_parallel_layout", lambda: (0, size))
    sums = []

    def all_reduce(tensor, group):
        sums.append(group)
        tensor.mul_(3)

    monkeypatch.setattr(live_base.mpu, "get_model_parallel_group", lambda: "ranks")
    monkeypatch.setattr(live_base, "_own_values", lambda *args, **kwargs: torch.ones(len(args[4])))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    identity = identity_of_model(model)
    assert sums == ["ranks"] * (size - 1)
    assert (identity.values == (3 if size > 1 else 1)).all()
    assert (identity.fingerprint == expected.fingerprint) == (size == 1)  # of whole shapes

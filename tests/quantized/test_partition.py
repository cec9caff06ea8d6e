"""Codes and scales that are cut over ranks: every rank's part, put together again, is what there was."""

import copy
import pickle

import pytest
import torch

from sat_lora import QuantizationError
from sat_lora.quantized import partition as partitions
from sat_lora.quantized.layers import bytes_of
from sat_lora.quantized.partition import Partition
from sat_lora.quantized.quantized_weight import LowRank, QuantizedWeight
from sat_lora.quantized.schemes import SCHEMES

pytestmark = pytest.mark.usefixtures("single_process_group")


def weight_of(scheme, rows=6, columns=96) -> QuantizedWeight:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return QuantizedWeight.of(drawn, SCHEMES[scheme])


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("shape", [(6, 96), (1, 32), (5, 128), (7, 96)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_parts_are_the_whole(scheme, shape, ranks, monkeypatch):
    weight = weight_of(scheme, *shape)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    cut = Partition(None, tuple(weight.codes.shape), weight.codes.dtype, tuple(weight.scales.shape))
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        parts.append(cut.part(weight.codes, weight.scales))
    assert {len(part) for part in parts} == {cut.part_bytes}
    assert 0 <= ranks * cut.part_bytes - weight.stored_bytes < ranks

    def gather(whole, part, group):
        whole.copy_(torch.cat(parts))

    monkeypatch.setattr(partitions, "_all_gather", gather)
    codes, scales = cut.gathered(parts[0])
    assert torch.equal(codes, weight.codes) and torch.equal(scales, weight.scales)
    assert codes.dtype is weight.codes.dtype and scales.dtype is torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_the_weight_that_it_was(scheme):
    weight = weight_of(scheme)
    cut = weight.partitioned(torch.distributed.group.WORLD)
    assert cut.shape == weight.shape and cut.block == weight.block and bytes_of(cut) == bytes_of(weight)
    for other in (cut, copy.deepcopy(cut), cut.detach(), cut.to("cpu")):
        assert torch.equal(other.decoded(), weight.decoded())
    assert torch.equal(cut.to(torch.bfloat16).decoded(), weight.to(torch.bfloat16).decoded())
    assert torch.equal(copy.deepcopy(cut), cut) and not torch.equal(cut, weight)
    results = []
    for side in (cut, weight):
        x = torch.ones(3, 96, requires_grad=True)
        y = torch.nn.functional.linear(x, side)
        y.square().sum().backward()
        results.append((y, x.grad))
    assert all(map(torch.equal, *results))


def test_what_is_copied_into_it_is_encoded_and_cut_with_what_is_added():
    cut = weight_of("nf4").partitioned(torch.distributed.group.WORLD)
    other = QuantizedWeight.of(torch.ones(6, 96), SCHEMES["nf4"])
    other.low_rank = LowRank(torch.ones(6, 2), torch.ones(2, 96), 0.5, ((0, 6),))
    cut.take(other)
    assert torch.equal(cut.decoded(), torch.full((6, 96), 2.0))
    cut.copy_(torch.full((6, 96), 3.0))
    assert torch.equal(cut.decoded(), torch.full((6, 96), 3.0)) and cut.low_rank is None


def test_a_rank_without_rows_gathers_as_the_others_do(monkeypatch):
    """Else they would wait for it."""
    calls = []
    gather = Partition.gathered
    monkeypatch.setattr(Partition, "gathered", lambda self, part: calls.append(1) or gather(self, part))
    cut = weight_of("nf4").partitioned(torch.distributed.group.WORLD)
    x = torch.ones(0, 96, requires_grad=True)
    torch.nn.functional.linear(x, cut).sum().backward()
    assert len(calls) == 2 and x.grad.shape == (0, 96)
    torch.ones(0, 6) @ cut
    assert len(calls) == 3


def test_it_is_not_pickled():
    """Its codes are on other ranks, which need not be asked at that time."""
    with pytest.raises(QuantizationError, match="pickle on a quantised weight"):
        pickle.dumps(weight_of("nf4").partitioned(torch.distributed.group.WORLD))

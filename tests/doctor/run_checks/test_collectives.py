"""Groups of ranks that do not work, each with its fault planted."""

import time

import pytest
import torch

from sat_lora.doctor.run_checks import collectives
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(60)


def rank_1_does_not_come():
    world = init_model_parallel(init_distributed())
    if world.rank == 1:
        time.sleep(4)
        return None
    begun = time.monotonic()
    return collectives.collective_findings(timeout=1.0), time.monotonic() - begun


def test_a_rank_that_does_not_come_is_named_in_time():
    (findings, seconds), _ = run_ranks(rank_1_does_not_come, 2)
    (finding,) = findings
    assert (finding.code, finding.ranks) == ("collective", (1,)) and seconds < 4
    assert finding.seen == "the world of ranks 0, 1 (gloo): rank 1 did not come within 1 s"


class Done:
    def is_completed(self):
        return True

    def wait(self):
        return True


def faulty_all_reduce(fault):
    """What came of it, and the times, with a fault planted in the model-parallel group of ranks 0 and 1."""
    world = init_model_parallel(init_distributed(), 2)
    real, group = torch.distributed.all_reduce, collectives.mpu.get_model_parallel_group()

    def planted(value, group=None, async_op=False, own=group):
        if group is own and world.rank == 1 and fault == "silent":
            return Done()
        if group is own and fault == "slow":
            time.sleep(0.2)
        if group is own and world.rank == 1 and fault == "error":
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234\nand more")
        work = real(value, group=group, async_op=async_op)
        if group is own and world.rank == 1 and fault == "wrong":
            work.wait()
            value += 1
        return work

    collectives.dist.all_reduce = planted
    collectives.SLOW = 0.1
    found = collectives.collective_findings(timeout=1.0)
    return [(one.code, one.ranks, one.seen) for one in found]


@pytest.mark.parametrize(
    "fault, told",
    [
        ("silent", [((1,), "the all-reduce gives 2 in place of 3"), ((0,), "is not through after 1 s")]),
        ("wrong", [((1,), "the all-reduce gives 4 in place of 3")]),
        ("error", [((1,), "Connection closed by peer [127.0.0.1]:1234"), ((0,), "is not through after 1 s")]),
        ("slow", [((0, 1), "an all-reduce of 4 bytes takes 0.2 s, after a first one")]),
    ],
)
def test_a_group_that_does_not_work_is_named_on_every_rank(fault, told):
    first, second = run_ranks(faulty_all_reduce, 2, fault)
    assert first == second and {code for code, *_ in first} == {"collective"}
    assert all(seen.startswith("the model-parallel group of ranks 0, 1 (gloo): ") for *_, seen in first)
    for ranks, words in told:
        assert any(own == ranks and words in seen for _, own, seen in first), first


def healthy_groups():
    init_model_parallel(init_distributed(), 2)
    return collectives.collective_findings(), collectives.collective_times()


def test_healthy_groups_have_a_line_of_times_each():
    for findings, text in run_ranks(healthy_groups, 4):
        assert findings == []
        assert sorted(line.partition(" (gloo): all-reduce of 4 bytes ")[0] for line in text.splitlines()) == [
            "the data-parallel group of ranks 0, 2",
            "the data-parallel group of ranks 1, 3",
            "the model-parallel group of ranks 0, 1",
            "the model-parallel group of ranks 2, 3",
            "the world of ranks 0, 1, 2, 3",
        ]
        assert all(line.count(" ms") == 3 or " s" in line for line in text.splitlines())


def test_one_process_has_no_collectives(single_process_group):
    assert collectives.collective_findings() == []
    assert collectives.collective_times() == "one process, no collectives"

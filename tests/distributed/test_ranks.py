"""The harness: a rank that fails, hangs or dies is reported, in time, and nobody is left running."""

import os
import time

import pytest
import torch

from sat_lora.parallel.distributed import init_distributed
from tests.support.patience import patient
from tests.support.ranks import run_ranks


def add_ranks():
    init_distributed()
    total = torch.tensor(float(torch.distributed.get_rank()))
    torch.distributed.all_reduce(total)
    return total.item()


def test_ranks_reach_each_other_and_answer_in_order():
    assert run_ranks(add_ranks, 3) == [3.0, 3.0, 3.0]


def asks_the_store_late() -> int:
    init_distributed()
    rank, store = torch.distributed.get_rank(), torch.distributed.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("of the first", "")
    else:
        time.sleep(1)
        store.get("of the first")
    return rank


def test_no_rank_ends_before_all_have_answered():
    """The store of all is in the first one: a rank that still formed its groups met a connection reset by peer."""
    assert run_ranks(asks_the_store_late, 2) == [0, 1]


def fail_on_rank_1(folder):
    init_distributed()
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        raise ValueError("planted")
    torch.distributed.barrier()  # waits for ever for rank 1


def hang_on_rank_1(folder):
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    print("about to hang", flush=True)
    while os.environ["RANK"] == "1":
        time.sleep(1)


def die_on_rank_1(folder):
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)


@pytest.mark.parametrize(
    "target, message",
    [
        (fail_on_rank_1, "(?s)rank 1: Traceback.*ValueError: planted"),
        (hang_on_rank_1, "(?s)rank 1: no answer; its output:.*about to hang"),
        (die_on_rank_1, "rank 1: the process ended without a word"),
    ],
    ids=["fails", "hangs", "dies"],
)
def test_a_rank_that_does_not_answer_is_named_in_time_and_nobody_stays(target, message, tmp_path):
    run_ranks(os.getpid, 2)  # the server that ranks are forked from is there
    started = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_ranks(target, 2, tmp_path, timeout=6)
    assert time.monotonic() - started < patient(20)
    for pid in (int((tmp_path / rank).read_text()) for rank in ("0", "1")):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

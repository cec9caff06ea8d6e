"""Whether the ranks of every group of a run can talk to each other, and how fast.

Ranks first meet in the store that they found each other by, which needs no group. So a rank that does not come is named
and not waited for, and no group is left with a collective half made.
"""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sat_lora._sat import mpu
from sat_lora.findings.finding import Finding, looks_for

SLOW = 1.0  # seconds for 4 bytes, after a first call that connects
TIMEOUT = 60.0
_calls = itertools.count()  # every rank calls equally often, so that they meet under one name


@dataclass(frozen=True)
class GroupTest:
    """What came of one group; seconds are those of the slowest rank."""

    name: str
    ranks: tuple[int, ...]
    backend: str
    first: float = 0.0
    all_reduce: float = 0.0
    broadcast: float = 0.0
    absent: tuple[int, ...] = ()
    problems: tuple[tuple[int, str], ...] = ()
    """What each rank saw: (rank, problem)."""

    @property
    def title(self) -> str:
        """The group's name, ranks and backend, for people."""
        return f"{self.name} of {_ranks_in_words(self.ranks)} ({self.backend})"


@looks_for("collective")
def collective_findings(timeout: float = TIMEOUT) -> list[Finding]:
    """Return `collective` for each group that lacks a rank, gives a wrong result, fails or is slow.

    Every rank has to call it, and those that do get the same. It ends within a few times `timeout`, in seconds: each
    group has that long to come together, and as long for each collective.
    """
    findings = []
    for test in run_tests(timeout):
        if test.absent:
            seen = f"{test.title}: {_ranks_in_words(test.absent)} did not come within {timeout:g} s"
            fix = "look at that rank's own output and at its machine: the process has ended, or hangs somewhere else"
            findings.append(Finding(code="collective", seen=seen, ranks=test.absent, fix=fix))
        for problem in dict.fromkeys(problem for _, problem in test.problems):
            ranks = tuple(rank for rank, text in test.problems if text == problem)
            findings.append(Finding(code="collective", seen=f"{test.title}: {problem}", ranks=ranks))
        if test.all_reduce > SLOW:
            seen = f"{test.title}: an all-reduce of 4 bytes takes {test.all_reduce:.1f} s, after a first one"
            findings.append(Finding(code="collective", seen=seen, ranks=test.ranks))
    return findings


def collective_times(timeout: float = TIMEOUT) -> str:
    """Return a line per group with its times. Every rank has to call it."""
    lines = []
    for test in run_tests(timeout):
        failed = test.absent or test.problems
        times = (
            f"all-reduce of 4 bytes {_duration(test.all_reduce)}, broadcast {_duration(test.broadcast)}, "
            f"the first all-reduce {_duration(test.first)}"
        )
        lines.append(f"{test.title}: {'failed' if failed else times}")
    return "\n".join(lines) or "one process, no collectives"


def run_tests(timeout: float = TIMEOUT) -> list[GroupTest]:
    """Return what came of every group of more than one rank, on all ranks; see `collective_findings`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    # The only way to it: torch 2.13 has no public name for the store of the rendezvous.
    store = dist.PrefixStore(f"sat_lora_doctor_{next(_calls)}", dist.distributed_c10d._get_default_store())
    tests: list[GroupTest] = []
    try:
        for name, group in _groups():
            missing = {rank for test in tests for rank in test.absent}
            if not missing & {*dist.get_process_group_ranks(group)}:
                tests.append(_test(name, group, store, timeout))
        return _of_all_ranks(tests, store, timeout)
    except dist.DistNetworkError as error:  # the store is a thread of rank 0
        problem = f"rank 0 does not answer any more: {error}".partition("\n")[0]
        world = GroupTest("the world", tuple(range(dist.get_world_size())), dist.get_backend())
        return [dataclasses.replace(world, problems=((dist.get_rank(), problem),))]


def _groups() -> Iterator[tuple[str, dist.ProcessGroup]]:
    groups = [("the world", dist.group.WORLD)]
    if mpu.model_parallel_is_initialized():
        groups.append(("the model-parallel group", mpu.get_model_parallel_group()))
        groups.append(("the data-parallel group", mpu.get_data_parallel_group()))
    return ((name, group) for name, group in groups if dist.get_world_size(group) > 1)


def _test(name: str, group: dist.ProcessGroup, store: dist.Store, timeout: float) -> GroupTest:
    ranks = tuple(dist.get_process_group_ranks(group))
    own_rank = dist.get_rank()
    test = GroupTest(name, ranks, dist.get_backend(group))
    absent = _meet(store, name, own_rank, ranks, timeout)
    if absent:
        return dataclasses.replace(test, absent=absent)
    device = torch.device("cuda", torch.cuda.current_device()) if test.backend == "nccl" else torch.device("cpu")
    place = ranks.index(own_rank)
    size = len(ranks)
    try:
        times = []
        for _ in range(3):
            value = torch.full((1,), place + 1.0, device=device)
            times.append(_time(lambda value=value: dist.all_reduce(value, group=group, async_op=True), timeout))
            _compare("all-reduce", float(value), size * (size + 1) / 2)
        value = torch.full((1,), own_rank + 1.0, device=device)
        broadcast = _time(lambda: dist.broadcast(value, ranks[0], group=group, async_op=True), timeout)
        _compare("broadcast", float(value), ranks[0] + 1.0)
    except (RuntimeError, OSError) as error:  # torch's DistError and TimeoutError are among them
        return dataclasses.replace(test, problems=((own_rank, f"{error}".partition("\n")[0]),))
    return dataclasses.replace(test, first=times[0], all_reduce=min(times[1:]), broadcast=broadcast)


def _meet(store: dist.Store, name: str, own_rank: int, ranks: Sequence[int], timeout: float) -> tuple[int, ...]:
    """Return the ranks that do not come in time."""
    keys = {rank: f"{name}/{rank}" for rank in ranks}
    store.set(keys[own_rank], "here")
    try:
        store.wait([*keys.values()], timedelta(seconds=timeout))
    except RuntimeError:
        return tuple(rank for rank, key in keys.items() if not store.check([key]))
    return ()


def _time(start, timeout: float) -> float:
    """Return the seconds until the collective that `start` begins is through. Raises TimeoutError."""
    begun = time.perf_counter()
    work = start()
    # NCCL's work has no wait that ends at a time and leaves the process alive; asking works on every backend.
    while not work.is_completed():
        if time.perf_counter() - begun > timeout:
            raise TimeoutError(f"a collective of 4 bytes is not through after {timeout:g} s")
        time.sleep(1e-4)
    work.wait()
    return time.perf_counter() - begun


def _compare(what: str, got: float, wanted: float) -> None:
    if got != wanted:
        raise RuntimeError(f"the {what} gives {got:g} in place of {wanted:g}")


def _of_all_ranks(tests: list[GroupTest], store: dist.Store, timeout: float) -> list[GroupTest]:
    """Return what all ranks have seen, by group; it goes through the store, for the groups may not work."""
    own_rank = dist.get_rank()
    ranks = range(dist.get_world_size())
    store.set(f"seen/{own_rank}", json.dumps([dataclasses.asdict(test) for test in tests]))
    lost = {rank for test in tests for rank in test.absent}
    keys = {rank: f"seen/{rank}" for rank in ranks if rank not in lost}
    silent: tuple[int, ...] = ()
    try:
        # Another rank may still be in a collective that this one has given up, or came to none.
        store.wait([*keys.values()], timedelta(seconds=3 * timeout))
    except RuntimeError:
        silent = tuple(rank for rank, key in keys.items() if not store.check([key]))
    groups: dict[tuple, GroupTest] = {}
    for content in store.multi_get([key for rank, key in keys.items() if rank not in silent]):
        for entry in json.loads(content):
            test = _from_json(entry)
            key = (test.name, test.ranks)
            groups[key] = _merged(groups[key], test) if key in groups else test
    _wait_for_readers(store, own_rank, [rank for rank in keys if rank not in silent], timeout)
    if silent and groups:
        first = next(iter(groups))
        groups[first] = dataclasses.replace(groups[first], absent=(*groups[first].absent, *silent))
    return [*groups.values()]


def _wait_for_readers(store: dist.Store, own_rank: int, ranks: Sequence[int], timeout: float) -> None:
    """Keep the store, which rank 0 holds, until the others have read."""
    store.set(f"read/{own_rank}", "")
    if own_rank == 0:
        with contextlib.suppress(dist.DistStoreError):  # one that has ended needs nothing any more
            store.wait([f"read/{rank}" for rank in ranks], timedelta(seconds=min(timeout, 5)))


def _from_json(entry: dict) -> GroupTest:
    problems = tuple((rank, problem) for rank, problem in entry["problems"])
    absent = tuple(entry["absent"])
    ranks = tuple(entry["ranks"])
    return GroupTest(**{**entry, "problems": problems, "absent": absent, "ranks": ranks})


def _merged(test: GroupTest, other: GroupTest) -> GroupTest:
    return dataclasses.replace(
        test,
        **{name: max(getattr(test, name), getattr(other, name)) for name in ("first", "all_reduce", "broadcast")},
        absent=tuple(sorted({*test.absent, *other.absent})),
        problems=(*test.problems, *other.problems),
    )


def _ranks_in_words(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]} ... {ranks[-1]}, {len(ranks)}"
    return f"ranks {listed}" + (" in all" if len(ranks) > 8 else "")


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"

"""This process among the others: rank, device, process groups, and mistakes that every rank has to hear of."""

import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from sat_lora._sat import mpu
from sat_lora.errors import ConfigError, SatLoraError
from sat_lora.files.foreign import os_problem
from sat_lora.parallel.agreement import differences, disagreement, mark
from sat_lora.parallel.launch import find_place, ranks_on_this_machine
from sat_lora.parallel.rendezvous import compare, meet

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int
    size: int
    device: torch.device
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0


def init_distributed(
    backend: str | None = None, marks: Mapping[str, str] | None = None, *, alone: bool = False
) -> torch.device:
    """Join the process group that a launcher describes in the environment, or be alone; return the device.

    NCCL on CUDA, unless `backend` says otherwise; gloo on the CPU whatever it says. On the CPU the ranks of a machine
    share its cores but one, which data workers need. marks: what all ranks have to have alike, by name (see
    `agreement`), compared before they do anything together. alone: whatever the environment says, for a command of one
    process in a job of several. Raises ConfigError if the environment is wrong or incomplete (see `find_place`), the
    port is taken, the other ranks do not come in time, or, on every rank, some marks differ.
    """
    environment = os.environ
    place = find_place({} if alone else environment)
    is_joined = torch.distributed.is_initialized()
    if torch.cuda.is_available():
        _let_memory_grow(environment)
        _take_gpu(place.local_rank)
        device = torch.device("cuda", place.local_rank)
        backend = backend or "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        _share_cores(place.size)
    if not is_joined:
        store = meet(place)
        if marks is not None and place.size > 1:
            compare(store, place, marks)
        address = place.address or "127.0.0.1"
        port = place.port or store.underlying_store.port
        for name, value in (("RANK", place.rank), ("WORLD_SIZE", place.size), ("LOCAL_RANK", place.local_rank)):
            environment[name] = str(value)
        environment["MASTER_ADDR"] = address
        environment["MASTER_PORT"] = str(port)
        group = torch.distributed.PrefixStore("group", store)
        torch.distributed.init_process_group(backend, store=group, rank=place.rank, world_size=place.size)
    return device


def _take_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank} and this machine has {count} GPUs that can be used: one process per GPU; "
            f"start {count} here (deepspeed --num_gpus {count}, torchrun --nproc_per_node {count}), or look at "
            "CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)


def _let_memory_grow(environment: MutableMapping[str, str]) -> None:
    """Let torch's memory on CUDA grow in place, unless the user has said how it is taken.

    Batches differ in length and in images: pieces of one step's sizes are none of the next one's. It has to be said
    before the first allocation. torch 2.9 listens to the old name alone, 2.8 to 2.11 warn of it where the new one is
    missing.
    """
    if not environment.keys() & set(ALLOCATOR):
        for name in ALLOCATOR:
            environment[name] = "expandable_segments:True"


def _share_cores(size: int) -> None:
    """Set torch's threads, unless OMP_NUM_THREADS does.

    Threads that outnumber the cores left to them spend most of a step waiting for each other.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        local_ranks = ranks_on_this_machine(size)
        torch.set_num_threads(max(1, (len(os.sched_getaffinity(0)) - 1) // local_ranks))


def init_model_parallel(device: torch.device, model_parallel_size: int = 1) -> World:
    """Set up SAT's model-parallel and data-parallel groups; return the place of this process in them."""
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(model_parallel_size)
    return World(
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        device,
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
    )


def destroy() -> None:
    """Leave the process group, and SAT's groups within it; nothing happens without one."""
    if torch.distributed.is_initialized():
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def run_on_all_ranks(step: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Run `step` on every rank and return its result; a user's mistake on any rank is raised on all.

    A file or folder that cannot be used (an OSError that names one) is such a mistake, raised as a SatLoraError.
    """
    mistake: SatLoraError | None = None
    try:
        result = step(*args, **kwargs)
    except SatLoraError as error:
        mistake = error
    except OSError as error:
        if error.filename is None:
            raise
        mistake = SatLoraError(os_problem(error))
    mistakes: list[SatLoraError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(mistakes, mistake)
    first = next((m for m in mistakes if m is not None), None)
    if first is not None:
        raise first
    return result  # there, since no rank has made a mistake, this one included


def agree(marks: Mapping[str, str]) -> None:
    """Raise ConfigError, the same on every rank, if `marks` are not alike on all; every rank has to call it.

    marks: values by name, see `agreement`.
    """
    digests = gather_lists([mark(marks)])
    if len(set(digests)) == 1:
        return
    first, *others = gather_lists([dict(marks)])
    by_rank = {rank: differences(other, first) for rank, other in enumerate(others, 1)}
    raise disagreement(first, {rank: differing for rank, differing in by_rank.items() if differing})


def gather_lists(entries: list[Entry]) -> list[Entry]:
    """Return the lists of all ranks, joined in rank order. Every rank has to call it."""
    lists: list[list[Entry]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, entries)
    return [entry for of_rank in lists for entry in of_rank]

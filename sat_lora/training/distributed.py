"""This process among the others: rank, device, process groups, and mistakes that every rank has to hear of."""

import os
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch

from sat_lora._sat import mpu
from sat_lora.errors import ConfigError, SatLoraError

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(backend: str | None = None) -> torch.device:
    """Join the process group that `deepspeed` or `torchrun` describes in the environment, or be alone.

    NCCL on CUDA, unless `backend` says otherwise; gloo on the CPU whatever it says. On the CPU the ranks of a machine
    share its cores but one, which data workers need.
    ConfigError: `srun` has started several processes, and no launcher has told this one its rank.
    """
    environment = os.environ
    _refuse_to_be_alone_among_many(environment)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        environment.setdefault(name, value)
    if "MASTER_PORT" not in environment:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment["MASTER_PORT"] = str(probe.getsockname()[1])
    if torch.cuda.is_available():
        _let_memory_grow(environment)
        device = torch.device("cuda", int(environment["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = backend or "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        _share_cores()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend)
    return device


def _let_memory_grow(environment: MutableMapping[str, str]) -> None:
    """Let torch's memory on CUDA grow in place, unless the user has said how it is taken.

    Batches differ in length and in images: pieces of one step's sizes are none of the next one's. It has to be said
    before the first allocation. torch 2.9 listens to the old name alone, 2.8 to 2.11 warn of it where the new one is
    missing.
    """
    if not environment.keys() & set(ALLOCATOR):
        for name in ALLOCATOR:
            environment[name] = "expandable_segments:True"


def _refuse_to_be_alone_among_many(environment: Mapping[str, str]) -> None:
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and "RANK" not in environment:
        raise ConfigError(
            f"srun has started {tasks} tasks and none knows its rank: each would train alone, into the same run "
            "folder; start one torchrun per node, as finetune_demo/launch/slurm.sh does"
        )


def _share_cores() -> None:
    """Set torch's threads, unless OMP_NUM_THREADS does.

    Threads that outnumber the cores left to them spend most of a step waiting for each other.
    """
    here = ranks_on_this_machine(int(os.environ["WORLD_SIZE"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (len(os.sched_getaffinity(0)) - 1) // here))


def ranks_on_this_machine(all_ranks: int) -> int:
    """As the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or all_ranks)


def arrange(device: torch.device, model_parallel_size: int = 1) -> World:
    """Set up SAT's model-parallel and data-parallel groups among the processes that have joined."""
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(model_parallel_size)
    return World(
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        device,
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
    )


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def together(step: Callable, *args, **kwargs):
    """Run `step` on every rank. If it fails with a user's mistake on any, it fails on all, with that message."""
    result, mistake = None, None
    try:
        result = step(*args, **kwargs)
    except SatLoraError as error:
        mistake = error
    mistakes: list[SatLoraError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(mistakes, mistake)
    first = next((m for m in mistakes if m is not None), None)
    if first is not None:
        raise first
    return result


def gather_lists(own: list) -> list:
    """The lists of all ranks, joined in rank order. Every rank has to call it."""
    lists: list[list] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, own)
    return [entry for part in lists for entry in part]

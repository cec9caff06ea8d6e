"""A process that does not know its place among others does not start."""

import os

import pytest
import torch

from sat_lora.errors import ConfigError
from sat_lora.parallel.distributed import ALLOCATOR, _let_memory_grow, init_distributed
from tests.support.ranks import run_ranks


def test_a_task_of_srun_without_a_launcher_is_refused(monkeypatch):
    """Each would be rank 0 of 1, and write the same run folder."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    with pytest.raises(ConfigError, match="srun has started 16 tasks and none knows its rank.*/slurm.sh does"):
        init_distributed()


def join_under_slurm():
    os.environ["SLURM_STEP_NUM_TASKS"] = "2"
    init_distributed()
    torch.distributed.barrier()  # a rank that has gone is no neighbour to connect to
    return torch.distributed.get_world_size()


def test_ranks_that_torchrun_starts_in_a_slurm_job_are_not():
    assert run_ranks(join_under_slurm, 2) == [2, 2]


def test_the_allocator_is_set_where_the_user_has_not():
    given, none = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PATH": "/bin"}
    for environment in (given, none):
        _let_memory_grow(environment)
    assert given == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert none == {"PATH": "/bin", **dict.fromkeys(ALLOCATOR, "expandable_segments:True")}

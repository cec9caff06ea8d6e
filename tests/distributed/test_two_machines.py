"""Two machines, each a `torchrun` agent at an address of its own: one dies, the other ends, both go on."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.demo_runs import SCRIPT, kill_group, losses_of, options_for
from tests.support.paths import ROOT
from tests.support.patience import patient
from tests.support.ranks import free_port, run_ranks
from tests.support.scripts import run_script

ADDRESSES = ("127.0.0.1", "127.0.0.2")
STEPS, SAVED_EVERY, DIES_AT = 24, 10, 13
TO_NOTICE = 20  # seconds in which a machine has to end that waits for a dead one


class Machine:
    """A `torchrun` agent with one rank."""

    def __init__(self, address: str, port: int, options: list[str], log: Path):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        agent += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:{port}", "--local_addr", address]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = log
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*agent, "--", str(SCRIPT), *options],
                env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def lose_power(self) -> None:
        """SIGKILL for the agent and its rank, at once."""
        kill_group(self.process)


@contextlib.contextmanager
def two_machines(options: list[str], folder: Path):
    """Both, started, and no process of theirs left afterwards; what they printed is shown if a test fails."""
    port = free_port()
    machines = [Machine(address, port, options, folder / f"{address}.log") for address in ADDRESSES]
    try:
        yield machines
    except BaseException:
        for machine in machines:
            print(machine.log, machine.log.read_text()[-3000:], sep="\n")
        raise
    finally:
        for machine in machines:
            machine.lose_power()


def has_come_to(run: Path, step: int) -> bool:
    """Whether the step was logged, and a checkpoint is there, which a thread writes meanwhile."""
    names = ("train.jsonl", "checkpoints/latest")
    return all((run / name).exists() for name in names) and len(losses_of(run)) >= step


def wait_for_step(run: Path, step: int, machines: list[Machine], timeout: float = 60) -> None:
    timeout = patient(timeout)
    deadline = time.monotonic() + timeout
    while not has_come_to(run, step):
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        assert all(machine.process.poll() is None for machine in machines), "a machine ended"
        time.sleep(0.02)


@pytest.mark.matrix
@pytest.mark.parametrize("dies", [0, 1], ids=["the one that writes", "the other one"])
@pytest.mark.timeout(180)  # five times what it takes on two cores that nobody else uses
def test_a_machine_dies_and_both_go_on_bit_for_bit(dies, captchas, tmp_path):
    """Against the same run, uninterrupted, on two ranks that no launcher started."""
    settings = ("--train-iters", str(STEPS), "--save-interval", str(SAVED_EVERY), "--eval-interval", "0")
    settings += ("--zero-stage", "2", "--r", "8", "--lora_dropout", "0.1")
    run = tmp_path / "two" / "run"
    with two_machines(options_for(captchas, run.parent, *settings), tmp_path) as machines:
        wait_for_step(run, DIES_AT, machines)
        machines[dies].lose_power()
        assert machines[1 - dies].process.wait(timeout=patient(TO_NOTICE)) != 0
    assert int((run / "checkpoints" / "latest").read_text()) == SAVED_EVERY
    with two_machines(["--resume", str(run)], tmp_path) as machines:
        assert [machine.process.wait(timeout=patient(60)) for machine in machines] == [0, 0]
    assert json.loads((run / "run.json").read_text())["world"]["data_parallel_size"] == 2

    whole = tmp_path / "whole" / "run"
    assert [status for status, _ in run_ranks(run_script, 2, options_for(captchas, whole.parent, *settings))] == [0, 0]
    assert len(losses_of(whole)) == STEPS
    assert losses_of(run) == losses_of(whole)
    weights = [(folder / "adapter" / str(STEPS) / "adapter_model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]

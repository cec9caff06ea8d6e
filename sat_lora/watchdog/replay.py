"""Run the step at which a run hung once more, on gloo ranks of this machine, where a mismatch is an error with names.

What the run was started with, a script or `sat-lora train`, is started again with --replay: it takes the run's settings
and batches from that step on, fresh adapters, and a folder of its own. What a script itself does to the model happens
again.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sat_lora.errors import ConfigError
from sat_lora.parallel.launch import SAT_LORA
from sat_lora.watchdog.evidence import read_ranks
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.verdict import verdict

LIMIT = 20.0  # seconds, --watchdog-limit of the replay


def replay(run: str | Path, options: Sequence[str] = ()) -> int:
    """Run the steps at which a run stopped once more; return 0 if they run through, 1 if they do not.

    options: more of the script's, such as --shrink N: all ranks are on this machine's CPU, and a whole CogVLM may not
    fit. What the ranks print is printed, and a last line that says what it means. Raises ConfigError if it cannot be
    started.
    """
    states = [rank.state for rank in read_ranks(run)]
    program = _program(states[0].argv, states[0].cwd)
    ranks = states[0].world_size
    command, environment = gloo_ranks(ranks)
    folder = Path(tempfile.mkdtemp(prefix="sat_lora_replay_"))
    try:
        settings = ("--replay", str(Path(run).resolve()), "--save", str(folder), "--distributed-backend", "gloo")
        environment["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        process = subprocess.run(
            [*command, *program, *settings, *options], env=environment, cwd=states[0].cwd, check=False
        )
        first, last = steps_to_replay(run)
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        if process.returncode == 0:
            print(
                f"replay: {steps} ran through on {ranks} gloo ranks with fresh adapters: neither the batches nor the "
                "script make it hang. Look at the GPUs, the network and NCCL (NCCL_DEBUG=INFO)"
            )
            return 0
        print(f"replay: {steps} fails on {ranks} gloo ranks as well, so the cause is in the script or its data")
        with contextlib.suppress(ConfigError):  # it ended before its first step, and has said why
            print(verdict(folder / "replay").text)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def steps_to_replay(run: str | Path) -> tuple[int, int]:
    """Return the first and the last step, from 1, at which a rank of the run was when it stopped."""
    steps = [max(1, state.step) for state in read_states(run)]
    return min(steps), max(steps)


def gloo_ranks(ranks: int) -> tuple[list[str], dict[str, str]]:
    """Return (start of a command line, environment) that start a script on so many CPU ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return command, {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def _program(argv: list[str], cwd: str) -> list[str]:
    """Return the words after torchrun's options that start what a run was started with. Raises ConfigError where that
    is no script of this machine and no command of `sat-lora`.
    """
    path = Path(cwd, argv[1]) if len(argv) > 1 else Path()
    if path.name == "sat-lora" or path.parts[-2:] == ("sat_lora", "cli.py"):
        return [*SAT_LORA, *argv[2:3]]
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"--replay: the run was started by {' '.join(argv)!r} in {cwd}; {path} is no script here")
    return [str(path)]

"""SIGTERM, SIGINT and SIGHUP finish the step, save and say how to go on; the resumed run is as if never stopped."""

import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.support.demo_runs import last_line, last_step, options_that_save, outcome, run_to_end, started, wait_for
from tests.support.patience import patient

STEPS = 12


def stop(launcher, options, run, log, number, whole_group):
    """Signal a run after its third step; its status, once the ranks have had their last word."""
    with started(launcher, options, log) as process:
        wait_for(lambda: last_step(run) >= 3, process, log)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        status, deadline = process.wait(patient(60)), time.monotonic() + patient(30)
        while "stopped by" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)  # DeepSpeed's launcher is gone at once, and its ranks go on
        return status


@pytest.mark.matrix
def test_a_stopped_run_resumes_as_if_it_was_not(captchas, tmp_path):
    """SIGTERM to a group, data workers included, as a scheduler sends it; the save is not at a --save-interval."""
    more = ("--num-workers", "1", "--save-interval", "1000", "--eval-interval", "4", "--eval-iters", "1")
    run, log = tmp_path / "cut" / "run", tmp_path / "log"
    options = options_that_save(captchas, tmp_path / "cut", *more, "--train-iters", str(STEPS))
    assert stop(None, options, run, log, signal.SIGTERM, True) == 143
    said = re.fullmatch(r"stopped by SIGTERM after step (\d+); resume with: (.*)", last_line(log))
    python, program, *rest = shlex.split(said[2])  # quoted where the checkout's path holds a space
    assert 3 <= int(said[1]) < STEPS and rest == ["--resume", str(run)]
    assert "python" in Path(python).name and Path(program).name == "finetune_cogvlm.py"
    run_to_end(None, ["--resume", str(run)], tmp_path / "rest.log")
    whole_options = options_that_save(captchas, tmp_path / "whole", *more, "--train-iters", str(STEPS))
    run_to_end(None, whole_options, tmp_path / "whole.log")
    (cut_losses, cut), (losses, whole) = outcome(run), outcome(tmp_path / "whole" / "run")
    assert cut_losses == losses
    last = [f"adapter/{STEPS}/adapter_model.safetensors", f"checkpoints/{STEPS}/optimizer.safetensors", "adapter/best"]
    assert [cut[name] for name in last] == [whole[name] for name in last]


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "launcher, number, whole_group, status",
    [
        (None, signal.SIGINT, False, 130),
        (None, signal.SIGINT, True, 130),
        (None, signal.SIGHUP, True, 129),
        ("torchrun", signal.SIGTERM, False, 1),  # the launchers' own statuses: torchrun ends with a SignalException,
        ("torchrun", signal.SIGINT, True, 1),
        ("deepspeed", signal.SIGTERM, True, -signal.SIGTERM),  # deepspeed dies of the signal
        ("deepspeed", signal.SIGINT, True, -signal.SIGINT),
    ],
)
def test_every_launcher_lets_the_ranks_save(captchas, tmp_path, launcher, number, whole_group, status):
    run, log = tmp_path / "cut" / "run", tmp_path / "log"
    options = options_that_save(captchas, tmp_path / "cut", "--num-workers", "1", "--train-iters", "400")
    assert stop(launcher, options, run, log, number, whole_group) == status, log.read_text()[-3000:]
    # Launchers turn SIGINT into SIGTERM for their ranks.
    step = re.search(r"stopped by SIG(TERM|INT|HUP) after step (\d+); resume with", log.read_text())
    assert step is not None, log.read_text()[-3000:]
    assert (run / "checkpoints" / "latest").read_text() == f"{step[2]}\n"

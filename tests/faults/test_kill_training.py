"""A run that is killed at any moment, and resumed with --resume alone, ends as the run that never was."""

import random
import time

import pytest

from tests.support.demo_runs import kill_group, last_step, options_that_save, outcome, run_to_end, started, wait_for

STEPS = 12


def has_checkpoint(run):
    """Whether there is one to go on from."""
    return (run / "checkpoints" / "latest").exists()


def survive_kills(captchas, tmp_path, kills, launcher=None, *more):
    """Kill -9 the whole group at a random moment after some new step was logged, `kills` times, then let it end."""
    options = ("--train-iters", str(STEPS), *more)
    run_to_end(launcher, options_that_save(captchas, tmp_path / "whole", *options), tmp_path / "whole.log")
    run, choose = tmp_path / "cut" / "run", random.Random(7)
    arguments = options_that_save(captchas, tmp_path / "cut", *options)
    for number in range(kills):
        log = tmp_path / f"cut_{number}.log"
        with started(launcher, arguments, log) as process:
            # The first has to get as far as a checkpoint, which a thread writes; later ones may die before any step.
            goal = 3 + number * (STEPS - 4) // max(1, kills)
            wait_for(lambda goal=goal: last_step(run) >= goal and has_checkpoint(run), process, log)
            time.sleep(choose.uniform(0, 0.3))
            kill_group(process)
        arguments = ["--resume", str(run)]
    run_to_end(launcher, arguments, tmp_path / "last.log")
    return outcome(tmp_path / "whole" / "run"), outcome(run)


def check_outcomes(whole, cut):
    assert len([key for key in whole[0] if key[1] == "loss"]) == STEPS
    assert cut[0] == whole[0]
    assert cut[1].keys() == whole[1].keys()
    assert [name for name, content in whole[1].items() if cut[1][name] != content] == []


@pytest.mark.matrix
def test_a_killed_run_ends_as_one_that_was_not(captchas, tmp_path):
    check_outcomes(*survive_kills(captchas, tmp_path, 1, None, "--num-workers", "1", "--zero-stage", "2"))


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize(  # every pair of values, and the hardest three
    "launcher, accumulate, workers", [(None, 1, 2), (None, 2, 0), ("torchrun", 1, 0), ("torchrun", 2, 2)]
)
def test_eight_kills_leave_no_trace(captchas, tmp_path, launcher, accumulate, workers):
    more = ("--num-workers", str(workers), "--gradient-accumulation-steps", str(accumulate), "--zero-stage", "2")
    check_outcomes(*survive_kills(captchas, tmp_path, 8, launcher, *more))

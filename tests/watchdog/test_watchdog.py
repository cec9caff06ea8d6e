"""Runs that hang or lose a rank: each ends by itself, and the verdict names code, rank and place."""

import json
import re

import pytest

from sat_lora.watchdog.rank_files import folder_of
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.verdict import verdict
from sat_lora.watchdog.watchdog import ALARM
from tests.support import faulty_runs
from tests.support.demo_runs import options_for
from tests.support.faulty_runs import CULPRIT, LIMIT, STEP, run_faulty


def long(*parameters):
    return pytest.param(*parameters, marks=pytest.mark.matrix)


def told(fault, captchas, tmp_path, *more, ranks=2):
    """(verdict afterwards, exit statuses, what was printed); it has to end 10 s after its limit at the latest."""
    options = options_for(captchas, tmp_path, "--train-iters", "8", "--watchdog-limit", str(LIMIT), *more)
    statuses, outputs, ended = run_faulty(fault, options, tmp_path, ranks=ranks)
    run = tmp_path / "run"
    alarm = folder_of(run) / ALARM
    limit = json.loads(alarm.read_text())["limit"] if alarm.exists() else LIMIT
    began = next(state.last_sign for state in read_states(run) if state.rank == CULPRIT)
    assert ended - began < limit + 10, "".join(outputs)
    return verdict(run), statuses, "".join(outputs)


@pytest.mark.parametrize(
    "fault, code, place",
    [
        long("exception_in_a_loader", "rank-failed", "the disk of this machine is broken in fail .*faulty_runs"),
        ("loader_that_sleeps", "stuck-in-data", "faulty_runs.py.*time.sleep"),
        ("extra_collective", "collectives-differ", "faulty_runs.py.*all_reduce"),
        ("killed_rank", "rank-gone", r"rank 1 \(process \d+ on"),
        long("bus_error", "rank-gone", r"is gone: Bus error in <lambda> \(.*faulty_runs.py"),
        long("deadlock_in_a_hook", "stuck-in-code", "faulty_runs.py:.*action()"),
        long("stopped_rank", "stuck-in-code", "interpreter is stuck as a whole"),
        long("published_branching", "gradients-differ", "gradients arrived on rank 0 and not on rank 1: .*vision"),
    ],
)  # fmt: skip
def test_a_planted_fault_ends_the_run_and_is_named(fault, code, place, captchas, tmp_path):
    found, statuses, output = told(getattr(faulty_runs, fault), captchas, tmp_path, "--zero-stage", "2")
    assert statuses[0] != 0
    assert found.finding.code == code, (found, output[-3000:])
    assert found.finding.ranks == (CULPRIT,) or code == "collectives-differ"
    assert re.search(place, found.finding.seen), found.finding.seen
    assert f"of step {STEP}" in found.text


@pytest.mark.matrix
@pytest.mark.parametrize(
    "fault, code",
    [
        ("loader_that_sleeps", "stuck-in-data"),
        ("deadlock_in_a_hook", "stuck-in-code"),
        ("killed_rank", "rank-gone"),
        ("extra_collective", "collectives-differ"),
        ("exception_in_a_loader", "rank-failed"),
    ],
)
@pytest.mark.parametrize("layout", [("--model-parallel-size", "2", "--zero-stage", "1"), ("--zero-stage", "3")])
def test_four_ranks_in_other_layouts_end_and_the_one_is_named(fault, code, layout, captchas, tmp_path):
    found, statuses, output = told(getattr(faulty_runs, fault), captchas, tmp_path, *layout, ranks=4)
    assert all(status != 0 for status in statuses)
    assert (found.finding.code, found.finding.ranks) == (code, (CULPRIT,)), (found, output[-3000:])

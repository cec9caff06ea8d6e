"""`watched` around loops that know nothing of it: a hang ends with a verdict, a healthy loop is left as it was."""

import json
import os
import re
import threading
import time
from functools import partial

import pytest
import torch

from sat_lora import ConfigError, LoraMixin, TrainingError, add_lora, watched
from sat_lora.any_loop import watched as module
from sat_lora.watchdog.rank_files import PHASES, folder_of
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.verdict import verdict
from tests.support.faulty_runs import end_of_ranks
from tests.support.plain_loops import adapted, batch_of, loss_of, plain_engine, steps
from tests.support.ranks import run_ranks

LIMIT = 0.5
STEP = 5  # the first that hangs


def wait_for_ever():
    threading.Event().wait(600)


def hangs(folder, stage, place):
    """A plain DeepSpeed loop whose rank 1 stays, at the fifth step, where it is told to."""
    model, world = adapted()
    engine = plain_engine(model, stage)
    now = [0]

    def stay(*args):
        if now[0] == STEP and world.rank == 1:
            wait_for_ever()

    def before(step):
        now[0] = step
        if place == "data":
            stay()

    if place == "forward":
        model.transformer.layers[1].mlp.register_forward_hook(stay)
    if place == "backward":
        next(p for p in model.parameters() if p.requires_grad).register_hook(stay)
    with watched(engine, folder, limit=LIMIT):
        steps(engine, world.rank, STEP + 1, before=before)
    return 0


@pytest.mark.parametrize(
    "stage, place",
    [
        (2, "data"),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in [(0, "data"), (1, "data"), (3, "data")]),
        *(pytest.param(stage, where, marks=pytest.mark.matrix) for stage in range(4) for where in ("forward", "backward")),
    ],
)
def test_a_rank_that_hangs_in_a_plain_deepspeed_loop_is_named(tmp_path, stage, place):
    statuses, output, _ = end_of_ranks(partial(hangs, tmp_path / "run", stage, place), tmp_path)
    assert statuses == [3, 3], output
    said = verdict(tmp_path / "run")
    assert said.finding.code == ("stuck-in-data" if place == "data" else "stuck-in-code"), said
    assert said.finding.ranks == (1,) and "wait_for_ever" in said.finding.seen
    assert f"in phase {place} of step {STEP}" in said.text
    assert "watchdog: rank" in "".join(output) and "doctor --run" in "".join(output)

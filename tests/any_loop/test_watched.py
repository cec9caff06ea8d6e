"""`watched` around loops that know nothing of it: a hang ends with a verdict, a healthy loop is left as it was."""

import os
import threading
import time
from functools import partial

import pytest
import torch

from sat_lora import ConfigError, TrainingError, add_lora, watched
from sat_lora.any_loop import watched as module
from sat_lora.watchdog.rank_files import PHASES, folder_of
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.verdict import verdict
from tests.support.faulty_runs import end_of_ranks
from tests.support.plain_loops import adapted, batch_of, loss_of, plain_engine, steps
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model

LIMIT = 2.0  # a first step on a busy machine takes a second
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
        *(
            pytest.param(stage, where, marks=pytest.mark.matrix)
            for stage in range(4)
            for where in ("forward", "backward")
        ),
    ],
)
def test_a_rank_that_hangs_in_a_plain_deepspeed_loop_is_named(tmp_path, stage, place):
    statuses, output, _ = end_of_ranks(partial(hangs, tmp_path / "run", stage, place), tmp_path, timeout=110)
    assert statuses == [3, 3], output
    said = verdict(tmp_path / "run")
    assert said.finding.code == ("stuck-in-data" if place == "data" else "stuck-in-code"), said
    assert said.finding.ranks == (1,) and "wait_for_ever" in said.finding.seen
    assert f"in phase {place} of step {STEP}" in said.text
    assert "watchdog: rank" in "".join(output) and "doctor --run" in "".join(output)


@pytest.fixture
def model(single_process_group):
    return adapted()[0]


def hooks_of(model):
    """How many hooks the model has, and the optimizers of torch and DeepSpeed's engine."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch.optim import optimizer

    modules = [m for m in model.modules()]
    return (
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters() if p.requires_grad),
        [m.forward.on_entry for m in modules if hasattr(vars(m).get("forward"), "on_entry")],
        [*optimizer._global_optimizer_pre_hooks, *optimizer._global_optimizer_post_hooks],
        [DeepSpeedEngine.step, DeepSpeedEngine.save_checkpoint, torch.save],
    )


def phases_told(trace):
    """A list that gets each (phase, step, micro-batch) that the trace is told from now on."""
    told, at = [], trace.at

    def note(phase, *, step=None, micro_batch=None):
        told.append((phase, step, micro_batch))
        at(phase, step=step, micro_batch=micro_batch)

    trace.at = note
    return told


def test_a_plain_loop_of_torch_is_followed_step_by_step(model, tmp_path):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with watched(model, tmp_path) as trace:
        told = phases_told(trace)
        for step in (1, 2):
            for micro in range(2):
                loss_of(model, batch_of(step + 7 * micro)).backward()
            arrived = len(read_states(tmp_path)[0].arrivals)
            optimizer.step()
            with torch.no_grad():
                loss_of(model, batch_of(9))
        torch.save({}, tmp_path / "state.pt")
    one_step = lambda n: [  # noqa: E731
        *(("forward", n, 0), ("backward", None, None), ("forward", n, 1), ("backward", None, None)),
        *(("optimizer", None, None), ("data", n + 1, None), ("evaluate", None, None)),
    ]
    assert told == [*one_step(1), *one_step(2), ("write", None, None), ("evaluate", None, None)]
    (state,) = read_states(tmp_path)
    assert (state.step, state.error, state.ended is None) == (3, None, False)
    assert arrived == len(state.expected) > 0
    assert verdict(tmp_path).finding is None


def test_a_phase_that_there_is_not_is_refused(model, tmp_path):
    with watched(model, tmp_path) as trace:
        trace.at("write")
        with pytest.raises(ConfigError, match="a phase 'download' is not known; wanted one of start, data, forward"):
            trace.at("download")
        assert trace.phase == "write"


def test_a_plain_engine_is_followed_step_by_step(model, tmp_path):
    engine = plain_engine(model, 2, accumulate=2)
    with watched(engine, tmp_path) as trace:
        told = phases_told(trace)
        steps(engine, 0, 4)
    passes = [entry for entry in told if entry[0] == "forward"]
    assert passes == [("forward", 1, 0), ("forward", 1, 1), ("forward", 2, 0), ("forward", 2, 1)]
    assert [phase for phase, *_ in told][:5] == ["forward", "backward", "reduce", "optimizer", "data"]
    assert {phase for phase, *_ in told} <= {*PHASES}


def test_everything_is_as_before_after_the_block_and_a_second_one_may_follow(model, tmp_path):
    before = hooks_of(model)
    with pytest.raises(TrainingError), watched(model, tmp_path / "a"):
        assert hooks_of(model) != before
        raise TrainingError("the loss is not finite")
    assert hooks_of(model) == before
    assert read_states(tmp_path / "a")[0].error == "TrainingError: the loss is not finite"
    for _ in range(2):
        with watched(model, tmp_path / "a"):
            pass
    assert hooks_of(model) == before
    assert read_states(tmp_path / "a")[0].error is None


def test_adapters_that_come_inside_are_followed(single_process_group, tmp_path):
    model = tiny_model().train()
    with watched(model, tmp_path):
        add_lora(model, r=4)
        loss_of(model, batch_of(1)).backward()
    (state,) = read_states(tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in state.arrivals} == trained == {*state.expected}


def test_files_of_others_in_the_folder_stay(model, tmp_path):
    kept = [folder_of(tmp_path) / "notes.txt", folder_of(tmp_path) / "rank_of_merit.csv", tmp_path / "latest"]
    folder_of(tmp_path).mkdir()
    for path in kept:
        path.write_text("mine")
    old = folder_of(tmp_path) / "rank_00007.json"
    old.write_text("{}")
    with watched(model, tmp_path):
        pass
    assert [path.read_text() for path in kept] == ["mine"] * 3 and not old.exists()


def test_a_block_in_a_block_is_refused_and_the_outer_one_goes_on(model, tmp_path):
    with watched(model, tmp_path / "a"):
        refusal = pytest.raises(ConfigError, match="this process is watched already, in .*/a; one block")
        with refusal, watched(torch.nn.Linear(1, 1), tmp_path / "b"):
            pass
        loss_of(model, batch_of(1)).backward()
    assert len(read_states(tmp_path / "a")[0].arrivals) > 0 and not (tmp_path / "b").exists()


def refused(tmp_path):
    (tmp_path / "file").write_text("")
    return {
        "a file": (tmp_path / "file", "file.* cannot be written: .*exists; give a folder"),
        "below a file": (tmp_path / "file" / "run", "run.* cannot be written: .*Not a directory"),
        "proc": ("/proc/run", "/proc/run cannot be written"),
        "too long": (tmp_path / ("x" * 300), "cannot be written: .*too long"),
        "none": (None, "got None for the folder; give a path"),
        "empty": ("", "got '' for the folder"),
        "bytes": (b"run", "got b'run' for the folder"),
        "control characters": (tmp_path / "file" / "\x1b[2J", r"\\x1b\[2J cannot be written"),
    }


@pytest.mark.parametrize(
    "kind", ["a file", "below a file", "proc", "too long", "none", "empty", "bytes", "control characters"]
)
def test_a_folder_that_cannot_be_written_is_refused(kind, model, tmp_path):
    folder, message = refused(tmp_path)[kind]
    with pytest.raises(ConfigError, match=f"^watched: .*{message}"), watched(model, folder):
        pass


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "120", True, None])
def test_a_limit_that_is_none_is_refused(limit, model, tmp_path):
    refusal = pytest.raises(ConfigError, match="limit is .*; wanted seconds above 0, such as 120")
    with refusal, watched(model, tmp_path, limit=limit):
        pass


def test_the_folder_of_a_run_that_goes_on_is_refused(model, tmp_path, monkeypatch):
    with watched(model, tmp_path):
        other = os.getpid() + 1
        monkeypatch.setattr(os, "getpid", lambda: other)  # as another process sees it
        monkeypatch.setattr(module, "_open", [])
        refusal = pytest.raises(ConfigError, match=r"belongs to a run that goes on \(process \d+\); give another")
        with refusal, watched(model, tmp_path):
            pass
        monkeypatch.undo()
    assert len(read_states(tmp_path)) == 1


@pytest.mark.parametrize(
    "thing, message",
    [
        (None, "got a NoneType for the model; give the model itself"),
        (
            (torch.nn.Linear(1, 1), None),
            "got a tuple with a model in it for the model; .* what deepspeed",
        ),
        (torch.nn.Linear(1, 1).requires_grad_(False), "nothing of the Linear trains; call add_lora"),
        (torch.nn.ReLU(), "nothing of the ReLU trains"),
    ],
)
def test_what_does_not_train_is_refused(thing, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^watched: {message}"), watched(thing, tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def mistakes_of_one_rank(folder):
    """What every rank hears where rank 1 alone cannot write, or gives another thing for its model."""
    model, world = adapted()
    engine = plain_engine(model, 1)
    texts = []
    cases = [(engine, "/proc/run" if world.rank else folder), (engine if world.rank == 0 else None, folder)]
    for thing, place in cases:
        try:
            with watched(thing, place):
                pass
        except ConfigError as error:
            texts.append(str(error))
    engine.destroy()
    try:
        with watched(engine, folder):
            pass
    except ConfigError as error:
        texts.append(str(error))
    return texts


def test_a_mistake_of_one_rank_is_told_on_all(tmp_path):
    ranks = run_ranks(mistakes_of_one_rank, 2, str(tmp_path / "run"))
    assert ranks[0] == ranks[1] and len(ranks[0]) == 3
    unwritable, no_model, closed = ranks[0]
    assert unwritable.startswith("watched: /proc/run cannot be written")
    assert no_model.startswith("watched: got a NoneType") and "has been closed (engine.destroy())" in closed


def waits_for_one(folder):
    """Rank 0 writes and evaluates for longer than the limit while rank 1 waits for it: nothing is wrong."""
    model, world = adapted()
    engine = plain_engine(model, 1)
    with watched(engine, folder, limit=LIMIT):
        steps(engine, world.rank, 4)
        if world.rank == 0:
            for _ in range(12):
                with torch.no_grad():
                    loss_of(engine, batch_of(1))
                    time.sleep(LIMIT / 6)
        torch.distributed.barrier()
    return True


@pytest.mark.matrix
def test_ranks_may_wait_for_one_that_evaluates(tmp_path):
    assert run_ranks(waits_for_one, 2, str(tmp_path)) == [True, True]

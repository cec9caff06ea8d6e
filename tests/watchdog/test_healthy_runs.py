"""Runs that are slow, uneven or stopped for a while, and well: the watchdog says nothing."""

import faulthandler
import os
import random
import signal
import time

import pytest
import torch

from sat_lora import add_lora
from sat_lora._sat import ColumnParallelLinear, RowParallelLinear
from sat_lora.lora.delta_hook import DeltaHook
from sat_lora.watchdog.rank_files import folder_of
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.verdict import verdict
from sat_lora.watchdog.watchdog import ALARM, FIRST, Watchdog
from tests.support import faulty_runs
from tests.support.demo_runs import options_for
from tests.support.faulty_runs import run_faulty
from tests.support.tiny import tiny_model
from tests.support.traces import trace_of_a_linear

PHASES = ("data", "reduce", "forward", "backward", "reduce", "optimizer", "save")


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("hooks_first", [False, True])
def test_every_module_with_a_matrix_is_noted_when_it_is_entered_adapted_or_not(tmp_path, hooks_first):
    model = tiny_model()
    if hooks_first:  # a mixin then adds its deltas in hooks, not in the layers' forward
        for module in model.modules():
            module.register_forward_hook(lambda module, args, output: None)
    add_lora(model, r=4, target_modules=["language-mlp"])
    Trace(tmp_path, model, rank=0, world_size=1)
    noted = set()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, ColumnParallelLinear, RowParallelLinear)):
            module(torch.zeros(1, module.weight.shape[1]))
            assert read_states(tmp_path)[0].module == name
            noted.add(isinstance(vars(module).get("forward"), DeltaHook))
    assert noted == ({False} if hooks_first else {False, True})


def test_500_steps_with_threefold_jitter_raise_no_alarm(tmp_path):
    _, trace = trace_of_a_linear(tmp_path)
    chance = random.Random(0)
    with trace.told(), Watchdog(trace, 0.05):  # below it, at 12 ms per step, nothing would ever be wrong
        for step in range(1, 501):
            for phase in PHASES:
                trace.at(phase, step=step)
                time.sleep(chance.uniform(0.001, 0.003))
    found = verdict(tmp_path)
    assert found.finding is None and "has ended well after step 500" in found.text
    assert not (folder_of(tmp_path) / ALARM).exists()


@pytest.mark.matrix
@pytest.mark.timeout(400)
def test_500_real_steps_of_two_uneven_ranks_raise_no_alarm(captchas, tmp_path):
    options = options_for(captchas, tmp_path, "--train-iters", "500", "--watchdog-limit", "2", "--zero-stage", "2")
    statuses, outputs, _ = run_faulty(faulty_runs.jitter, [*options, "--batch-size", "2"], tmp_path, timeout=300)
    assert statuses == [0, 0], outputs
    assert verdict(tmp_path / "run").finding is None


def test_the_limit_is_that_of_the_phase_and_follows_the_run(tmp_path):
    _, trace = trace_of_a_linear(tmp_path)
    watchdog = Watchdog(trace, 2.0)
    assert watchdog.limit("save") == FIRST * 2.0
    for seconds in (90.0, 0.1, 0.1):
        trace.durations["save"].append(seconds)
        trace.durations["data"].append(0.01)
    assert (watchdog.limit("save"), watchdog.limit("data"), watchdog.limit("forward")) == (900.0, 2.0, 10.0)
    trace.durations["save"].extend([0.1] * 50)
    assert watchdog.limit("save") == 2.0  # what was slow at first is forgotten


class Clock:
    """Monotonic time as a watchdog finds it at its looks: `seconds` each after the one before."""

    def __init__(self, seconds):
        self.now, self.seconds = 1000.0, iter(seconds)

    def monotonic(self):
        return self.now

    def wait(self, tick):
        """In place of `Event.wait`: whether the watchdog shall end."""
        passed = next(self.seconds, None)
        self.now += passed or 0.0
        return passed is None


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ([0.25] * 18, None),  # not longer than a phase may take: 5 x least
        ([0.25] * 24, 5.25),  # a hang
        ([0.25] * 18 + [6000.0] + [0.25] * 18, None),  # stopped, as by a debugger, and continued
        ([0.25] * 18 + [6000.0] + [0.25] * 24, 5.25),  # and then it hangs
        ([0.25] * 18 + [6.0], 10.5),  # a busy machine lets a look come late, and the clock counts
    ],
    ids=["in time", "hang", "stopped and continued", "stopped, continued and hanging", "late"],
)
def test_the_time_for_which_a_process_was_stopped_does_not_count(tmp_path, monkeypatch, seconds, expected):
    _, trace = trace_of_a_linear(tmp_path)
    watcher = Watchdog(trace, 1.0)
    clock, alarms = Clock(seconds), []

    def end(alarm):
        alarms.append(alarm["waited"])
        clock.seconds = iter(())

    monkeypatch.setattr("sat_lora.watchdog.watchdog.time.monotonic", clock.monotonic)
    monkeypatch.setattr(watcher, "_done", clock)
    monkeypatch.setattr(watcher, "_end", end)
    trace.at("forward", step=1)
    watcher._watch()
    faulthandler.cancel_dump_traceback_later()
    assert alarms == ([] if expected is None else [expected])


@pytest.mark.matrix
def test_a_process_that_was_stopped_and_goes_on_is_not_ended(tmp_path):
    """As by a debugger, or a scheduler that suspends jobs. In a fork, which can be stopped."""
    pid = os.fork()
    if pid == 0:
        _, trace = trace_of_a_linear(tmp_path)
        with trace.told(), Watchdog(trace, 0.2):
            trace.at("data")
            time.sleep(0.3)  # so that the watchdog has seen the last sign of life when all stops
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)
            trace.at("data")
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    time.sleep(6)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_trace_tells_phase_module_and_gradients(tmp_path):
    model, trace = trace_of_a_linear(tmp_path)
    (before,) = read_states(tmp_path)
    assert (before.phase, before.module, before.arrivals, before.is_alive) == ("start", None, [], True)
    trace.at("forward", step=7, micro_batch=1)
    loss = model(torch.ones(1, 2)).sum()
    trace.at("backward")
    loss.backward()
    (state,) = read_states(tmp_path)
    assert (state.step, state.micro_batch, state.phase, state.module) == (7, 1, "backward", "0")
    assert sorted(name for name, _ in state.arrivals) == ["0.bias", "0.weight"] == sorted(state.expected)
    assert before.phase_began <= state.phase_began <= state.last_sign <= time.time()
    trace.at("forward", micro_batch=2)
    assert read_states(tmp_path)[0].arrivals == []


def test_a_rank_in_a_step_waits_for_one_that_evaluates_and_not_for_one_in_a_step(tmp_path):
    waiting, other = (Trace(tmp_path, torch.nn.Module(), rank=rank, world_size=2) for rank in (0, 1))
    watchdog = Watchdog(waiting, 2.0)
    waiting.at("data")
    answers = {}
    for phase in ("evaluate", "write", "save", "load", "forward", "data", "reduce"):
        other.at(phase)
        answers[phase] = watchdog._others_work(10.0)
    assert answers == {phase: phase in ("evaluate", "write", "save", "load") for phase in answers}

"""Kind 11, stopping: Ctrl-C at any moment is a line and 130; a lost terminal saves; a rank that hangs anywhere ends."""

import contextlib
import mmap
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from torch import nn

from sat_lora.errors import ConfigError
from sat_lora.parallel.stop_signals import SIGNALS, Stopped, StopSignals, _leave_lost_terminal
from sat_lora.terminal.edge import GRACE, INTERRUPTED, run_command
from sat_lora.watchdog.rank_files import file_of
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.watchdog import IDLE_PAGES, Watchdog, _pages_touched
from tests.support import faulty_runs
from tests.support.demo_runs import options_for
from tests.support.faulty_runs import run_faulty
from tests.support.paths import ROOT

LINE = "x.py: stopped by Ctrl-C\n"


def interrupted(body, *, times=1, pause=0.15, **environment):
    """(status, stdout, stderr, seconds) of a command that does `body`, and gets Ctrl-C once it has said ready."""
    code = (
        "import os, sys, time\n"
        "from sat_lora.terminal import edge\n"
        "edge.GRACE = 2.0\n"
        "def ready():\n"
        "    print('ready', flush=True)\n"
        "def command():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "    return 0\n"
        "edge.run_script('x.py', lambda: edge.run_command('x.py', command))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    began = time.monotonic()
    for number in range(times):
        time.sleep(pause * (number > 0))
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - began


def test_what_is_half_done_is_cleaned_up():
    body = "try:\n    ready(); time.sleep(60)\nfinally:\n    print('cleaned')"
    assert interrupted(body)[:3] == (INTERRUPTED, "cleaned\n", LINE)


def test_in_the_middle_of_an_import_it_ends_at_once(tmp_path):
    slow = (
        "import time\nprint('ready', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)\n"
    )
    (tmp_path / "slow.py").write_text(slow)
    body = f"sys.path.insert(0, {str(tmp_path)!r})\nimport slow"
    status, out, err, seconds = interrupted(body)
    assert (status, out, err) == (INTERRUPTED, "", LINE) and seconds < 30


def test_a_second_one_does_not_wait_for_the_cleaning_up():
    body = "try:\n    ready(); time.sleep(60)\nfinally:\n    time.sleep(60)"
    assert interrupted(body, times=2)[:3] == (INTERRUPTED, "", LINE)


def test_a_call_that_never_comes_back_ends_after_a_while():
    """As a wait for another rank in torch's own code: Python hears nothing until it returns."""
    body = (
        "import ctypes\nlibc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "libc.pthread_mutex_lock(mutex)\nready()\nlibc.pthread_mutex_lock(mutex)"
    )
    status, _, err, seconds = interrupted(body)
    assert (status, err) == (INTERRUPTED, LINE) and seconds > 0.3


def test_an_exception_that_a_library_swallows_does_not_keep_it_alive():
    body = "ready()\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass"
    assert interrupted(body)[:3] == (INTERRUPTED, "", LINE)


def test_forked_workers_are_silent():
    body = (
        "import multiprocessing\ncontext = multiprocessing.get_context('fork')\n"
        "workers = [context.Process(target=time.sleep, args=(60,)) for _ in range(2)]\n"
        "for worker in workers:\n    worker.start()\nready()\ntime.sleep(60)"
    )
    assert interrupted(body)[:3] == (INTERRUPTED, "", LINE)


DEAF = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"


@pytest.mark.parametrize("busy", ["", DEAF], ids=["hears it", "is deaf too"])
def test_a_worker_that_did_not_hear_it_is_ended(busy):
    """As one that was being forked at that moment; the second time the command itself has to be ended by force."""
    body = (
        "import multiprocessing, signal\ncontext = multiprocessing.get_context('fork')\n"
        "def deaf():\n    signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); time.sleep(60)\n"
        f"context.Process(target=deaf).start()\n{busy}time.sleep(60)"
    )
    status, out, err, seconds = interrupted(body)
    assert (status, out, err) == (INTERRUPTED, "", LINE) and seconds < 30


def test_a_worker_that_is_not_yet_noted_is_ended():
    """Ctrl-C between the fork of a worker and multiprocessing's note of it."""
    body = (
        "import multiprocessing, signal\nfrom multiprocessing import popen_fork\n"
        "launch = popen_fork.Popen._launch\n"
        "def slow(*arguments):\n    launch(*arguments); time.sleep(60)\n"
        "popen_fork.Popen._launch = slow\n"
        "def deaf():\n    signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); time.sleep(60)\n"
        "context = multiprocessing.get_context('fork')\ncontext.Process(target=deaf).start()"
    )
    status, out, err, seconds = interrupted(body)
    assert (status, out, err) == (INTERRUPTED, "", LINE) and seconds < 30


def test_ranks_but_the_first_are_silent():
    assert interrupted("ready(); time.sleep(60)", RANK="1")[:3] == (INTERRUPTED, "", "")


def test_a_command_within_another_program_leaves_its_handler_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    assert run_command("x", lambda: 5) == 5
    assert signal.getsignal(signal.SIGINT) is before and signal.set_wakeup_fd(-1) == -1
    assert GRACE >= 1


@pytest.mark.parametrize("number, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_run_that_was_stopped_ends_as_a_shell_has_it(number, status):
    number = signal.Signals[number]
    with pytest.raises(Stopped) as caught, StopSignals() as signals:
        signal.raise_signal(number)
        assert signals.counts == {other: int(other == number) for other in SIGNALS}
        for other in SIGNALS:  # back to what they were, as `Stopped` leaves them to the end of the process
            signal.signal(other, signals._before[other])
        raise Stopped(number, 7)
    assert caught.value.status == status and "after step 7" in str(caught.value)


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.counts[signal.SIGHUP] == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_wrote_to_a_terminal_that_is_gone_writes_nowhere():
    master, terminal = pty.openpty()
    kept = os.dup(1), os.dup(2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        os.dup2(terminal, 1)
        os.close(master)
        with pytest.raises(OSError):
            os.write(1, b"lost")
        _leave_lost_terminal()
        assert os.write(1, b"nowhere") == 7
        assert os.fstat(2).st_ino == os.fstat(kept[1]).st_ino  # what is still there stays
    finally:
        signal.signal(signal.SIGHUP, before)
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(terminal)


def test_a_rank_is_followed_before_it_has_a_model(tmp_path):
    trace = Trace(tmp_path, nn.Module(), rank=0, world_size=1)
    trace.at("load")
    (state,) = read_states(tmp_path)
    assert (state.phase, state.expected, state.module) == ("load", [], None)
    signs = trace.signs
    trace.attach(nn.Linear(2, 2))
    assert trace.signs != signs
    (state,) = read_states(tmp_path)
    assert (state.phase, state.expected) == ("start", ["weight", "bias"])


def test_a_rank_that_waits_does_not_sound_the_alarm_while_another_one_loads(tmp_path):
    waiting, loading = (Trace(tmp_path, nn.Module(), rank=rank, world_size=2) for rank in (0, 1))
    watchdog = Watchdog(waiting, 2.0)
    assert watchdog._others_work(10.0)
    long_ago = time.time() - 60
    struct.pack_into("<dd", loading._memory, 0, long_ago, long_ago)
    assert not watchdog._others_work(10.0)
    loading.seen_alive()
    assert watchdog._others_work(10.0)
    with loading.told():
        pass
    assert not watchdog._others_work(10.0)  # it has ended


def test_reading_weights_is_a_sign_of_life_and_waiting_is_none():
    before = _pages_touched()
    held = mmap.mmap(-1, 8 << 20)  # pages that nothing in this process has touched before
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    after = _pages_touched()
    assert after - before > IDLE_PAGES
    time.sleep(0.05)
    assert _pages_touched() - after < IDLE_PAGES


def load_that_sleeps():
    from sat_lora.training import prepare

    if faulty_runs.is_culprit():
        prepare.load_cogvlm = lambda *args, **kwargs: time.sleep(600)


def check_that_sleeps():
    from sat_lora.training import prepare

    if faulty_runs.is_culprit():
        prepare.check_options = lambda *args, **kwargs: time.sleep(600)


def summary_that_sleeps():
    from sat_lora.training import prepare

    if faulty_runs.is_culprit():
        prepare.open_sources = lambda *args, **kwargs: time.sleep(600)


def evaluation_that_sleeps():
    from sat_lora.training.answers import answering

    if faulty_runs.is_culprit():
        answering.generate = lambda *args, **kwargs: time.sleep(600)


@pytest.mark.matrix
@pytest.mark.parametrize("fault, phase", [(load_that_sleeps, "load"), (evaluation_that_sleeps, "test")])
def test_a_rank_that_hangs_outside_of_the_loop_ends_the_run(fault, phase, captchas, tmp_path):
    more = ("--train-iters", "2", "--watchdog-limit", "2", "--test-data", str(captchas / "test"))
    statuses, outputs, _ = run_faulty(fault, options_for(captchas, tmp_path, *more), tmp_path)
    output = "".join(outputs)
    assert statuses == [3, 3], output[-3000:]
    assert f"in phase {phase}" in output, output[-3000:]
    assert "time.sleep(600)" in output
    assert file_of(tmp_path / "run" / "watchdog", 1, ".stacks.json").is_file()


@pytest.mark.matrix
@pytest.mark.parametrize("fault", [check_that_sleeps, summary_that_sleeps])
def test_a_rank_that_hangs_before_the_base_loads_ends_the_run(fault, captchas, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    statuses, outputs, _ = run_faulty(fault, options_for(captchas, tmp_path, "--watchdog-limit", "2"), tmp_path)
    output = "".join(outputs)
    assert statuses == [3, 3], output[-3000:]
    assert "in phase check" in output and "time.sleep(600)" in output, output[-3000:]
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.fixture
def rank_0_of_2(monkeypatch):
    from sat_lora.watchdog import watchdog

    monkeypatch.setattr(watchdog.torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(watchdog.torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(watchdog, "gather_lists", lambda own: own)
    return watchdog


@pytest.mark.parametrize("error", [None, ConfigError("a slip"), KeyboardInterrupt()])
def test_what_is_looked_at_before_the_base_is_watched_and_leaves_nothing(rank_0_of_2, error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    raised = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with raised, rank_0_of_2.watched_alone(60.0) as trace:
        trace.at("check")
        (state,) = read_states(trace.folder.parent)
        assert (state.phase, state.world_size) == ("check", 2)
        assert any(thread.name == "sat_lora watchdog" for thread in threading.enumerate())
        if error:
            raise error
    assert list(tmp_path.iterdir()) == []
    later = Trace(tmp_path / "run", nn.Module(), rank=0, world_size=2)  # NCCL writes beside what the run itself leaves
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(later.folder))


def test_without_a_place_for_its_files_nothing_is_watched(rank_0_of_2, monkeypatch, caplog):
    def no_place(*args, **more):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/gone']")

    monkeypatch.setattr(tempfile, "mkdtemp", no_place)
    with rank_0_of_2.watched_alone(60.0) as trace:
        assert not isinstance(trace, Trace)
    assert "no watchdog: " in caplog.text
    with rank_0_of_2.watched_alone(0) as trace:
        assert not isinstance(trace, Trace)

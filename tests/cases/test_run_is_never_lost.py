"""A run is never lost: results that are in a run folder stay, one process writes there, and a kill costs no save."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors
import torch

from sat_lora.adapters import format as adapter_format
from sat_lora.adapters.format import SavedAdapter
from sat_lora.adapters.read import read_adapter
from sat_lora.commands.parts import refuse_existing
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.files import atomic
from sat_lora.files.step_folders import BEST, LATEST, read_pointer
from sat_lora.lora.config import LoraConfig
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.runs import lock_holder, run_lock, space
from sat_lora.training.runs.lock_holder import Holder, Process
from sat_lora.training.runs.logs.run_logs import read_records
from sat_lora.training.runs.logs.tensorboard import EventFile
from sat_lora.training.runs.results import results_in, results_problems
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.runs.run_lock import LOCK, RunLock
from sat_lora.training.saving import write_save
from sat_lora.training.steps import checkpoint
from sat_lora.training.steps.checkpoint import TENSORS, GatheredCheckpoint, newest_checkpoint, read_state
from tests.support.configs import parse_options
from tests.support.demo_runs import options_for
from tests.support.ranks import run_ranks
from tests.support.run_logs import logs_of, validated
from tests.support.scripts import run_script

# A kill between any two writes


class Killed(BaseException):
    """What a process that is killed does no more: nothing cleans up after it."""


FILE_OPERATIONS = [
    *((os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "ftruncate")),
    *((module, "save_file") for module in (adapter_format, checkpoint)),
    (atomic, "_exchange"),
    (Path, "write_text"),
]


class KillAt:
    """While entered, the file operation of that number is never made, nor any later one."""

    def __init__(self, number):
        self.left, self.patch = number, pytest.MonkeyPatch()

    def __enter__(self):
        for owner, name in FILE_OPERATIONS:
            self.patch.setattr(owner, name, self.counted(getattr(owner, name), is_cheap=name != "fsync"))
        return self

    def __exit__(self, kind, error, trace):
        self.patch.undo()
        return kind is Killed

    def counted(self, operation, is_cheap):
        def count(*args, **settings):
            self.left -= 1
            if self.left <= 0:
                raise Killed
            return operation(*args, **settings) if is_cheap else None

        return count


def save(folder, step, best, good, keep):
    tensors = {f"layer{number}": torch.full((4,), float(step)) for number in range(2)}
    adapter = SavedAdapter(LoraConfig(seed=step), "base", {}, tuple(tensors), tensors)
    state = dict(step=step, skipped=0, best_loss=1.0, best_step=best, good_step=good, owes_validation=False)
    state |= dict(steps_taken=step, samples_per_step=4, layout=[1, 1], loss_scale={}, random=[{}], run={})
    gathered = GatheredCheckpoint(step, {"master.x": torch.full((4,), float(step))}, state)
    write_save(RunFolder(folder, is_writer=True), adapter, gathered, keep)


def check_adapter(path):
    saved = read_adapter(path)
    assert {float(value) for tensor in saved.tensors.values() for value in tensor} == {float(saved.config.seed)}
    return saved.config.seed


def check_whole(folder, done):
    """There is an adapter to load and a checkpoint to go on from, of the last save that was done, or a later one."""
    adapters = folder / "adapter"
    assert check_adapter(adapters) >= done
    newest = newest_checkpoint(folder / "checkpoints")
    state = read_state(newest)
    assert state["step"] >= done
    with safetensors.safe_open(newest / TENSORS, "pt") as file:
        assert float(file.get_tensor("master.x")[0]) == state["step"]
    if read_pointer(adapters / BEST) is not None:
        check_adapter(adapters / BEST)
    return state


BESTS = {2: 2, 4: 2, 6: 6, 8: 6}  # the best step at each save


@pytest.mark.parametrize(
    "keep, exchange",
    [
        pytest.param(1, True, id="one kept"),
        pytest.param(3, False, id="three kept, without exchange"),
        pytest.param(1, False, id="one kept, without exchange", marks=pytest.mark.matrix),
    ],
)
def test_a_kill_before_any_file_operation_of_a_save_costs_nothing(tmp_path, monkeypatch, keep, exchange):
    if not exchange:
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **settings: object())
    for number in itertools.count(1):
        folder, done = tmp_path / "run", 0
        with KillAt(number) as kill:
            for step, best in BESTS.items():
                save(folder, step, best, step - 2 or None, keep)
                done = step
        if kill.left > 0:
            assert done == 8 and number > 100
            return
        if done == 0:  # killed in the first save
            if (folder / "checkpoints" / LATEST).exists():
                check_whole(folder, 2)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        state = check_whole(folder, done)
        # Gone on with, and killed again before it has saved anything.
        with KillAt(1 + number % 7):
            RunFolder(folder, is_writer=True).set_back(state["step"], state["best_step"])
        check_whole(folder, done)
        RunFolder(folder, is_writer=True).set_back(state["step"], state["best_step"])
        assert read_pointer(folder / "adapter" / LATEST) == state["step"]
        assert check_adapter(folder / "adapter" / BEST) == state["best_step"] == BESTS[state["step"]]
        # And in its next save, which may find the same step there.
        with KillAt(1 + number % 41):
            save(folder, state["step"] + 2, state["best_step"], state["step"], keep)
        check_whole(folder, state["step"])
        shutil.rmtree(folder)


def test_an_adapter_of_a_cut_save_is_kept_until_the_next_save_if_it_is_the_only_one(tmp_path):
    """As runs of older versions may have left them: pointers moved and old adapters gone before the checkpoint."""
    save(tmp_path, 4, 4, None, 1)
    save(tmp_path, 6, 6, 4, 1)
    (tmp_path / "checkpoints" / LATEST).write_text("4\n")
    shutil.rmtree(tmp_path / "adapter" / "4")
    run = RunFolder(tmp_path, is_writer=True)
    run.set_back(4, 4)
    assert check_adapter(tmp_path / "adapter") == 6
    save(tmp_path, 5, 5, 4, 1)
    assert sorted(os.listdir(tmp_path / "adapter")) == ["5", BEST, LATEST]


# A folder with results


def options_of(tmp_path, *more):
    data = ["--train-data", str(tmp_path), "--save", str(tmp_path), "--experiment-name", "run"]
    return parse_options([*data, *more], environ={})


LEFT = {
    "an adapter": lambda run: save(run, 2, None, None, 1),
    "an adapter of another tool": lambda run: (run / "adapter").mkdir() or (run / "adapter" / "x.bin").touch(),
    "a checkpoint alone": lambda run: save(run, 2, None, None, 1) or shutil.rmtree(run / "adapter"),
    "a draft of a killed save": lambda run: (run / "checkpoints" / ".2.tmp-9").mkdir(parents=True),
    "a log": lambda run: (run / "train.jsonl").write_text('{"step": 1, "loss": 2}\n'),
    "a log of another tool": lambda run: (run / "train.jsonl").write_text("free text"),
    "settings": lambda run: (run / "run.json").write_text("{}"),
    "a picture": lambda run: (run / "loss.png").write_bytes(b"mine"),
    "curves of another tool": lambda run: (
        (run / "tensorboard" / "v0").mkdir(parents=True)
        or (run / "tensorboard" / "v0" / "hparams.yaml").write_text("lr: 1")
    ),
    "curves": lambda run: EventFile(run / "tensorboard").add_scalars(1, {"train/loss": 2.0, "train/lr": 0.1}),
    "an evaluation": lambda run: (run / "evaluation.json").write_text("{}"),
    "a further evaluation": lambda run: (run / "evaluation-2.json").write_text("{}"),
    "a link to results": lambda run: (run / "evaluation.json").symlink_to("/etc/hostname"),
}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", LEFT)
def test_results_of_anyone_are_refused_by_name_with_every_way_out(what, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    LEFT[what](run)
    before = contents(run)
    (problem,) = results_problems(options_of(tmp_path))
    assert str(run) in problem and "--experiment-name run-2" in problem and "--overwrite" in problem
    assert (f"--resume {run})" in problem) == (run / "checkpoints" / LATEST).exists()
    assert "--resume" in problem
    assert results_problems(options_of(tmp_path, "--overwrite")) == []
    assert contents(run) == before
    RunFolder(run, is_writer=True).remove_results()
    left = {"adapter"} if "of another tool" in what and "log" not in what else set()
    assert {name.partition(" ")[0] for name in results_in(run)} <= left


def test_what_is_no_result_is_no_reason_to_refuse(tmp_path):
    run = tmp_path / "run"
    assert results_problems(options_of(tmp_path)) == []
    run.mkdir()
    for name in ("slurm-17.out", "notes.txt", "loss.png"):
        (run / name).touch()
    for name in ("adapter", "checkpoints", "tensorboard", "watchdog"):
        (run / name).mkdir()
    EventFile(run / "tensorboard", purge_from=10**9).close()
    # A run that ended before its first step, as one that ran out of memory.
    (run / "run.json").write_text("{}")
    (run / "train.jsonl").touch()
    assert results_problems(options_of(tmp_path)) == []


def test_the_name_that_is_proposed_is_free(tmp_path):
    for name in ("run", "run-2", "run-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    (problem,) = results_problems(options_of(tmp_path))
    assert "--experiment-name run-4" in problem


def test_the_demo_replaces_its_own_run_alone_and_says_so(tmp_path, capsys):
    def demo(*more):
        return parse_options(["--save", str(tmp_path), *more], environ={})

    run = tmp_path / "demo"
    save(run, 2, None, None, 1)
    assert "--overwrite" in results_problems(demo())[0]  # nobody knows whose it is
    RunFolder(run, is_writer=True).write_settings(demo("--train-iters", "3"), world={})
    assert results_problems(demo(), say=print) == []
    assert f"{run}: replaces the demo's run there: adapter (2), checkpoints (2)" in capsys.readouterr().out
    own = demo("--train-data", str(tmp_path), "--experiment-name", "demo")
    assert "--overwrite" in results_problems(own)[0]
    RunFolder(run, is_writer=True).write_settings(own, world={})
    assert "--overwrite" in results_problems(demo())[0]


def test_a_second_start_ends_on_every_rank_before_the_base_loads(captchas, tmp_path):
    more = ("--train-iters", "1", "--batch-size", "2", "--eval-iters", "1")
    options = options_for(captchas, tmp_path, *more)
    first = run_ranks(run_script, 2, options)
    assert [status for status, _ in first] == [0, 0], first
    run = tmp_path / "run"
    assert not (run / LOCK).exists()
    before = contents(run)
    again = run_ranks(run_script, 2, options, refuse_to_load=True)
    assert [status for status, _ in again] == [2, 2]
    assert f"error: --save: {run} holds the results of a run: adapter (1)" in again[0][1] and again[1][1] == ""
    assert contents(run) == before
    resumed = ["--resume", str(run), "--seed", "3", "--train-data", str(captchas / "valid")]
    ((status, errors),) = run_ranks(run_script, 1, [*resumed, "--batch-size", "4"], refuse_to_load=True)
    assert status == 2 and "--seed: got 3, but the run to resume has 1234" in errors
    other_data = [*resumed[:2], *resumed[4:], "--batch-size", "4"]
    ((status, errors),) = run_ranks(run_script, 1, other_data, refuse_to_load=True)
    assert status == 2 and "--any-data" in errors and "64 samples then, 16 now" in errors
    assert contents(run) == before


# One writer at a time


DEAD = Process(Process.current().host, 2**22 + 1, "5")  # above the largest number that a process can have


def write_lock(folder, process, *, launcher=None, ranks=(), job=None, text=None):
    folder.mkdir(parents=True, exist_ok=True)
    holder = Holder("training", "2026-01-01 00:00:00", process, launcher, tuple(ranks), job)
    (folder / LOCK).write_text(json.dumps(asdict(holder)) if text is None else text)


def locked(folder):
    return RunLock(folder, doing="training", option="--save")


def refusal(folder):
    with pytest.raises(ConfigError) as error, locked(folder):
        pass
    return str(error.value)


def test_one_process_holds_a_folder_and_lets_go_at_every_ending(single_process_group, tmp_path):
    run = tmp_path / "deep" / "run"
    with locked(run) as lock:
        assert lock.is_ours and lock.note is None
        message = refusal(run)
        assert f"--save: {run} is in use (training, process {os.getpid()} on " in message and "kill" in message
        lock.share()
        assert f"process {os.getpid()} still runs" in refusal(run)
    assert not run.exists() and not run.parent.exists()  # made for the lock, and left empty
    with pytest.raises(KeyError), locked(run):
        (run / "file").touch()
        raise KeyError
    assert os.listdir(run) == ["file"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"process": 3}', "\0" * 100, '{"process": {"pid": "x"}}', "[" * 9999, "\xff"]
)
def test_a_text_that_nobody_holds_and_nobody_can_read_is_taken_over(single_process_group, tmp_path, text):
    write_lock(tmp_path, DEAD, text=text)
    with locked(tmp_path) as lock:
        assert lock.is_ours
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 10**30, True, [None], {"a": []}, ["1"], "\x1b[2J"])
def test_a_text_with_values_of_any_type_is_read_or_is_none(value):
    content = asdict(Holder("training", "2026-01-01", DEAD, DEAD, (DEAD,), ("1", "0")))
    for name in content:
        Holder.read(json.dumps({**content, name: value}).encode())
    for name in content["process"]:
        for of in ("process", "launcher"):
            holder = Holder.read(json.dumps({**content, of: {**content[of], name: value}}).encode())
            assert holder is None or (isinstance(holder.alive, list) and str(holder).isprintable())
        Holder.read(json.dumps({**content, "ranks": [{**content["process"], name: value}]}).encode())
    holder = Holder.read(json.dumps({**content, "job": value}).encode())
    assert holder is None or holder.is_requeued_as_this in (True, False)


@pytest.mark.parametrize("has_flock", [True, False])
def test_the_lock_of_a_process_that_died_is_taken_over_aloud(single_process_group, tmp_path, monkeypatch, has_flock):
    if not has_flock:
        monkeypatch.setattr(run_lock, "_flock", lambda *args: None)
    reused = Process(DEAD.host, os.getpid(), "1")  # the number is this process's by now
    for process in (DEAD, reused, Process(DEAD.host, 0, None), Process(DEAD.host, -1, "5")):
        write_lock(tmp_path, process, ranks=[process])
        with locked(tmp_path) as lock:
            assert lock.note.startswith(f"{tmp_path}: its lock is of a run that has ended (training, process")


def test_without_flock_the_text_counts(single_process_group, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_flock", lambda *args: None)
    write_lock(tmp_path, DEAD, ranks=[DEAD, Process.current()])
    assert f"process {os.getpid()} still runs" in refusal(tmp_path)
    with locked(tmp_path / "other"):
        assert "is in use" in refusal(tmp_path / "other")


def test_a_process_of_another_machine_may_live_and_its_lock_goes_by_hand(single_process_group, tmp_path, monkeypatch):
    away = Process("node17", 4711, "99")
    write_lock(tmp_path, away, ranks=[away])
    message = refusal(tmp_path)
    assert "on another machine (training, process 4711 on node17" in message and f"rm {tmp_path / LOCK}" in message
    write_lock(tmp_path, DEAD, ranks=[DEAD, away])  # a rank of it
    assert "on another machine" in refusal(tmp_path)
    write_lock(tmp_path, away, ranks=[away], job=("17", "0"))
    for job, count, is_taken in (("17", "0", False), ("18", "1", False), ("17", "1", True)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        if is_taken:  # the same job, which Slurm runs once at a time
            with locked(tmp_path) as lock:
                assert "taken over" in lock.note
        else:
            assert "on another machine" in refusal(tmp_path)


def other_process(code):
    """A process that runs `code` and waits until it is killed; it has said `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint('ready', flush=True)\nimport time; time.sleep(100)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_rank_that_outlives_its_launcher_holds_the_lock(single_process_group, tmp_path, capfd, monkeypatch):
    """It is waited for, since it saves and ends; and refused, by its number, if it does not."""
    (tmp_path / LOCK).touch()
    rank = other_process(f"import fcntl; f = open({str(tmp_path / LOCK)!r}); fcntl.flock(f, fcntl.LOCK_SH)")
    own = Process(DEAD.host, rank.pid, lock_holder.process_started(rank.pid))
    try:
        monkeypatch.setattr(run_lock, "TO_STOP", 0.3)
        write_lock(tmp_path, DEAD, launcher=DEAD, ranks=[DEAD, own])
        message = refusal(tmp_path)
        assert f"process {rank.pid} still runs" in message and f"kill {rank.pid}" in message
        assert "the launcher of its run has ended" in capfd.readouterr().out
        rank.send_signal(signal.SIGKILL)
        with locked(tmp_path) as lock:  # at once, dead or still dying
            assert "taken over" in lock.note
    finally:
        rank.kill()
        rank.wait()


def test_a_data_worker_that_outlives_its_rank_does_not_hold_it(single_process_group, tmp_path):
    with locked(tmp_path):
        worker = os.fork()
        if worker == 0:
            signal.pause()
            os._exit(0)
    try:
        with locked(tmp_path) as lock:
            assert lock.note is None
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


KINDS = {
    "adapter": lambda path: path.write_text("mine"),
    "checkpoints": os.mkfifo,
    "watchdog": lambda path: path.touch(),
    "run.json": os.mkdir,
    "train.jsonl": os.mkdir,
    "evaluation.json": lambda path: path.symlink_to("/dev/zero"),
    LOCK: lambda path: path.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_of_the_wrong_kind_is_named_before_anything_else(name, single_process_group, tmp_path):
    KINDS[name](tmp_path / name)
    message = refusal(tmp_path)
    assert f"{tmp_path / name} is a" in message and "a run has a" in message
    assert os.listdir(tmp_path) == [name]


PLACES = ["file/run", "file/deep/run", "file", "dangling", "dangling/run", "/proc/run", "x" * 300]


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_in_which_nothing_can_be_written_is_refused_by_name(place, single_process_group, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    message = refusal(tmp_path / place)
    assert message.startswith(f"--save: {tmp_path / place}: nothing can be written there (")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_a_folder_that_is_removed_under_a_run_is_begun_anew(single_process_group, tmp_path, capfd):
    """Unless another process has it by then."""
    run_path = tmp_path / "run"
    with locked(run_path) as lock:
        run = RunFolder(run_path, is_writer=True, lock=lock)
        run.write_settings(options_of(tmp_path), world={})
        shutil.rmtree(run_path)
        run.check_is_ours()
        assert lock.is_ours and (run_path / "run.json").is_file()
        assert "was removed while the run wrote to it" in capfd.readouterr().out
        shutil.rmtree(run_path)
        with locked(run_path), pytest.raises(AdapterError, match="was removed while it was written to; .* is in use"):
            run.check_is_ours()


@pytest.mark.parametrize("later", [(), (2, 3)])
def test_a_folder_that_is_removed_under_a_run_gets_its_log_back(later, single_process_group, tmp_path):
    """What was logged before and after, whether or not a step follows the save that found it gone."""
    run_path = tmp_path / "run"
    with locked(run_path) as lock:
        run = RunFolder(run_path, is_writer=True, lock=lock)
        with logs_of(run) as logs:
            logs.on_start(3, 0)
            logs.on_validation(validated(1, 2.0))
            shutil.rmtree(run_path)
            run.check_is_ours()
            for step in later:
                logs.on_validation(validated(step, 1.0))
    assert [record["step"] for record in read_records(run_path / "train.jsonl")] == [1, *later]
    assert any((run_path / "tensorboard").iterdir())


def test_a_disk_without_room_for_one_save_is_found_before_the_base_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "saved_sizes", lambda config: (2 << 20, 1 << 20))
    options, free = options_of(tmp_path), [0]
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1, 1, 9, free[0], free[0], 0, 0, 0, 0, 255)))
    free[0] = (14 << 20) + space.BESIDE
    space.check_space(options)
    free[0] -= 1
    with pytest.raises(ConfigError, match=r"14.2 MiB free, one save takes 14.2 MiB \(adapter 2.0 MiB, checkpoint 12.0"):
        space.check_space(options)
    space.check_space(options, freed=1)


def share_slowly(folder):
    """On rank 0 the lock is given up for sharing late."""
    init_model_parallel(init_distributed())
    with locked(Path(folder)) as lock:
        share = lock._share

        def late():
            if torch.distributed.get_rank() == 0:
                time.sleep(0.5)
            share()

        lock._share = late
        lock.share()
        torch.distributed.barrier()
        return lock.is_ours, len(Holder.read(Path(folder, LOCK).read_bytes()).ranks)


def test_ranks_wait_for_the_first_one_to_share(tmp_path):
    assert run_ranks(share_slowly, 2, str(tmp_path / "run")) == [(True, 2), (True, 2)]
    assert os.listdir(tmp_path) in ([], ["run"])
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        (["--experiment-name", "mine"], True),
        (["--experiment-name", "group/mine"], True),
        (["--experiment-name", "other"], False),
        (["--save", "runs/group"], True),
        (["--save", "link"], True),
        (["--save", "elsewhere"], False),
        (["--save", "link", "--experiment-name", "mine"], True),
        (["--save", "runs", "--experiment-name", "mine"], False),
    ],
)
def test_a_run_goes_on_in_its_own_folder_and_no_option_says_otherwise(more, fits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "group" / "mine"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(run.parent)
    (run / "run.json").write_text('{"settings": {"from_pretrained": "base"}}')
    argv = ["--resume", "runs/group/mine", *more]
    if fits:
        assert parse_options(argv, environ={}).run_folder == "runs/group/mine"
        return
    with pytest.raises(SystemExit) as stop:
        parse_options(argv, environ={})
    assert stop.value.code == 2 and f"{more[0]} {more[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--save", "--experiment-name"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_name_is_no_run_among_all_others(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options([option, value], environ={})
    assert stop.value.code == 2 and f"{option}: got {value!r}" in capsys.readouterr().err


def test_a_run_begins_nowhere_where_its_weights_could_not_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"r\xff")
    with pytest.raises(SystemExit) as stop:
        parse_options(["--save", name, "--experiment-name", "mine"], environ={})
    assert stop.value.code == 2 and r"--save: r\udcff/mine: its name is no UTF-8" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--out: r\\udcff: its name is no UTF-8"):
        refuse_existing(name)
    for good in ("\u9a8c\u8bc1", "a b"):
        assert parse_options(["--save", good], environ={}).run_folder == f"{good}/demo"
        refuse_existing(good)
    os.mkdir(name)
    os.chdir(name)
    with pytest.raises(SystemExit):
        parse_options([], environ={})

"""Pictures, logs and the watchdog's files: whatever becomes of them, a run goes on, or ends with its own error."""

import contextlib
import errno
import io
import json
import os
import sys

import pytest

from sat_lora.errors import ConfigError, TrainingError
from sat_lora.training.runs.logs import loss_plot
from sat_lora.training.runs.logs.run_logs import AppendedFile, read_records
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.observers import StepReport
from sat_lora.watchdog import trace
from sat_lora.watchdog.rank_files import file_of, folder_of
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.watchdog import watched_trace
from tests.support.configs import config_of, parse_options
from tests.support.full_disks import largest_file
from tests.support.run_logs import logged, logs_of, scalars, validated
from tests.support.traces import trace_of_a_linear


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def train(path, steps=3, start=0):
    run = RunFolder(path, is_writer=True)
    with logs_of(run) as logs:
        logs.on_start(start + steps, start)
        for step in range(start + 1, start + steps + 1):
            logs.on_step(logged(step, loss=1.0 / step))
            logs.on_validation(validated(step, 1.0))
            logs.on_step(StepReport(step=step, loss=1.0, lr=1e-3, skipped="loss is not finite"))
            logs.on_broken([(f"{step}.png", "torn")], step)
        logs.on_save(step, path, path)  # the picture is drawn, and once more where it ends
    return run


def a_folder(path):
    path.mkdir()


def a_full_folder(path):
    (path / "inside").mkdir(parents=True)


def a_pipe(path):
    os.mkfifo(path)


def a_dangling_link_to_nowhere(path):
    path.symlink_to("/nowhere/at/all")


def a_file(path):
    path.write_text("not ours")


@pytest.mark.parametrize(
    "name, kind",
    [
        *(("loss.png", kind) for kind in (a_folder, a_full_folder)),
        *(("train.jsonl", kind) for kind in (a_folder, a_full_folder)),
        *(("tensorboard", kind) for kind in (a_file, a_pipe, a_dangling_link_to_nowhere)),
    ],
)
def test_what_lies_in_the_place_of_a_log_is_named_once(name, kind, tmp_path, capfd):
    kind(tmp_path / name)
    run = train(tmp_path)
    said = "".join(capfd.readouterr())
    assert said.count(f"warning: {name} cannot be written: ") == 1 and "Traceback" not in said
    assert len(run.log.records) == 12
    for other in {"loss.png", "train.jsonl"} - {name}:
        assert (tmp_path / other).stat().st_size > 100
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_resumed_log_that_cannot_be_read_is_left_as_it_is(tmp_path, capfd):
    """A pipe is not waited for, and a file of someone else's not written over."""
    os.mkfifo(tmp_path / "train.jsonl")
    train(tmp_path, start=5)
    assert "train.jsonl cannot be written: a pipe, no file" in "".join(capfd.readouterr())
    assert (tmp_path / "train.jsonl").is_fifo()


def test_lines_of_other_kinds_in_a_resumed_log_are_passed_over(tmp_path):
    lines = ["[1]", "7", '{"step": "x"}', "{" * 5000, '{"step": 1, "valid_loss": "low"}', '{"step": 2, "broken": [1]}']
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, '{"step": 1, "loss": 1.5}', '{"step": 9}', '{"st']))
    run = train(tmp_path, start=4)
    assert {"step": 1, "loss": 1.5} in run.log.records and {"step": 9} not in run.log.records
    assert all(isinstance(record["step"], int) for record in read_records(tmp_path / "train.jsonl"))


@pytest.mark.parametrize("error", [OSError(28, "full"), RuntimeError("renderer"), MemoryError(), ValueError("bad dpi")])
def test_a_picture_that_cannot_be_drawn_ends_nothing(error, tmp_path, capfd, monkeypatch):
    def draw(*args):
        raise error

    monkeypatch.setattr(loss_plot, "draw_losses", draw)
    train(tmp_path)
    assert "".join(capfd.readouterr()).count("warning: loss.png") == 1


@pytest.mark.parametrize("broken", ["loss.png", "screen"])
def test_the_error_that_ended_a_run_is_the_one_that_comes(broken, tmp_path, monkeypatch):
    if broken == "loss.png":
        monkeypatch.setattr(loss_plot, "draw_losses", full_disk)
    run = RunFolder(tmp_path, is_writer=True)
    with pytest.raises(TrainingError, match="the real one"), logs_of(run) as logs:
        logs.on_start(4, 0)
        logs.on_step(logged(1, loss=1.0))
        if broken == "screen":
            monkeypatch.setattr(sys, "stdout", None)
            monkeypatch.setattr(run.screen._progress, "close", full_disk)
        raise TrainingError("the real one")


def test_lines_that_found_no_room_are_written_when_there_is_some(tmp_path):
    with logs_of(RunFolder(tmp_path, is_writer=True)) as logs:
        logs.on_start(4, 0)
        logs.on_step(logged(1, loss=1.0))
        sizes = [path.stat().st_size for path in (tmp_path / "train.jsonl", *(tmp_path / "tensorboard").iterdir())]
        with largest_file(min(sizes)):
            logs.on_step(logged(2, loss=0.5))
        logs.on_step(logged(3, loss=0.25))
    assert [record["step"] for record in read_records(tmp_path / "train.jsonl")] == [1, 2, 3]
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 0.5), (3, 0.25)]


@pytest.mark.parametrize("room", range(0, 24, 5))
def test_there_is_never_a_part_of_a_line(room, tmp_path):
    file = AppendedFile(tmp_path / "log")
    file.append(b"first line\n")
    with largest_file(11 + room):
        for line in (b"second line\n", b"third line\n"):
            with contextlib.suppress(OSError):
                file.append(line)
    assert (tmp_path / "log").read_bytes() in (b"first line\n", b"first line\nsecond line\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"first line\nsecond line\nthird line\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_screen_that_is_gone_ends_nothing(stream, tmp_path, monkeypatch):
    class Gone:
        write = flush = full_disk

        def isatty(self):
            return False

    monkeypatch.setattr(sys, stream, Gone())
    train(tmp_path)
    assert len(read_records(tmp_path / "train.jsonl")) == 12


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_screen_of_few_characters_shows_the_others_escaped(encoding, tmp_path, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    RunFolder(tmp_path, is_writer=True).say("sample  验证\x1b[2J\ud800\nsecond line")
    shown = screen.buffer.getvalue().decode(encoding)
    assert shown.startswith("sample  验证" if encoding == "utf-8" else "sample  \\u9a8c\\u8bc1")
    assert shown.endswith("\\x1b[2J\\ud800\nsecond line\n")


def test_settings_that_cannot_be_written_are_one_error_with_the_folder(tmp_path):
    """Without run.json a run could not be resumed."""
    from sat_lora.training import finetune
    from sat_lora.training.steps.checkpoint import RunState

    (tmp_path / "run.json").mkdir()
    with pytest.raises(ConfigError, match=f"--save: {tmp_path}: cannot be written: .*run.json.*; make room"):
        finetune._begin(parse_options([]), RunFolder(tmp_path, is_writer=True), RunState(), world={})


# The watchdog's files


def test_a_state_file_takes_its_place_before_it_is_mapped(tmp_path):
    """A file that is merely long has no blocks, and on a full disk the first write to its mapping is a bus error."""
    _, own = trace_of_a_linear(tmp_path)
    state = file_of(folder_of(tmp_path), 0, ".state").stat()
    assert state.st_size >= 64 and state.st_blocks * 512 >= state.st_size
    own.at("forward", step=1)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_allocate_gets_zeros(number, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    trace_of_a_linear(tmp_path)
    assert file_of(folder_of(tmp_path), 0, ".state").stat().st_blocks > 0
    assert read_states(tmp_path)[0].phase == "start"


def test_a_full_disk_is_an_error_at_the_start_that_leaves_no_half_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trace_of_a_linear(tmp_path)
    assert [*folder_of(tmp_path).iterdir()] == [] == read_states(tmp_path)


def test_a_run_without_room_for_the_watchdog_is_warned_and_trains(tmp_path, monkeypatch, caplog):
    from argparse import Namespace

    from sat_lora.training import finetune

    monkeypatch.setattr(trace.os, "posix_fallocate", full_disk)
    monkeypatch.setattr(finetune, "on_first_rank", lambda action: None)
    run, world = Namespace(path=tmp_path), Namespace(rank=1, size=2)
    assert finetune._trace(config_of(watchdog_limit=5.0).checks, run, world) is None
    assert "rank 1 runs without the watchdog: its files cannot be made: [Errno 28]" in caplog.text


@pytest.mark.parametrize("ending", [".end.json", ".stuck.txt", ".fatal.txt"])
def test_what_the_watchdog_cannot_write_hides_no_error(ending, tmp_path):
    _, own = trace_of_a_linear(tmp_path)
    file_of(folder_of(tmp_path), 0, ending).mkdir()
    with pytest.raises(TrainingError, match="the real one"), watched_trace(own, 5.0):
        raise TrainingError("the real one")


def test_a_record_is_one_line_of_json_whatever_is_in_it(tmp_path):
    with logs_of(RunFolder(tmp_path, is_writer=True)) as logs:
        logs.on_start(1, 0)
        logs.on_broken([("a\nb\u2028\ud800.png", "\x1b[31mred\n")], 1)
    (line,) = (tmp_path / "train.jsonl").read_bytes().splitlines()
    assert json.loads(line)["broken"] == "a\nb\u2028\ud800.png"

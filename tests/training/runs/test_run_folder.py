import contextlib
import json
import math
import os
import pty

import pytest
from PIL import Image

from sat_lora.training.runs import step_progress as progress
from sat_lora.training.runs.logs.loss_plot import draw_losses, smoothed
from sat_lora.training.runs.logs.run_logs import read_records
from sat_lora.training.runs.run_folder import RunFolder, write_json
from tests.support.configs import parse_options
from tests.support.ranks import run_ranks
from tests.support.run_logs import FIGURES, logged, logs_of, scalars, validated


def run(path, steps, start=0, total=4):
    with logs_of(RunFolder(path, is_writer=True)) as logs:
        logs.on_start(total, start)
        for step in steps:
            logs.on_step(logged(step, loss=5.0 / step))
        logs.on_validation(validated(steps[-1], 1.25))
    return read_records(path / "train.jsonl")


def test_a_run_leaves_records_events_and_a_picture(tmp_path):
    records = run(tmp_path, [1, 2])
    assert records == [
        {"step": 1, "loss": 5.0, **FIGURES},
        {"step": 2, "loss": 2.5, **FIGURES},
        {"step": 2, "valid_loss": 1.25},
    ]
    assert scalars(tmp_path)["train/loss"] == [(1, 5.0), (2, 2.5)]
    assert scalars(tmp_path)["valid/loss"] == [(2, 1.25)]
    assert Image.open(tmp_path / "loss.png").size == (960, 540)
    assert not list(tmp_path.glob(".*.tmp"))


def test_records_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    logs = logs_of(RunFolder(tmp_path, is_writer=True))
    logs.on_start(4, 0)
    logs.on_step(logged(1, loss=1.0))
    assert len(read_records(tmp_path / "train.jsonl")) == 1
    logs.on_end(None)
    logs.on_end(None)


def test_a_resumed_run_drops_what_came_after_its_start(tmp_path):
    run(tmp_path, [1, 2, 3])
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    records = run(tmp_path, [3, 4], start=2)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 4]
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4]


def test_a_new_run_in_an_old_folder_starts_its_logs_over(tmp_path):
    run(tmp_path, [1, 2, 3])
    assert [record["step"] for record in run(tmp_path, [1])] == [1, 1]
    assert scalars(tmp_path)["train/loss"] == [(1, 5.0)]


def test_others_than_the_writer_do_nothing(tmp_path, capfd):
    folder = RunFolder(tmp_path / "run", is_writer=False)
    folder.write_settings(parse_options([]), world={})
    folder.say("a line")
    with logs_of(folder) as logs:
        logs.on_start(4, 0)
        logs.on_step(logged(1, loss=1.0))
        logs.on_validation(validated(1, 1.0))
        logs.on_broken([("x.png", "torn")], 1)
        logs.on_save(1, tmp_path, tmp_path)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_run_json_brings_a_resumed_run_its_settings(tmp_path):
    options = parse_options(["--lr", "5e-4", "--target_modules", "projector"])
    RunFolder(tmp_path, is_writer=True).write_settings(options, world={"ranks": 2})
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["world"] == {"ranks": 2}
    assert {"python", "torch", "deepspeed", "SwissArmyTransformer", "sat_lora"} <= content["versions"].keys()
    resumed = parse_options(["--resume", str(tmp_path)])
    differing = {name for name, value in options.flat().items() if value != resumed.value(name)}
    assert differing <= {"resume", "experiment_name"}
    assert resumed.given == {"lr", "target_modules", "resume"}


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "run.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "run.json", {"new": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"old": 1}


def test_a_broken_image_is_named_once_and_counted(tmp_path, capfd):
    folder = RunFolder(tmp_path, is_writer=True)
    with logs_of(folder) as logs:
        logs.on_start(4, 0)
        for step in (1, 2):
            logs.on_broken([("x.png", "x.png: torn"), ("y.png", "y.png: empty")], step)
        assert len(folder.log.broken) == 2
    out, err = capfd.readouterr()
    assert err.count("skipped: x.png: torn") == 1
    assert "2 samples were skipped" in out
    assert {"step": 1, "broken": "y.png", "reason": "y.png: empty"} in read_records(tmp_path / "train.jsonl")


def test_a_loss_that_is_no_number_is_null_and_left_out_of_the_picture(tmp_path):
    with logs_of(RunFolder(tmp_path, is_writer=True)) as logs:
        logs.on_start(4, 0)
        logs.on_step(logged(1, loss=float("nan")))
        logs.on_step(logged(2, loss=1.0))
    assert read_records(tmp_path / "train.jsonl")[0]["loss"] is None
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_smoothed_loss_lies_on_the_data():
    """Falling a thousandfold along a straight line of a logarithmic axis, with noise of a tenth that takes turns."""
    clean = [10 * 0.99**step for step in range(700)]
    noisy = [value * (1.1 if step % 2 else 1 / 1.1) for step, value in enumerate(clean)]
    assert all(abs(math.log(got / wanted)) < 0.05 for got, wanted in zip(smoothed(noisy)[12:-12], clean[12:-12]))
    assert smoothed([3.0, 2.0, 1.0]) == pytest.approx([3.0, 2.0, 1.0])  # too few to smooth
    assert smoothed([0.0, -1.0]) == [0.0, -1.0] and smoothed([]) == []
    flat = smoothed([2.0] * 90 + [2.0e3])
    assert flat[:80] == pytest.approx([2.0] * 80)  # what comes later does not show before


def test_a_picture_of_nothing_is_drawn_too(tmp_path):
    draw_losses([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()


def test_a_log_file_gets_plain_lines_now_and_then(capfd, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = progress.Progress(4)
    for step in (1, 2, 3, 4):
        shown.advance(step, {"loss": 1.5, "lr": 1e-3, "samples_per_second": 7.0, "mib": 100.0})
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "step 1/4, 00:03 left, loss 1.5000, lr 1.00e-03, 7.0 samples/s, peak 100 MiB"
    assert [line.split(",")[0] for line in lines] == ["step 1/4", "step 3/4", "step 4/4"]


def test_a_terminal_gets_a_bar(capfd, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    shown = progress.Progress(2)
    shown.advance(1, {"loss": 1.5})
    shown.say("a line")
    shown.advance(2, {"loss": 1.25})
    shown.close()
    text = capfd.readouterr().err
    assert "a line\n" in text and "2/2" in text and "loss 1.2500" in text


def test_peak_memory_is_in_mib():
    assert 50 < progress.peak_memory_mib() < 100_000


def shown_on_a_terminal_without_a_size():
    """What a run of three steps writes to a terminal of 0 x 0."""
    leader, follower = pty.openpty()
    before = os.dup(2)
    os.dup2(follower, 2)
    shown = progress.Progress(3, 0)
    shown.advance(3, {"loss": 1.25, "lr": 1e-3})
    shown.close()
    os.dup2(before, 2)
    os.close(follower)
    text = b""
    with contextlib.suppress(OSError):  # nobody writes there any more
        while chunk := os.read(leader, 65536):
            text += chunk
    return text.decode()


def test_a_terminal_without_a_size_still_shows_the_bar():
    """Containers often give 0 x 0."""
    (shown,) = run_ranks(shown_on_a_terminal_without_a_size, 1)
    assert "3/3" in shown and "loss 1.2500" in shown

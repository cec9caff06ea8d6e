"""`sat-lora runs`: what run folders have come to, whatever state they are in."""

import json
import os
import subprocess
import sys

import pytest

from sat_lora.cli import main
from sat_lora.training.runs.listing import read_run, runs_in
from sat_lora.training.runs.lock_holder import Holder


def run_folder(root, name="mine", *, steps=20, records=(), evaluation=None):
    folder = root / name
    (folder / "adapter" / "20").mkdir(parents=True)
    (folder / "adapter" / "latest").write_text("20\n")
    settings = {"train_iters": steps, "from_pretrained": "/bases/cogvlm"}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


RECORDS = [
    {"step": 10, "loss": 2.0},
    {"step": 10, "valid_loss": 0.5},
    {"step": 20, "loss": 1.0},
    {"step": 20, "valid_loss": 0.75},
]


def test_a_run_that_has_ended(tmp_path):
    scores = {"base": {"exact_match": 0.1}, "adapter": {"exact_match": 0.9}}
    run = read_run(run_folder(tmp_path, records=RECORDS, evaluation=scores))
    assert (run.state, run.step, run.steps, run.loss, run.base) == ("finished", 20, 20, 1.0, "/bases/cogvlm")
    assert (run.valid_loss, run.best_step, run.exact_match, run.adapter) == (0.5, 10, 0.9, 20)
    files = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert run.size == sum(path.stat().st_size for path in files)
    assert run.changed == max(path.stat().st_mtime for path in files)


@pytest.mark.parametrize(
    "most, not_better, state", [(2, 2, "finished"), (2, 3, "finished"), (2, 1, "stopped"), (0, 9, "stopped")]
)
def test_a_run_that_early_stopping_has_ended(most, not_better, state, tmp_path):
    folder = run_folder(tmp_path, steps=30, records=RECORDS)
    content = json.loads((folder / "run.json").read_text())
    content["settings"]["early_stopping"] = most
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "checkpoints" / "20").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("20")
    assert read_run(folder).state == "stopped"  # the checkpoint cannot be read
    (folder / "checkpoints" / "20" / "state.json").write_text(json.dumps({"not_better": not_better}))
    assert read_run(folder).state == state


def test_a_run_that_goes_on_and_one_that_was_cut(tmp_path):
    folder = run_folder(tmp_path, steps=30, records=RECORDS)
    assert read_run(folder).state == "stopped"
    (folder / "lock").write_text(json.dumps(holder_of(os.getpid())))
    assert read_run(folder).state == "running"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / "lock").write_text(json.dumps(holder_of(ended.pid)))
    assert read_run(folder).state == "stopped"


def holder_of(pid: int) -> dict:
    """What a lock says of a training of this process, with another number."""
    holder = Holder.current("training")
    process = {**vars(holder.process), "pid": pid}
    return {"doing": "training", "began": holder.began, "process": process, "launcher": None, "ranks": [], "job": None}


LAST = b'{"step": 10, "loss": 2.0}\n'


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.jsonl", LAST + b'{"step": 20, "lo'),
        ("train.jsonl", b"\xff\xfe\n[1]\n3\n{}\n" + b"x" * 100_000 + b'\n{"step": true, "loss": 1}\n' + LAST),
        ("train.jsonl", b'{"step": 10, "loss": 2.0, "valid_loss": NaN}\n{"step": 10, "valid_loss": "low"}\n'),
    ],
)  # fmt: skip
def test_broken_lines_are_passed_over(tmp_path, name, content):
    folder = run_folder(tmp_path)
    (folder / name).write_bytes(content)
    run = read_run(folder)
    assert (run.state, run.step, run.loss, run.valid_loss) == ("stopped", 10, 2.0, None)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3}', '{"settings": null}', "[" * 1000])
def test_a_broken_run_json_is_the_state(tmp_path, content):
    folder = run_folder(tmp_path)
    (folder / "run.json").write_text(content)
    assert read_run(folder).state.startswith("run.json: ")


@pytest.mark.parametrize("content", ["", "[]", '{"adapter": 3}', '{"base": {"exact_match": "all"}}', "{}"])
def test_a_broken_evaluation_is_none(tmp_path, content):
    folder = run_folder(tmp_path)
    (folder / "evaluation.json").write_text(content)
    assert read_run(folder).exact_match is None


def test_runs_are_listed_by_when_they_changed(tmp_path, capsys):
    for number, name in enumerate(("b", "a\x1b[31m", "c")):
        folder = run_folder(tmp_path, name, records=RECORDS)
        for path in folder.rglob("*"):
            if path.is_file():
                os.utime(path, (0, 1_700_000_000 + number))
    (tmp_path / "other").mkdir()
    assert [os.path.basename(run.folder) for run in runs_in(tmp_path)] == ["b", "a\x1b[31m", "c"]
    assert main(["runs", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert [line.split()[0] for line in lines] == ["b", "a\\x1b[31m", "c"]
    assert "finished  20/20  1.0000  0.5000 (10)" in lines[0]
    assert main(["runs", str(tmp_path / "b")]) == 0
    assert str(tmp_path / "b") in capsys.readouterr().out
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [run["state"] for run in json.loads(capsys.readouterr().out)] == ["finished"] * 3


def test_no_runs_and_no_folder(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0 and capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "No such file or directory; give the folder that --save of the runs named" in capsys.readouterr().err

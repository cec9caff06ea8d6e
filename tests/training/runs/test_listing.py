"""`sat-lora runs`: what run folders have come to, whatever state they are in."""

import json
import os
import subprocess
import sys

import pytest

from sat_lora.cli import main
from sat_lora.training.runs.listing import read_run, runs_in
from sat_lora.training.runs.lock_holder import Holder


def run_folder(root, name="mine", *, steps=20, records=(), evaluation=None, **more):
    folder = root / name
    (folder / "adapter" / "20").mkdir(parents=True)
    (folder / "adapter" / "latest").write_text("20\n")
    settings = {"train_iters": steps, "from_pretrained": "/bases/cogvlm", **more}
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


VALUES = (0.5, 0.75, 0.75, 0.25)  # of four validations; the loss is best at the last


def judged(key) -> list[dict]:
    """Lines of a run that measured the same numbers under the name `key` as well, its losses falling."""
    return [{"step": step, "valid_loss": 5 - step, key: value} for step, value in enumerate(VALUES, start=1)]


@pytest.mark.parametrize(
    "metric, key, best_step",
    [
        ("loss", "valid_token_accuracy", 4),
        ("token_accuracy", "valid_token_accuracy", 2),  # the first of equals
        ("exact-match", "valid_exact-match", 2),
        ("EXACT_MATCH", "valid_exact-match", 2),
        ("cider", "valid_cider", 2),
        ("perplexity", "valid_perplexity", 4),
        ("a_metric_of_some_code", "valid_a_metric_of_some_code", 2),
        ("mine.py:score", "valid_mine.py:score", None),  # whether less is better the code says
        ("exact-match", "valid_cider", None),
    ],
)
def test_the_best_is_that_of_the_metric(metric, key, best_step, tmp_path, capsys):
    folder = run_folder(tmp_path, records=judged(key), metric=metric)
    run = read_run(folder)
    best = None if best_step is None else (5 - best_step if metric == "loss" else VALUES[best_step - 1])
    assert (run.metric, run.best_step, run.best_value) == (metric, best_step, best)
    assert run.valid_loss == (None if best_step is None else 5 - best_step)
    assert main(["runs", str(tmp_path)]) == 0
    shown = "" if best is None else f"{'' if metric == 'loss' else metric + ' '}{best:.4f} ({best_step})"
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    "metric, key", [("mine.py:score", "valid_mine.py:score"), ("exact-match", "valid_exact-match")]
)
def test_the_best_is_the_one_that_the_run_has_saved_as_best(metric, key, tmp_path, capsys):
    """Of the user's metric nothing else says which; and a run that went on with other data has begun anew."""
    folder = run_folder(tmp_path, records=judged(key), metric=metric)
    for step, expected in ((4, (4, 0.25, 1)), (3, (3, 0.75, 2)), (9, None)):
        (folder / "adapter" / str(step)).mkdir()
        (folder / "adapter" / "best").write_text(f"{step}\n")
        run = read_run(folder)
        if expected is not None:
            assert (run.best_step, run.best_value, run.valid_loss) == expected
            assert main(["runs", str(tmp_path)]) == 0
            assert f"  {metric.rpartition(':')[2]} {expected[1]:.4f} ({step})  " in capsys.readouterr().out


@pytest.mark.parametrize("metric", [None, 3, ["loss"], ""])
def test_a_metric_that_is_no_name(metric, tmp_path):
    assert read_run(run_folder(tmp_path, records=RECORDS, metric=metric)).state == "finished"


def figures(**values) -> dict:
    return {side: {"value": value, "low": 0.0, "high": 1.0} for side, value in values.items()}


@pytest.mark.parametrize(
    "metrics, name, value, shown",
    [
        ({"cider": figures(base=0.1, adapter=1.5), "exact-match": figures(adapter=0.9)}, "cider", 1.5, "cider 1.500"),
        ({"vqa-accuracy": figures(base=0.1, adapter=0.25)}, "vqa-accuracy", 0.25, "vqa-accuracy 25.0 %"),
        ({"a/b.py:score": figures(adapter=-3.0)}, "a/b.py:score", -3.0, "  score -3.000"),
        ({"bleu": figures(base=2.0)}, "bleu", 2.0, "bleu 2.000"),
        (None, "exact-match", 0.75, "exact-match 75.0 %"),
        ({}, "exact-match", 0.75, "exact-match 75.0 %"),
    ],
)
def test_of_an_evaluation_its_first_metric_is_shown(metrics, name, value, shown, tmp_path, capsys):
    scores = {"base": {"exact_match": 0.1}, "adapter": {"exact_match": 0.75}}
    scores |= {} if metrics is None else {"metrics": metrics}
    run = read_run(run_folder(tmp_path, evaluation=scores))
    assert (run.score_metric, run.score, run.exact_match) == (name, value, 0.75)
    assert main(["runs", str(tmp_path)]) == 0 and shown in capsys.readouterr().out


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


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"adapter": 3}', '{"base": {"exact_match": "all"}}', "{}", '{"metrics": []}', '{"metrics": {"a": 3}}',
     '{"metrics": {"cider": {"adapter": {"value": NaN}}}}', '{"metrics": {"cider": {"mine": {"value": 1}}}}'],
)  # fmt: skip
def test_a_broken_evaluation_is_none(tmp_path, content):
    folder = run_folder(tmp_path)
    (folder / "evaluation.json").write_text(content)
    run = read_run(folder)
    assert (run.exact_match, run.score_metric, run.score) == (None, None, None)


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

"""Names of metrics, and code of the user's in their place."""

import importlib.util
import sys

import pytest

from sat_lora.errors import ConfigError
from sat_lora.training.early import metric_problems, validation_problems
from sat_lora.training.metrics import generated
from sat_lora.training.metrics.generated import GENERATED, load_metric, metric_problem, name_problem, settled_name
from sat_lora.training.metrics.scores import Answered
from tests.support.configs import config_of


def problems(**values):
    config = config_of(given=values, from_pretrained="base", train_data=["x"], **values)
    return [*metric_problems(config, trains=True), *validation_problems(config)]


@pytest.mark.parametrize("name", [*GENERATED, "Exact-Match", "exact_match", "normalized-match", "ROUGE_L", "f1"])
def test_metrics_are_known_by_their_names(name):
    assert name_problem(name) is None and settled_name(name) in GENERATED


@pytest.mark.parametrize(
    "name, near",
    [
        ("exact", "exact-match"),
        ("anl", "anls"),
        ("blue", "bleu"),
        ("VQA", "vqa-accuracy"),
        ("iou", "box-iou"),
        ("rouge-1", "rouge-l"),
        ("perplexty", "perplexity"),
        ("", None),
        ("acc\x1b[31m", None),
        ("准确率", None),
    ],
)
def test_others_are_answered_with_the_nearest(name, near):
    problem = name_problem(name)
    assert "wanted one of exact-match, " in problem and "\x1b" not in problem
    assert near is None or near in problem.partition("did you mean ")[2]


@pytest.mark.parametrize("name", [":f", "m:", "m:1f", "m:f()", "m:a b", ":"])
def test_what_looks_like_code_and_is_none(name):
    assert "wanted MODULE:FUNCTION or FILE.py:FUNCTION" in name_problem(name)


CODE = """
def length(prediction, answers):
    return len(prediction) - len(answers[0])

def wer(prediction, answers):
    return 0.5
wer.lower_is_better = True

def text(prediction, answers): return "0.5"
def nothing(prediction, answers): pass
def nan(prediction, answers): return float("nan")
def raises(prediction, answers): raise KeyError("\\x1b[31m")
def one(prediction): return 1
def lists(prediction, answers): return [1, 2]
def exits(prediction, answers): raise SystemExit(0)
number = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(CODE)
    (tmp_path / "broken_metrics.py").write_text("def f(:\n")
    (tmp_path / "needs_metrics.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "exits.py").write_text("exit()")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_metrics", "broken_metrics", "needs_metrics"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("home", ["own_metrics", "own_metrics.py", "./own_metrics.py"])
def test_a_function_of_the_users_is_a_metric(folder, home):
    before = [*sys.path]
    measured = load_metric(f"{home}:length").measure(Answered(["abc", "a"], [["a"], ["a"]]))
    assert measured.samples == [2, 0] and measured.value == 1
    assert load_metric(f"{home}:wer").lower_is_better and not load_metric(f"{home}:length").lower_is_better
    assert sys.path == before


@pytest.mark.parametrize(
    "name, reason",
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        ("no_such_file.py:f", "FileNotFoundError"),
        ("own_metrics:no_such_function", "AttributeError"),
        ("broken_metrics:f", "SyntaxError"),
        ("needs_metrics:f", "a_package_that_is_not_there"),
        ("own_metrics:number", "is int and no function"),
        ("own_metrics:text", "gave '0.5'; wanted a finite number"),
        ("own_metrics:nothing", "wanted a number"),
        ("own_metrics:nan", "gave nan; wanted a finite number"),
        ("own_metrics:raises", "KeyError"),
        ("own_metrics:one", "TypeError"),
        ("own_metrics:lists", "wanted a number"),
        ("own_metrics:exits", "SystemExit"),
        ("exits.py:f", "SystemExit"),
        (".own_metrics:length", "TypeError"),
    ],
)
def test_code_that_is_no_metric_is_one_sentence(folder, name, reason):
    problem = metric_problem(name)
    assert reason in problem and "\n" not in problem and "\x1b" not in problem
    with pytest.raises(ConfigError):
        load_metric(name)


def test_a_metric_without_its_package_is_said(monkeypatch):
    monkeypatch.setattr(generated.importlib.util, "find_spec", lambda name: None)
    for name, package in (("anls", "rapidfuzz"), ("BLEU", "sacrebleu"), ("rouge-l", "rouge-score")):
        assert metric_problem(name) == f"{name} needs the package {package}: pip install 'sat_lora[metrics]'"
    assert metric_problem("exact-match") is None
    assert importlib.util.find_spec is generated.importlib.util.find_spec


def test_no_file_names_code(folder):
    """A run.json or a --config file of others would run it."""
    config = config_of(from_pretrained="base", metrics=["own_metrics:length"])
    (problem,) = metric_problems(config, trains=False)
    assert "names code, which no file may; give it as an option" in problem
    assert not [*metric_problems(config_of(given=["metrics"], metrics=["own_metrics:length"]), trains=False)]


VALID = dict(valid_data=["v"])


@pytest.mark.parametrize(
    "values, expected",
    [
        (dict(early_stopping=3), ["--early-stopping: there is no validation data; give --valid-data"]),
        (dict(eval_samples=3), ["--eval-samples: there is no validation data"]),
        (dict(metric="token_accuracy", early_stopping=1), ["--metric, --early-stopping: there is no validation data"]),
        (dict(early_stopping=3, split=[0.9, 0.1]), []),
        (dict(early_stopping=3, split=[0.9, 0.0, 0.1]), ["--early-stopping: there is no validation data"]),
        (
            dict(early_stopping=3, eval_interval=0, **VALID),
            ["--early-stopping: --eval-interval 0 validates at the end"],
        ),
        (dict(metric="exact-match", **VALID), ["--metric: exact-match is measured on answers; give --eval-samples N"]),
        (dict(metric="exact-match", eval_samples=4, **VALID), []),
        (dict(metric="answer_accuracy", **VALID), []),
        (dict(metric="los", **VALID), ["--metric: got 'los', wanted one of loss, token_accuracy"]),
        (dict(metrics=["exact-match", "cidr"], **VALID), ["--metrics: got 'cidr', wanted one of exact-match"]),
    ],
)
def test_options_on_validations_that_cannot_be_followed(values, expected):
    found = problems(**values)
    assert len(found) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(found, expected))


def test_wandb_is_there_and_knows_who_asks(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (message,) = problems(wandb="online")
    assert message == "--wandb: nobody is logged in here; run `wandb login`, or give --wandb offline"
    assert not problems(wandb="offline")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert not problems(wandb="online")
    (tmp_path / "netrc").write_text("machine")
    assert problems(wandb="online") == [message]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert not problems(wandb="online")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert problems(wandb="offline") == ["--wandb: needs the package wandb: pip install wandb"]

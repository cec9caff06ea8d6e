"""The file of predictions: what it holds, and that a terminal only shows it."""

import json
from pathlib import Path

import pytest

from sat_lora.data.answer_lists import is_predictions
from sat_lora.data.records.record import IMAGE
from sat_lora.data.samples import Item, read_items
from sat_lora.errors import DataError
from sat_lora.training.answers.prediction import (
    Prediction,
    lines_of,
    prediction_of,
    scores_of,
    shown_json,
)
from sat_lora.training.evaluation import predictions_file
from sat_lora.training.metrics.generated import load_metric
from tests.support.picture_files import write_images


def of(index, answer, **said):
    return Prediction(index=index, sample=f"{index}.png", prompt="?", references=(answer,), answers=said)


def test_each_line_has_the_answers_of_all_and_their_scores():
    predictions = [of(0, "cat", base="Cat", adapter="cat"), of(1, "dog", base="cow", adapter="DOG")]
    metrics = {name: load_metric(name) for name in ("exact-match", "exact-match-ignoring-case")}
    scores = scores_of(predictions, metrics)
    first, second = map(json.loads, lines_of(predictions, scores))
    assert first == {
        "sample": "0.png",
        "prompt": "?",
        "answer": "cat",
        "predictions": {"base": "Cat", "adapter": "cat"},
        "scores": {
            "base": {"exact-match": 0, "exact-match-ignoring-case": 1},
            "adapter": {"exact-match": 1, "exact-match-ignoring-case": 1},
        },
    }
    assert second["scores"]["adapter"] == {"exact-match": 0, "exact-match-ignoring-case": 1}
    assert scores["base"]["exact-match"].value == 0 and scores["adapter"]["exact-match"].value == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mred\x1b[0m",
        "a\nb\r\x00",
        "\u202egnp.exe",
        "\u2066x\u2069",
        "\u2028",
        "\udcff",
        "\x85\x9b",
        "\U000e0041",
    ],
)
def test_no_text_is_obeyed_and_each_comes_back(text):
    line = shown_json({text: [text]})
    assert line.isprintable() and json.loads(line) == {text: [text]}


def test_letters_of_any_script_stand_as_they_are():
    assert shown_json({"答案": "Straße 🐈"}) == '{"答案": "Straße 🐈"}'


@pytest.mark.parametrize(
    "item, sample, image, prompt",
    [
        (Item(Path("a/b.png"), "x"), "a/b.png", "a/b.png", "ask"),
        (Item(Path("a/b.png"), "x", "own", file=Path("d.jsonl"), line=3), "d.jsonl, line 3", "a/b.png", "own"),
        (Item(b"png", "x", "own", name="s.tar, 0001.png"), "s.tar, 0001.png", None, "own"),
        (Item(None, "x", "of text"), "sample 5", None, "of text"),
        (Item(Path("b.png"), "x", f"see {IMAGE} here"), "b.png", "b.png", "see <image> here"),
    ],
)
def test_a_sample_is_called_by_its_line_or_its_file(item, sample, image, prompt):
    prediction = prediction_of(item, 5, "ask", {"base": "y"}, {})
    assert (prediction.sample, prediction.image, prediction.prompt) == (sample, image, prompt)


def test_what_is_no_number_is_null():
    predictions = [of(0, "", base="a")]
    metrics = {"perplexity": load_metric("perplexity")}
    predictions = [Prediction(**{**vars(predictions[0]), "answer_losses": {"base": (0.0, 0)}})]
    (line,) = lines_of(predictions, scores_of(predictions, metrics))
    assert json.loads(line)["scores"] == {"base": {"perplexity": None}}


@pytest.mark.parametrize(
    "evaluation, predictions",
    [
        ("evaluation.json", "predictions.jsonl"),
        ("evaluation-2.json", "predictions-2.jsonl"),
        ("evaluation-cogvlm.json", "evaluation-cogvlm.predictions.jsonl"),
        ("result.json", "result.predictions.jsonl"),
        ("result", "result.predictions.jsonl"),
        ("a.b.json", "a.b.predictions.jsonl"),
        ("predictions.jsonl", "predictions.jsonl.predictions.jsonl"),
    ],
)
def test_the_file_lies_beside_the_evaluations(evaluation, predictions):
    assert predictions_file(Path("x") / evaluation) == Path("x") / predictions


def test_only_its_own_kind_is_replaced(tmp_path):
    file = tmp_path / "predictions.jsonl"
    for content, is_ours in (
        ("", True),
        ('{"sample": "a", "predictions": {}, "scores": {}}\n', True),
        ('{"image": "a.png", "answer": "7"}\n', False),
        ('{"sample": "a.png", "predictions": "7", "scores": 1}\n', False),
        ("[1]\n", False),
        ("free text\n", False),
    ):
        file.write_text(content)
        assert is_predictions(file) is is_ours


def test_predictions_beside_images_are_no_list_of_their_answers(tmp_path):
    """An evaluation that is written beside a folder of images does not stop the next run on it."""
    write_images(tmp_path / "images", [f"{n:03}.png" for n in range(5)])
    predictions = [Prediction(**{**vars(of(n, f"{n:03}", base="x")), "sample": f"images/{n:03}.png"}) for n in range(5)]
    scores = scores_of(predictions, {"exact-match": load_metric("exact-match")})
    lines = list(lines_of(predictions, scores))
    for name in ("predictions.jsonl", "evaluation-cogvlm.predictions.jsonl", "images/predictions.jsonl"):
        (tmp_path / name).write_text("".join(lines))
    assert len(read_items([tmp_path / "images"])) == 5
    (tmp_path / "labels.jsonl").write_text("".join(lines).replace("predictions", "labels"))
    with pytest.raises(DataError, match="laid out in another way"):
        read_items([tmp_path / "images"])

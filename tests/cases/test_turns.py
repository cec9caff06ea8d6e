"""Keys and tags in turns: what says nothing is passed over, weights are heeded, HTML stays a text."""

import json

import pytest

from sat_lora.data.reading import Reading, samples_of
from sat_lora.data.samples import read_items
from tests.support.datasets import dataset
from tests.support.layouts import roles
from tests.support.picture_files import write_images

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}


def record_of(value, **reading):
    (record,), _, _ = samples_of(value, Reading(**reading).records)
    return record


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": []},
        {"refusal": None, "function_call": None},
        {"weight": 1},
        {"weight": 1.0, "loss": True, "train": True, "training": True},
        {"name": "bob"},
        {"prefix": False, "audio": None, "annotations": []},
        {"reasoning_content": ""},
    ],
)
def test_what_says_nothing_of_a_turn_is_passed_over(more):
    record = record_of({"messages": [USER, {**REPLY, **more}], "tools": None})
    assert (record.prompt, record.answer, record.unlearnt) == ("q", "a", ())
    weights = {key: value for key, value in more.items() if key in ("weight", "loss")}
    assert record_of({"conversation": [{"human": "q", "assistant": "a", **weights}]}).answer == "a"
    assert record_of({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **more}]})


@pytest.mark.parametrize(
    "turns, keys",
    [
        ([USER, {**REPLY, "tool_calls": [{"id": 1}]}], ["tool_calls"]),
        ([{**USER, "mood": "glad"}, {**REPLY, "weight": 0.5, "loss": "x"}], ["mood", "weight", "loss"]),
        ([{"human": "q", "gpt": "a", "rating": 5}], ["rating"]),
        ([USER, {**REPLY, "weight": 0}], ["weight"]),
        ([{**USER, "image": "a.png"}, REPLY], ["image"]),
    ],
)
def test_ignored_keys_are_those_of_turns_too(turns, keys):
    record = record_of({"messages": turns}, ignore_keys=keys)
    assert (record.prompt, record.answer, record.unlearnt, record.images) == ("q", "a", (), ())


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}, {"training": 0}])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_an_answer_of_weight_nought_is_read_and_not_learnt(tokenizer, tmp_path, mark, system):
    turns = roles([("x?", "4"), ("y?", "7"), ("z?", "2")])
    turns[1] |= mark
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [*system, *turns]}))
    (item,) = read_items([path], ignore_keys=["system"])
    assert item.unlearnt == (0,)
    (tmp_path / "ours.jsonl").write_text(
        json.dumps({"prompt": "z?", "answer": "2", "history": [["x?", "4"], ["y?", "7"]], "unlearnt": [0]})
    )
    assert read_items([tmp_path / "ours.jsonl"]) == [item]
    sample = dataset([item], tokenizer, version="chat", max_length=200)[0]
    assert tokenizer.decode(sample.labels[sample.labels != -100]) == "7<eos>2<eos>"
    text = tokenizer.decode(sample.input_ids)
    assert text == "<bos> [INST] x? [/INST] 4 [INST] y? [/INST] 7 [INST] z? [/INST] 2<eos>"


@pytest.mark.parametrize(
    "text",
    [
        "What does <img>logo</img> mean in HTML?",
        "<img>alt text</img>",
        "Is <img>a.b</img> right?",
        "<img>1.5</img>",
        "<img>../..</img>",
    ],
)
def test_html_in_a_question_is_a_text(tmp_path, text):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{**USER, "content": text}, REPLY]}))
    (item,) = read_items([path])
    assert (item.prompt, item.images) == (text, ())


@pytest.mark.parametrize("name", ["a.png", "deep/a.JPEG", "a.webp", "no suffix"])
def test_a_tag_with_a_picture_names_it(tmp_path, name):
    write_images(tmp_path, ["x.png"])
    (tmp_path / "x.png").rename(tmp_path / "no suffix")
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{**USER, "content": f"<img>{name}</img>\n<img>x y</img>?"}, REPLY]}))
    (item,) = read_items([path])
    assert (item.prompt, item.images) == ("<img>x y</img>?", (tmp_path / name,))

"""Samples with a list of answers, as VQA has them: the commonest is learnt, and all of them are right."""

import json

import pytest

from sat_lora.data.samples import read_items
from sat_lora.errors import DataError
from sat_lora.training.answers.prediction import prediction_of
from tests.support.picture_files import write_images

QUESTION = {"image": "a.png", "question": "How many?"}


def items_of(tmp_path, *records, **reading):
    write_images(tmp_path, ["a.png"])
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({**QUESTION, **record}) + "\n" for record in records))
    return read_items([file], **reading)


@pytest.mark.parametrize(
    "record, answer, references",
    [
        ({"answers": ["two", "2", "2"]}, "2", ("two", "2", "2")),
        ({"answers": ["b", "a"]}, "b", ("b", "a")),  # the first of equals
        ({"answers": ["two"]}, "two", ("two",)),
        ({"answers": [{"answer": "2", "answer_id": 1}, {"answer": "3", "answer_id": 2}]}, "2", ("2", "3")),
        ({"answers": ["2", "3", "3"], "multiple_choice_answer": "2"}, "2", ("2", "3", "3")),
        ({"answers": ["2", "3"], "answer": "4"}, "4", ("2", "3")),
        ({"answers": "two"}, "two", ()),  # another name of the one answer
        ({"answer": "two"}, "two", ()),
    ],
)
def test_lists_of_answers(tmp_path, record, answer, references):
    (item,) = items_of(tmp_path, record)
    assert (item.prompt, item.answer, item.references) == ("How many?", answer, references)


@pytest.mark.parametrize("answers", [[], [1, 2], [["a"]], ["a", None], [{"text": "a"}], {"text": ["a"]}])
def test_lists_of_something_else_are_refused(tmp_path, answers):
    with pytest.raises(DataError, match="line 1"):
        items_of(tmp_path, {"answers": answers})


def test_the_list_may_be_passed_over(tmp_path):
    (item,) = items_of(tmp_path, {"answers": ["2", "3"], "answer": "4"}, ignore_keys=["answers"])
    assert (item.answer, item.references) == ("4", ())


def test_all_of_them_are_right_and_the_one_to_learn_stands_first(tmp_path):
    (item,) = items_of(tmp_path, {"answers": ["two", " 2", "2 "]})
    assert item.answer == "two"
    (other,) = items_of(tmp_path, {"answers": ["two", "2", "2"]})
    assert prediction_of(other, 0, "?", {"base": "x"}, {}).references == ("2", "2", "two")

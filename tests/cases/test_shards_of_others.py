"""Kinds 3 and 15: what is wrong with a sample of a shard is named; none loses its image; no range is endless."""

import json

import pytest

from sat_lora.data.samples import BrokenSample
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.data.shards.shard_names import MOST_SHARDS, expand_shards
from sat_lora.data.shards.shards import count_shards, find_records
from sat_lora.errors import DataError
from tests.support.tar_shards import png, write_shard

BOTH = json.dumps({"prompt": "q", "answer": "x"})


def read(path, *members):
    shard = write_shard(path / "s.tar", *members)
    return [record.read() for record in find_records(str(shard))]


def reason(path, *members) -> str:
    (broken,) = read(path, *members)
    assert isinstance(broken, BrokenSample)
    return broken.reason


@pytest.mark.parametrize(
    "value, words",
    [
        (7, '"answer" is the number 7, wanted a text in quotes'),
        (0.5, '"answer" is the number 0.5'),
        (True, '"answer" is true'),
        (["a", "b"], '"answer" is a list'),
        ({"text": "a"}, '"answer" is an object'),
        (None, '"answer" is null, and there is no .txt with one'),
    ],
)
def test_an_answer_of_another_type_is_named(tmp_path, value, words):
    message = reason(tmp_path, ("k.png", png()), ("k.json", json.dumps({"answer": value})))
    assert f"s.tar/k: its json: {words}" in message


@pytest.mark.parametrize("content", ["[1]", '"x"', "7", "null", "true"])
def test_a_json_that_is_no_object_is_named_though_a_text_lies_beside_it(tmp_path, content):
    assert "its json: wanted {" in reason(tmp_path, ("k.png", png()), ("k.json", content), ("k.txt", "x"))


def test_two_answers_have_to_be_one(tmp_path):
    message = reason(tmp_path, ("k.png", png()), ("k.json", '{"answer": "a cat"}'), ("k.txt", "a dog"))
    assert "its json has the answer 'a cat' and its .txt 'a dog'; leave one of them out, or make them equal" in message
    for fields in ({"answer": "a dog"}, {"answer": " a dog\n"}, {"answer": None, "prompt": "q"}, {"prompt": "q"}):
        (item,) = read(tmp_path, ("k.png", png()), ("k.json", json.dumps(fields)), ("k.txt", "a dog\n"))
        assert item.answer.strip() == "a dog"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_a_shard_are_read_in_the_encodings_of_files(tmp_path, encoding):
    (item,) = read(tmp_path, ("k.png", png()), ("k.txt", "猫é".encode(encoding)))
    assert item.answer == "猫é"
    (item,) = read(tmp_path, ("k.png", png()), ("k.json", '{"answer": "猫é"}'.encode(encoding)))
    assert item.answer == "猫é"


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_a_text_of_a_shard_in_another_encoding_is_named(tmp_path, kind):
    content = '{"answer": "caf\xe9 noir"}'.encode("latin-1")
    message = reason(tmp_path, ("k.png", png()), (f"k.{kind}", content))
    assert f".{kind} is not UTF-8: invalid continuation byte at byte 15; save it as UTF-8" in message


@pytest.mark.parametrize(
    "members",
    [
        [("a.b.png", png()), ("a.b.txt", "x")],
        [("photo.1.jpg", png()), ("photo.1.json", BOTH), ("photo.2.jpg", png()), ("photo.2.json", BOTH)],
        [("k.png", png()), ("k.en.txt", "x")],
    ],
)
def test_names_with_several_dots_are_explained(tmp_path, members):
    assert "a key ends at the first dot of a name, so rename members that have more" in reason(tmp_path, *members)


def test_dots_of_folders_are_no_ends_of_keys(tmp_path):
    assert [item.answer for item in read(tmp_path, ("v1.0/k.png", png()), ("v1.0/k.txt", "x"))] == ["x"]


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png", "a.txt", "b.txt"],
        ["a.json", "b.json", "a.png", "b.png"],
        ["b.txt", "a.png", "a.txt", "b.png"],
    ],
)
def test_an_image_and_a_text_that_lie_apart_are_an_error_before_the_run(tmp_path, names, single_process_group):
    content = {".png": png(), ".txt": "x", ".json": BOTH}
    shard = write_shard(tmp_path / "s.tar", *((name, content[name[1:]]) for name in names))
    words = "the image and the text of . lie apart, with others between them; write the shard sorted by name"
    with pytest.raises(DataError, match=words):
        count_shards([shard], data_parallel_rank=0, data_parallel_size=1)


def test_an_image_alone_is_told_of_the_order(tmp_path):
    message = reason(tmp_path, ("images/a.png", png()))
    assert "got .png; members of one key, its folder included, have to follow each other" in message


def test_texts_alone_may_have_one_name(tmp_path):
    assert len(read(tmp_path, ("a.json", BOTH), ("b.json", BOTH), ("a.json", BOTH))) == 3


@pytest.mark.parametrize(
    "path, words",
    [
        ("s-{0..99999999999}.tar", "means 100,000,000,000 shards, more than 1,000,000; mend the range"),
        ("s-{000000..999999}-{0..9}.tar", "means 10,000,000 shards"),
        ("s" + "{a,b}" * 60 + ".tar", "means more than 10^15 shards"),
        ("s-{{0..99999999},x}.tar", "means 100,000,001 shards"),
        ("s-{1.." + "9" * 5000 + "}.tar", "write shards as 'shards-{000..127}.tar'"),
        ("{" * 2000 + "a" + "}" * 2000 + ".tar", "braces within braces without end"),
        ("s-{0..9.tar", "Unbalanced braces"),
    ],
)
def test_no_range_of_shards_is_endless(path, words):
    with pytest.raises(DataError) as error:
        expand_shards([path])
    assert words in str(error.value) and len(str(error.value)) < 500
    (problem,) = problems_with_shards([path], "--train-data")
    assert problem == str(error.value)


@pytest.mark.parametrize(
    "path, count",
    [
        ("{0..9}-{a,b}.tar", 20), ("{00..10..5}.tar", 3), ("{5..1}.tar", 5), ("{a..e}.tar", 5), ("{-3..2}.tar", 6),
        ("{{a,b},{c,d{1..3}}}.tar", 6), ("{0..999999999..100000000}.tar", 10), ("a::b{0..2}.tar", 4), ("{,x}.tar", 2),
        (r"\{0..999999999999\}.tar", 1), (f"{{1..{MOST_SHARDS}}}.tar", MOST_SHARDS),
    ],
)  # fmt: skip
def test_ranges_are_taken_to_the_limit(path, count):
    assert len(expand_shards([path])) == count


def test_of_very_many_shards_that_are_missing_ten_are_named():
    (problem,) = problems_with_shards(["/nowhere/s-{00000..99999}.tar"], "--train-data")
    assert problem.startswith("100000 of 100000 shards are missing: /nowhere/s-00000.tar, ")
    assert "s-00009.tar and 99,990 more; mend the path" in problem and "00010" not in problem

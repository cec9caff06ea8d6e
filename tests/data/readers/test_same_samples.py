"""The same samples in every layout make the same tokens, labels, masks and pixels, byte for byte."""

import csv
import json
from pathlib import Path

import pytest
import torch

from sat_lora.data.reading import Reading
from sat_lora.data.samples import BrokenSample, Item, read_items
from sat_lora.data.shards.pack import pack_shards
from sat_lora.data.shards.shards import find_records
from sat_lora.errors import DataError
from tests.support.datasets import dataset
from tests.support.layouts import (
    COLUMNS,
    LAYOUTS,
    SEVERAL,
    SINGLE,
    SINGLE_ONLY,
    encoded,
    lines,
    pictures,
    roles,
    write_jsonl,
    write_pictures,
)
from tests.support.tar_shards import write_shard

FIELDS = ("input_ids", "position_ids", "labels", "image_embed_mask", "vision_expert_mask", "image")


def samples_of(path, tokenizer, prompt="?", **reading):
    if path.suffix == ".tar":
        options = Reading(**reading).records
        items = [record.read(options=options) for record in find_records(str(path))]
    else:
        items = read_items([path], **reading)
    data = dataset([item for item in items if isinstance(item, Item)], tokenizer, version="chat", max_length=200)
    data.prompt = prompt
    made = iter([data[number] for number in range(len(data))])
    return [next(made) if isinstance(item, Item) else item for item in items]


@pytest.mark.parametrize("layout", [*LAYOUTS, *SINGLE_ONLY])
@pytest.mark.parametrize("samples", [SINGLE, SEVERAL], ids=["single", "several"])
def test_every_layout_gives_the_same_samples(tmp_path, tokenizer, layout, samples):
    if layout in SINGLE_ONLY and samples is SEVERAL:
        samples = [(name, turns) for name, turns in SEVERAL if len(turns) == 1]
    write_pictures(tmp_path, samples)
    expected = samples_of(write_jsonl(tmp_path, samples), tokenizer)
    write = {**LAYOUTS, **SINGLE_ONLY}[layout]
    reading = {"columns": COLUMNS} if layout == "columns" else {}
    assert_the_same(samples_of(write(tmp_path, samples), tokenizer, **reading), expected)
    assert len(expected) == len(samples)


def assert_the_same(samples, others):
    assert len(samples) == len(others)
    for sample, other in zip(samples, others):
        for field in FIELDS:
            assert torch.equal(getattr(sample, field), getattr(other, field)), field
        pairs = zip(sample.more_images, other.more_images, strict=True)
        assert all(torch.equal(*pair) for pair in pairs) and sample.left_out == other.left_out == 0


@pytest.mark.parametrize("labelled", ["by name", "by captions", "by text beside them"])
def test_answers_to_one_prompt_give_the_same_samples(tmp_path, tokenizer, labelled):
    samples = [(answer, [("Read it", answer)]) for answer in ("7Kq2", "aB3d")]
    ours = tmp_path / "ours"
    path = tmp_path / "theirs" / "images"
    for folder in (ours, path):
        folder.mkdir(parents=True)
        write_pictures(folder, samples)
    expected = samples_of(write_jsonl(ours, samples), tokenizer)
    if labelled == "by captions":
        path = path.parent
        (path / "labels_en").mkdir()
        for name, turns in samples:
            content = {"captions": [{"role": "caption", "content": turns[0][1]}]}
            (path / "labels_en" / f"{name}.json").write_text(json.dumps(content))
    elif labelled == "by text beside them":
        members = [(f"{n}.{kind}", c) for n, t in samples for kind, c in (("png", pictures(samples)[n]), ("txt", n))]
        path = write_shard(tmp_path / "d.tar", *members)
    assert_the_same(samples_of(path, tokenizer, prompt="Read it"), expected)


def test_several_images_of_a_sample_are_the_same_in_each_layout(tmp_path, tokenizer):
    samples = [("a", [("Compare", "both")]), ("b", [])]
    write_pictures(tmp_path, samples)
    names = ["a.png", "b.png"]
    parts = [{"type": "image_url", "image_url": {"url": name}} for name in names]
    texts = [{"type": "text", "text": "These: "}, parts[0], {"type": "text", "text": " and "}, parts[1]]
    marked = "These: <image> and <image>"
    records = {
        "ours": {"image": names, "prompt": marked, "answer": "x"},
        "llava": {"image": names, "conversations": [{"from": "human", "value": marked}, {"from": "gpt", "value": "x"}]},
        "messages": {"messages": [{"role": "user", "content": marked}, {"role": "assistant", "content": "x"}]},
        "parts": {"messages": [{"role": "user", "content": texts}, {"role": "assistant", "content": "x"}]},
        "base64": {"images": [encoded(pictures(samples)[n[0]]) for n in names], "query": marked, "response": "x"},
        "pairs": {"images": names, "conversation": [[marked, "x"]]},
    }
    records["messages"]["images"] = names
    read = {
        name: samples_of(lines(tmp_path / f"{name}.jsonl", [record]), tokenizer, images_per_sample=2)
        for name, record in records.items()
    }
    assert len(read["ours"][0].more_images) == 1
    for others in read.values():
        assert_the_same(others, read["ours"])


@pytest.mark.parametrize("layout", [*LAYOUTS, *SINGLE_ONLY])
def test_an_empty_prompt_is_none_and_an_empty_answer_is_refused_in_each_layout(tmp_path, tokenizer, layout):
    write = {**LAYOUTS, **SINGLE_ONLY}[layout]
    reading = {"columns": COLUMNS} if layout == "columns" else {}
    samples = [("a", [("", "7Kq2")]), ("b", [("Say it", "x")])]
    write_pictures(tmp_path, samples)
    asked = write_jsonl(tmp_path, [("a", [("Read it", "7Kq2")]), samples[1]])
    expected = samples_of(asked, tokenizer, prompt="Read it")
    assert_the_same(samples_of(write(tmp_path, samples), tokenizer, prompt="Read it", **reading), expected)
    other = tmp_path / "other"
    other.mkdir()
    samples = [("b", [("Say it", "x")]), ("a", [("Read it", "")])]
    write_pictures(other, samples)
    path = write(other, samples)
    if layout == "tar":
        _, broken = [record.read() for record in find_records(str(path))]
        assert isinstance(broken, BrokenSample) and '"answer" is empty' in broken.reason
        return
    with pytest.raises(DataError, match="(line|row|object).* [23]|a.json: ") as error:
        read_items([path], **reading)
    assert '"answer" is missing' in str(error.value) or '"answer" is empty' in str(error.value)


TWO = [("a?", "4"), ("b?", "7")]
RECORDS = {
    "answers of several": {"question": "How many?", "answers": ["two", "2", "2"]},
    "answers as objects": {"question": "How many?", "answers": [{"answer": "2"}, {"answer": "3"}]},
    "one of several": {"question": "How many?", "answers": ["two", "2"], "multiple_choice_answer": "two"},
    "boxes": {
        "prompt": "Where is <box>?",
        "answer": "<box>",
        "boxes": [[0, 0, 7, 7], [[7, 7, 14, 21], [0, 0, 21, 21]]],
    },
    "shares": {"prompt": "Where?", "answer": "At <box>", "boxes": [[0.1, 0.1, 0.5, 0.5]]},
    "empty prompt": {"prompt": " ", "answer": "x"},
    "no prompt": {"answer": "x", "system": ""},
    "empty and another": {"prompt": "", "question": "What?", "answer": "x", "tools": None},
    "unlearnt": {"prompt": "c?", "answer": "2", "history": [["a?", "4"], ["b?", "7"]], "unlearnt": [1]},
    "weights": {"messages": [{**turn, "weight": weight} for turn, weight in zip(roles(TWO), (0, 0, 1, 1))]},
    "text in a cell": {"messages": json.dumps(roles(TWO))},
    "lists in an object": {"conversations": {"from": ["human", "gpt"], "value": ["a?", "4"]}},
}


LISTS = ("answers of several", "answers as objects", "boxes", "shares", "unlearnt")


@pytest.mark.parametrize("name", LISTS)
def test_a_cell_of_a_table_holds_lists_as_json(tmp_path, tokenizer, name):
    write_pictures(tmp_path, [("a", [])])
    record = {**RECORDS[name], "image": "a.png"}
    expected = samples_of(lines(tmp_path / "d.jsonl", [record]), tokenizer)
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([cells.keys(), cells.values()])
    assert_the_same(samples_of(tmp_path / "d.csv", tokenizer), expected)
    items = [read_items([tmp_path / file])[0] for file in ("d.csv", "d.jsonl")]
    assert items[0].references == items[1].references


def test_several_images_may_be_json_in_a_cell_and_a_text_stays_one(tmp_path, tokenizer):
    write_pictures(tmp_path, [("a", []), ("b", [])])
    record = {"prompt": "<image><image>Same?", "answer": "[1, 2]", "images": ["a.png", "b.png"]}
    expected = samples_of(lines(tmp_path / "d.jsonl", [record]), tokenizer, images_per_sample=2)
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([record.keys(), [*list(record.values())[:2], json.dumps(record["images"])]])
    assert_the_same(samples_of(tmp_path / "d.csv", tokenizer, images_per_sample=2), expected)


@pytest.mark.parametrize("name", RECORDS)
def test_a_shard_is_read_by_the_rules_of_files_byte_for_byte(tmp_path, tokenizer, name):
    record = RECORDS[name]
    write_pictures(tmp_path, [("a", [])])
    named = {"image": "a.png"}
    if "messages" in record or "conversations" in record:
        named = {"images": ["a.png"]}
    path = lines(tmp_path / "d.jsonl", [{**record, **named}])
    reading = {"image_mark": ""} if "images" in named else {}
    expected = samples_of(path, tokenizer, **reading)
    content = pictures([("a", [])])["a"]
    shard = write_shard(tmp_path / "d.tar", ("a.png", content), ("a.json", json.dumps(record)))
    assert_the_same(samples_of(shard, tokenizer), expected)
    (item,) = read_items([path], **reading)
    (sample,) = [r.read() for r in find_records(str(shard))]
    assert (item.references, item.prompt, item.answer) == (sample.references, sample.prompt, sample.answer)
    pattern, _ = pack_shards([path], tmp_path / "packed", **reading)
    assert_the_same(samples_of(Path(pattern), tokenizer), expected)
    (packed,) = [r.read() for r in find_records(pattern)]
    assert (packed.references, packed.unlearnt) == (item.references, item.unlearnt)


@pytest.mark.parametrize("text", ["<image><image>\nSame?", "This: <image>, or\n<image>\n?", "Same?", ""])
def test_several_images_of_a_shard_are_those_of_a_file(tmp_path, tokenizer, text):
    samples = [("a", []), ("b", [])]
    write_pictures(tmp_path, samples)
    content = pictures(samples)
    turns = [] if text in ("Same?", "") else [["<image>first?", "yes"]]
    record = {"prompt": text, "answer": "no", "history": turns}
    names = ["a.png", "b.png", "a.png"][: 2 + len(turns)]
    path = lines(tmp_path / "d.jsonl", [{**record, "image": names}])
    expected = samples_of(path, tokenizer, images_per_sample=3)
    members = [(f"k.{n}.png", content[name[0]]) for n, name in enumerate(names, 1)]
    shard = write_shard(tmp_path / "d.tar", *members[::-1], ("k.json", json.dumps(record)))
    assert_the_same(samples_of(shard, tokenizer, images_per_sample=3), expected)
    pattern, _ = pack_shards([path], tmp_path / "packed", images_per_sample=3)
    assert_the_same(samples_of(Path(pattern), tokenizer, images_per_sample=3), expected)
    (broken,) = samples_of(shard, tokenizer)
    assert f"{len(names)} images, and the base takes one" in broken.reason


def test_what_the_others_are_compared_with_is_what_was_written(tmp_path, tokenizer):
    write_pictures(tmp_path, SEVERAL)
    talk, single = samples_of(write_jsonl(tmp_path, SEVERAL), tokenizer)
    text = tokenizer.decode(talk.input_ids[talk.image_embed_mask == 0])
    turns = " [INST] How many? [/INST] 4 [INST] The first? [/INST] 7 [INST] Backwards? [/INST] 2qK7"
    assert text == f"<bos>{turns}<eos>" and talk.image_embed_mask[1:12].all()
    assert tokenizer.decode(talk.labels[talk.labels != -100]) == "4<eos>7<eos>2qK7<eos>"
    assert tokenizer.decode(single.labels[single.labels != -100]) == "a dog<eos>"

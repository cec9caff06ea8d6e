"""The same samples in every layout make the same tokens, labels, masks and pixels, byte for byte."""

import json

import pytest
import torch

from sat_lora.data.samples import read_items
from sat_lora.data.shards.shards import find_records
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
    write_jsonl,
    write_pictures,
)
from tests.support.tar_shards import write_shard

FIELDS = ("input_ids", "position_ids", "labels", "image_embed_mask", "vision_expert_mask", "image")


def samples_of(path, tokenizer, prompt="?", **reading):
    items = read_items([path], **reading) if path.suffix != ".tar" else [r.read() for r in find_records(str(path))]
    data = dataset(items, tokenizer, version="chat", max_length=200, prompt=prompt)
    return [data[number] for number in range(len(items))]


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


def test_what_the_others_are_compared_with_is_what_was_written(tmp_path, tokenizer):
    write_pictures(tmp_path, SEVERAL)
    talk, single = samples_of(write_jsonl(tmp_path, SEVERAL), tokenizer)
    text = tokenizer.decode(talk.input_ids[talk.image_embed_mask == 0])
    turns = " [INST] How many? [/INST] 4 [INST] The first? [/INST] 7 [INST] Backwards? [/INST] 2qK7"
    assert text == f"<bos>{turns}<eos>" and talk.image_embed_mask[1:12].all()
    assert tokenizer.decode(talk.labels[talk.labels != -100]) == "4<eos>7<eos>2qK7<eos>"
    assert tokenizer.decode(single.labels[single.labels != -100]) == "a dog<eos>"

"""The same samples in every layout make the same tokens, labels, masks and pixels, byte for byte."""

import pytest
import torch

from sat_lora.data.samples import read_items
from sat_lora.data.shards.shards import find_records
from tests.support.datasets import dataset
from tests.support.layouts import LAYOUTS, SEVERAL, SINGLE, SINGLE_ONLY, write_jsonl, write_pictures

FIELDS = ("input_ids", "position_ids", "labels", "image_embed_mask", "vision_expert_mask", "image")


def samples_of(path, tokenizer):
    items = [record.read() for record in find_records(str(path))] if path.suffix == ".tar" else read_items([path])
    data = dataset(items, tokenizer, version="chat", max_length=200)
    return [data[number] for number in range(len(items))]


@pytest.mark.parametrize("layout", [*LAYOUTS, *SINGLE_ONLY])
@pytest.mark.parametrize("samples", [SINGLE, SEVERAL], ids=["single", "several"])
def test_every_layout_gives_the_same_samples(tmp_path, tokenizer, layout, samples):
    if layout in SINGLE_ONLY and samples is SEVERAL:
        samples = [(name, turns) for name, turns in SEVERAL if len(turns) == 1]
    write_pictures(tmp_path, samples)
    expected = samples_of(write_jsonl(tmp_path, samples), tokenizer)
    write = {**LAYOUTS, **SINGLE_ONLY}[layout]
    got = samples_of(write(tmp_path, samples), tokenizer)
    assert len(got) == len(expected) == len(samples)
    for sample, other in zip(got, expected):
        for field in FIELDS:
            assert torch.equal(getattr(sample, field), getattr(other, field)), field
        assert sample.left_out == other.left_out == 0


def test_what_the_others_are_compared_with_is_what_was_written(tmp_path, tokenizer):
    write_pictures(tmp_path, SEVERAL)
    talk, single = samples_of(write_jsonl(tmp_path, SEVERAL), tokenizer)
    text = tokenizer.decode(talk.input_ids[talk.image_embed_mask == 0])
    turns = " [INST] How many? [/INST] 4 [INST] The first? [/INST] 7 [INST] Backwards? [/INST] 2qK7"
    assert text == f"<bos>{turns}<eos>" and talk.image_embed_mask[1:12].all()
    assert tokenizer.decode(talk.labels[talk.labels != -100]) == "4<eos>7<eos>2qK7<eos>"
    assert tokenizer.decode(single.labels[single.labels != -100]) == "a dog<eos>"

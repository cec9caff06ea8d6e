import json

import pytest
import torch
from PIL import Image

from sat_lora.data.samples import (
    BrokenSample,
    Item,
    collate,
    find_images,
    read_items,
    split_items,
)
from sat_lora.errors import DataError
from tests.support.datasets import dataset

SIZE = (21, 21)
FIELDS = ("input_ids", "position_ids", "labels", "image_embed_mask", "vision_expert_mask")


def test_images_are_found_by_suffix_at_any_depth_in_a_fixed_order(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", "notes.txt", "d.jpeg.bak", "e.bmp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path, tmp_path / "deep"])]
    assert names == ["a.jpg", "b.PNG", "deep/er/c.webp", "e.bmp"]


@pytest.mark.parametrize("with_image", [True, False])
def test_a_prompt_with_the_mark_of_an_image_in_it_is_a_text(image_folder, tokenizer, with_image):
    image = image_folder / "000.png" if with_image else None
    sample = dataset([Item(image, "1", "a<EOI>?")], tokenizer)[0]
    assert sample.image_embed_mask.sum() == (11 if with_image else 0)
    assert tokenizer.decode(sample.input_ids[~sample.image_embed_mask.bool()]) == "<bos>a<EOI>?1<eos>"


@pytest.mark.parametrize("with_image", [True, False])
def test_where_special_tokens_are_read_in_texts_the_mark_of_an_image_makes_a_broken_sample(
    image_folder, tokenizer, with_image
):
    """Its places would not fit its images: one rank would fail in the forward pass and leave the others waiting."""
    image = image_folder / "000.png" if with_image else None
    item = Item(image, "1", "what is <EOI>?" if with_image else "<EOI><EOI>?")
    sample = dataset([item], tokenizer, special_tokens=True)[0]
    assert isinstance(sample, BrokenSample) and "holds <EOI>, the mark of the image" in sample.reason


def test_a_batch_tells_the_length_of_each_row(image_folder, tokenizer):
    items = [Item(image_folder / "000.png", "1"), Item(None, "4", "2+2?")]
    batch = collate([dataset(items, tokenizer)[i] for i in range(2)], image_size=SIZE)
    assert batch["lengths"].tolist() == [1 + 11 + 2 + 1 + 1, 1 + 4 + 1 + 1]
    assert batch["input_ids"].shape == (2, 16)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        find_images([tmp_path / "nowhere"])


def test_the_stem_of_an_image_is_its_answer(image_folder):
    assert [item.answer for item in read_items([image_folder])] == ["000", "001", "002", "003", "004", "005"]


def test_a_jsonl_file_gives_images_relative_to_itself_and_text_only_items(tmp_path):
    lines = [{"image": "a/x.png", "answer": "1"}, {"prompt": "2+2?", "answer": "4"}]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    items = read_items([tmp_path / "data.jsonl"])
    assert items == [Item(tmp_path / "a/x.png", "1", None), Item(None, "4", "2+2?")]


def test_every_wrong_line_of_a_jsonl_file_is_named(tmp_path):
    lines = ['{"image": "x.png", "answer": "1"}', "{", '{"image": "x.png"}', '{"answer": "1"}', "[]"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="data.jsonl: 4 lines cannot be used") as error:
        read_items([tmp_path / "data.jsonl"])
    assert all(f"line {number}" in str(error.value) for number in (2, 3, 4, 5))


def test_a_split_is_seeded_and_complete():
    items = list(range(100))
    train, valid, test = split_items(items, [8, 1, 1], seed=3)
    assert [len(part) for part in (train, valid, test)] == [80, 10, 10]
    assert sorted(train + valid + test) == items
    assert split_items(items, [8, 1, 1], seed=3) == (train, valid, test)
    assert split_items(items, [8, 1, 1], seed=4)[0] != train


def test_a_split_of_one_share_trains_on_everything():
    train, valid, test = split_items(range(5), [1.0], seed=0)
    assert (len(train), valid, test) == (5, [], [])


@pytest.mark.parametrize(("count", "sizes"), [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1])])
def test_a_tiny_split_serves_training_first(count, sizes):
    assert [len(part) for part in split_items(range(count), [1000, 1, 1], seed=0)] == sizes


def test_a_sample_is_image_prompt_and_file_stem(tokenizer, image_folder):
    sample = dataset(read_items([image_folder]), tokenizer)[4]
    learned = sample.input_ids[sample.labels != -100]
    assert tokenizer.decode(learned) == "004<eos>"
    assert sample.image_embed_mask.sum() == 11 and sample.vision_expert_mask.sum() == 10
    assert sample.image.shape == (3, *SIZE)


def test_paths_serve_as_items(tokenizer, image_folder):
    sample = dataset(find_images([image_folder]), tokenizer)[4]
    assert torch.equal(sample.input_ids, dataset(read_items([image_folder]), tokenizer)[4].input_ids)


def test_a_text_only_sample_has_the_prompt_without_its_image(tokenizer):
    sample = dataset([Item(None, "4", "2+2?")], tokenizer, version="vqa")[0]
    assert tokenizer.decode(sample.input_ids) == "<bos>Question: 2+2? Short answer:4<eos>"
    assert sample.image is None and not sample.image_embed_mask.any()


def test_without_the_answer_a_sample_ends_with_the_prompt(tokenizer, image_folder):
    sample = dataset(read_items([image_folder]), tokenizer, with_answer=False)[0]
    assert tokenizer.decode(sample.input_ids[-2:]) == "Q:"
    assert (sample.labels == -100).all()


def test_what_cannot_be_used_is_returned_not_raised(tokenizer, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (50, 50)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    items = [Item(tmp_path / name, "1") for name in ("text.png", "cut.png", "missing.png")]
    for item, sample in zip(items, dataset(items, tokenizer), strict=False):
        assert isinstance(sample, BrokenSample)
        assert sample.path == str(item.image) and "cannot be read as an image" in sample.reason
    long = dataset([Item(None, "1", "x" * 50)], tokenizer)[0]
    assert "--max_length: 40 is too short" in long.reason and long.path == "text-only item 0"


def test_a_batch_is_padded_on_the_right(tokenizer, image_folder):
    items = [Item(None, "4", "2+2?"), Item(image_folder / "000.png", "000")]
    short, long = samples = [dataset(items, tokenizer)[number] for number in (0, 1)]
    batch = collate(samples, image_size=SIZE)
    used = len(short.input_ids)
    assert all(batch[field].shape == (2, len(long.input_ids)) for field in FIELDS)
    assert all(torch.equal(batch[field][0, :used], getattr(short, field)) for field in FIELDS)
    assert all(torch.equal(batch[field][1], getattr(long, field)) for field in FIELDS)
    assert not batch["input_ids"][0, used:].any() and (batch["labels"][0, used:] == -100).all()
    assert not batch["image_embed_mask"][0].any() and not batch["vision_expert_mask"][0].any()
    assert torch.equal(batch["position_ids"][0], torch.arange(len(long.input_ids)))
    assert torch.equal(batch["images"], long.image[None])


def test_images_come_in_the_order_of_their_places(tokenizer, image_folder):
    items = [Item(image_folder / "003.png", "3"), Item(None, "4", "2+2?"), Item(image_folder / "001.png", "1")]
    first, _, last = samples = [dataset(items, tokenizer)[number] for number in range(3)]
    batch = collate(samples, image_size=SIZE)
    assert torch.equal(batch["images"], torch.stack([first.image, last.image]))
    assert batch["image_embed_mask"].sum() == 2 * (9 + 2)


def test_a_text_only_batch_carries_no_images(tokenizer):
    batch = collate([dataset([Item(None, "4", "2+2?")], tokenizer)[0]], image_size=SIZE)
    assert batch["images"].shape == (0, 3, *SIZE) and batch["images"].dtype == torch.float32


def test_broken_samples_are_left_out_and_named(tokenizer, image_folder):
    whole = dataset(read_items([image_folder]), tokenizer)[0]
    batch = collate([BrokenSample("x.png", "torn"), whole], image_size=SIZE)
    assert batch["broken"] == [("x.png", "torn")] and batch["broken_samples"] == ["x.png"]
    assert torch.equal(batch["input_ids"], whole.input_ids[None])


@pytest.mark.parametrize("samples", [[], [BrokenSample("x.png", "torn"), BrokenSample("y.png", "torn")]])
def test_a_batch_without_a_usable_sample_teaches_nothing(samples):
    batch = collate(samples, image_size=SIZE)
    assert len(batch["broken"]) == len(samples)
    assert all(batch[field].shape == (1, 2) for field in FIELDS)
    assert (batch["labels"] == -100).all() and not batch["image_embed_mask"].any()
    assert batch["images"].shape == (0, 3, *SIZE)

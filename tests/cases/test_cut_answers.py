"""Kind 6: cut answers are counted, said, and not closed with EOS; a huge one costs what is kept of it."""

import json
import time

import pytest
import torch

from sat_lora.cogvlm.inputs import tokens
from sat_lora.cogvlm.inputs.text import build_sample
from sat_lora.cogvlm.inputs.tokens import first_tokens, text_tokens
from sat_lora.data.answer_lengths import CutAnswers, answer_lengths
from sat_lora.data.samples import BrokenSample, ImageTextDataset, Item, collate, read_items
from sat_lora.errors import ConfigError, DataError
from tests.support.sentence_pieces import sentence_piece_tokenizer

EOS = 2


@pytest.fixture
def dataset(tokenizer):
    def dataset(*answers, max_length=30, **settings):
        common = dict(version="base", prompt="Q:", image_size=(21, 21), image_length=9, max_length=max_length)
        items = [Item(None, answer, "q") for answer in answers]
        return ImageTextDataset(items, tokenizer, **{**common, **settings})

    return dataset


@pytest.mark.parametrize("length", [26, 27, 28, 29, 100, 70_000])
def test_only_a_whole_answer_ends(dataset, length):
    sample = dataset("x" * length)[0]
    fits = 1 + 1 + length + 1 <= 30
    assert (sample.input_ids[-1] == EOS) == fits == (sample.labels[-1] == EOS)
    assert len(sample.input_ids) == min(30, length + 3)
    assert len(sample.input_ids) + sample.left_out == length + 3


def test_cut_answers_are_counted_with_what_would_hold_them(dataset):
    lengths = answer_lengths(dataset("x" * 27, "x" * 28, "x" * 500, "猫" * 20, "猫" * 40))
    assert (lengths.looked_at, lengths.cut, lengths.longest) == (5, 3, 503)
    sentence = lengths.sentence(30)
    assert sentence == "3 of 5 answers are cut by --max_length 30; 503 would hold them"
    again = answer_lengths(dataset("x" * 27, "x" * 28, "x" * 500, "猫" * 20, "猫" * 40, max_length=503))
    assert again.cut == 0 and again.sentence(503) is None


def test_short_answers_are_not_tokenised_to_be_counted(dataset, monkeypatch):
    data = dataset(*["x" * 20] * 50)
    monkeypatch.setattr(ImageTextDataset, "lay_out", lambda *_: pytest.fail("laid out"))
    assert answer_lengths(data).cut == 0


def test_of_very_many_long_answers_a_part_is_looked_at(dataset, monkeypatch):
    monkeypatch.setattr("sat_lora.data.answer_lengths.LAID_OUT", 10)
    lengths = answer_lengths(dataset(*["x" * 50] * 95))
    assert lengths.looked_at == lengths.cut and 5 <= lengths.looked_at <= 10
    assert f"{lengths.cut} of {lengths.cut} long answers are cut" in lengths.sentence(30)


def test_of_a_stream_the_first_batch_with_a_cut_answer_is_said_and_all_at_the_end(dataset, single_process_group):
    data, said = dataset("x", "x" * 28, "x" * 90, "x" * 95), []
    batches = [collate([data[number]], image_size=(21, 21)) for number in range(4)]
    stream = CutAnswers(batches, said.append, 30)
    seen = iter(stream)
    assert next(seen) is batches[0] and next(seen) is batches[1] and said == []
    assert [*seen] == batches[2:]
    assert said == ["--max_length 30: an answer does not fit and is cut, others may be; 31 would hold it"]
    stream.say_all()
    assert said[1:] == ["--max_length 30 has cut 3 of 4 answers that came; 98 would hold them"]


def test_what_cannot_be_laid_out_is_left_to_the_run(dataset):
    assert answer_lengths(dataset("\ud83d" * 40, "x" * 40)).cut == 1


@pytest.mark.parametrize("text", ["x", "a cat, ", "<eos>", "猫"])
def test_an_answer_of_fifty_megabytes_costs_what_is_kept(dataset, text, monkeypatch):
    answer = text * (50_000_000 // len(text.encode()))
    sizes = []
    encode = tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda t, x, *a, **k: sizes.append(len(x)) or encode(t, x, *a, **k))
    started = time.monotonic()
    sample = dataset(answer, max_length=1288)[0]
    assert time.monotonic() - started < 20 and sum(sizes) < 1_000_000
    assert len(sample.input_ids) == 1288 and sample.left_out > 1_000_000
    assert sample.input_ids.tolist() == dataset(answer[:60_000], max_length=1288)[0].input_ids.tolist()


def test_a_prompt_of_fifty_megabytes_is_one_broken_sample(dataset):
    started = time.monotonic()
    (item,) = [Item(None, "x", "why? " * 10_000_000)]
    for with_answer in (True, False):
        sample = dataset("x", with_answer=with_answer).make_sample(item, "it")
        assert isinstance(sample, BrokenSample) and "--max_length: 30 is too short, this prompt alone" in sample.reason
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("text", ["a cat sat. ", "ab", "aab", " ", "猫", "</s>", "0123456789abcdef\n", "=" * 40 + "x"])
@pytest.mark.parametrize("count", [1, 17, 300])
def test_the_beginning_of_a_long_text_has_the_tokens_of_the_whole(monkeypatch, text, count):
    monkeypatch.setattr(tokens, "WHOLE", 400)
    tokenizer, text = sentence_piece_tokenizer(), text * (30_000 // len(text))
    whole = text_tokens(tokenizer, text)
    first, more = first_tokens(tokenizer, text, count)
    assert first == whole[:count]
    assert more == pytest.approx(len(whole) - count, rel=0.05)


def test_a_text_that_hardly_gives_tokens_is_no_hang(tokenizer):
    class Swallowing:
        all_special_ids, all_special_tokens, unk_token_id = [], [], None

        def encode(self, text, **settings):
            return [5]

    with pytest.raises(DataError, match="the answer of 9000000 characters has no 10 tokens in its first"):
        first_tokens(Swallowing(), "x" * 9_000_000, 10, False, "answer")


def test_a_prompt_is_never_cut(tokenizer):
    with pytest.raises(ConfigError, match="this prompt alone takes 51 tokens"):
        build_sample(tokenizer, "x" * 50, "y", 9, 20)
    assert len(build_sample(tokenizer, "x" * 50, None, 9, 20).input_ids) == 51


def test_a_cut_answer_from_a_file_is_cut_alike(tmp_path, tokenizer, dataset):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "q", "answer": "x" * 100}))
    (item,) = read_items([tmp_path / "data.jsonl"])
    assert torch.equal(dataset("x").make_sample(item).input_ids, dataset("x" * 100)[0].input_ids)

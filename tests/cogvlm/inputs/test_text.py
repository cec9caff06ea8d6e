"""Prompts and token sequences, written down by hand a second time."""

import pytest
import torch

from sat_lora import ConfigError
from sat_lora.cogvlm.inputs.text import build_sample, load_tokenizer, position_ids_for, prompt_for, shortest_length
from tests.support.character_tokenizer import write_character_tokenizer

L = 3  # patches per image
HISTORY = (("q1", "a1"), ("q2", "a2"))
BOS, EOS = 1, 2


def ids(text):
    """The tokenizer of these tests has one token per character: four special ones, then ASCII from the space on."""
    return [ord(character) - ord(" ") + 4 for character in text]


def lists(sample):
    fields = ("input_ids", "image_embed_mask", "vision_expert_mask", "position_ids", "labels")
    return {field: getattr(sample, field).tolist() for field in fields}


@pytest.mark.parametrize(
    ("version", "prompt"),
    [
        ("base", "<EOI>q"),
        ("chat", "<EOI> [INST] q [/INST] "),
        ("vqa", "<EOI>Question: q Short answer:"),
        ("chat_old", "<EOI>Question: q Answer:"),
    ],
)
def test_a_prompt_without_history(version, prompt):
    assert prompt_for(version, "q") == prompt


@pytest.mark.parametrize(
    ("version", "prompt"),
    [
        ("base", "<EOI>q"),
        ("chat", "<EOI> [INST] q1 [/INST] a1 [INST] q2 [/INST] a2 [INST] q [/INST] "),
        ("vqa", "<EOI>Question: q Short answer:"),
        ("chat_old", "<EOI>Question: q1 Answer: a1\nQuestion: q2 Answer: a2\nQuestion: q Answer:"),
    ],
)
def test_a_prompt_with_earlier_turns(version, prompt):
    assert prompt_for(version, "q", HISTORY) == prompt


def test_an_unknown_version_names_the_known_ones():
    with pytest.raises(ConfigError, match="--version: got 'chatt', wanted one of base, chat, vqa, chat_old"):
        prompt_for("chatt", "q")


def test_one_image_question_and_answer(tokenizer):
    sample = build_sample(tokenizer, "<EOI>Q:", "ab", L, 20)
    #                          BOS  boi  p  p  p  eoi  Q  :  a  b  EOS
    assert lists(sample) == {
        "input_ids": [BOS, 0, 0, 0, 0, 0, *ids("Q:"), *ids("ab"), EOS],
        "image_embed_mask": [0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        "vision_expert_mask": [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        "position_ids": [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8],
        "labels": [-100] * 8 + [*ids("ab"), EOS],
    }
    assert all(getattr(sample, field).dtype == torch.int64 for field in lists(sample))


def test_two_images_with_words_around_them(tokenizer):
    sample = build_sample(tokenizer, "x<EOI>y<EOI>", "z", L, 20)
    #                          BOS  x  boi  p  p  p  eoi  y  boi  p  p  p  eoi  z  EOS
    assert lists(sample) == {
        "input_ids": [BOS, *ids("x"), 0, 0, 0, 0, 0, *ids("y"), 0, 0, 0, 0, 0, *ids("z"), EOS],
        "image_embed_mask": [0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0],
        "vision_expert_mask": [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0],
        "position_ids": [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 7, 8, 9, 10],
        "labels": [-100] * 13 + [*ids("z"), EOS],
    }


def test_text_alone_counts_on(tokenizer):
    assert lists(build_sample(tokenizer, "2+2?", "4", L, 20)) == {
        "input_ids": [BOS, *ids("2+2?"), *ids("4"), EOS],
        "image_embed_mask": [0] * 7,
        "vision_expert_mask": [0] * 7,
        "position_ids": [0, 1, 2, 3, 4, 5, 6],
        "labels": [-100] * 5 + [*ids("4"), EOS],
    }


def test_without_an_answer_the_prompt_is_ready_for_generation(tokenizer):
    whole, prompt = build_sample(tokenizer, "<EOI>Q:", "ab", L, 20), build_sample(tokenizer, "<EOI>Q:", None, L, 20)
    assert set(prompt.labels.tolist()) == {-100}
    for field in ("input_ids", "image_embed_mask", "vision_expert_mask", "position_ids"):
        assert getattr(prompt, field).tolist() == getattr(whole, field).tolist()[:-3]


def test_masks_and_positions_follow_the_rules_of_one_sample(tokenizer):
    """The rules word for word: where e is an end-of-image token, and positions from the rope mask by its neighbours."""
    sample = build_sample(tokenizer, "ab<EOI>cd<EOI><EOI>e", "f", L, 64)
    ends, place = [], 0
    for part in ("ab", "cd", ""):
        place += len(part) + L + 2
        ends.append(place)  # BOS is 0
    embed, vision, rope = ([0] * len(sample.input_ids) for _ in range(3))
    for e in ends:
        embed[e - L - 1 : e + 1] = [1] * (L + 2)
        vision[e - L - 1 : e] = [1] * (L + 1)
        rope[e - L : e] = [1] * L
    position, positions = -1, []
    for place, marked in enumerate(rope):
        if marked == 0 or (place and rope[place - 1] != marked):
            position += 1
        positions.append(position)
    assert sample.image_embed_mask.tolist() == embed
    assert sample.vision_expert_mask.tolist() == vision
    assert sample.position_ids.tolist() == positions
    assert position_ids_for(torch.tensor(rope)).tolist() == positions


def test_a_sequence_that_begins_and_ends_with_patches_still_starts_at_zero():
    assert position_ids_for(torch.tensor([1, 1, 0, 1, 1])).tolist() == [0, 0, 1, 2, 2]


def test_a_long_answer_is_cut_and_does_not_end(tokenizer):
    """EOS behind a cut would teach to stop there."""
    sample = build_sample(tokenizer, "<EOI>Q:", "abcdef", L, 11)
    assert sample.input_ids.tolist()[8:] == ids("abc") and sample.left_out == 4
    assert sample.labels.tolist()[8:] == ids("abc")
    whole = build_sample(tokenizer, "<EOI>Q:", "ab", L, 11)
    assert whole.input_ids.tolist()[8:] == [*ids("ab"), EOS] and whole.left_out == 0
    without_end = build_sample(tokenizer, "<EOI>Q:", "abc", L, 11)
    assert without_end.input_ids.tolist()[8:] == ids("abc") and without_end.left_out == 1


@pytest.mark.parametrize("prompt", ["<EOI>Q:", "x<EOI>y<EOI>", "2+2?", ""])
def test_the_shortest_length_is_that_of_the_shortest_sample(tokenizer, prompt):
    shortest = shortest_length(tokenizer, prompt, L)
    assert len(build_sample(tokenizer, prompt, "a", L, 100).input_ids) == shortest
    assert len(build_sample(tokenizer, prompt, "abc", L, shortest).input_ids) == shortest
    with pytest.raises(ConfigError, match=f"--max_length: {shortest - 1} is too short, .* takes {shortest - 2} tokens"):
        build_sample(tokenizer, prompt, "a", L, shortest - 1)


def test_a_tokenizer_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--local_tokenizer: .*nowhere is neither a folder nor a name in"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"tokenizer_class": 3, "model": 3}'])
def test_a_broken_tokenizer_file_is_a_message_and_no_traceback(tmp_path, file, text):
    write_character_tokenizer(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match="--local_tokenizer: .* does not hold a tokenizer that loads: .*; give"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"does not hold a tokenizer that loads: [\s\S]*; give the folder that holds"):
        load_tokenizer(tmp_path)

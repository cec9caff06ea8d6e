"""Conversations of several turns, written down by hand a second time."""

import pytest

from sat_lora import ConfigError
from sat_lora.cogvlm.inputs.prompts import PROMPTS, WITHOUT_HISTORY, prompt_text, turn_texts
from sat_lora.cogvlm.inputs.text import build_sample

L = 3
BOS, EOS = 1, 2
EARLIER = [(("", "P:"), "ab"), ((";Q:",), "c")]


def ids(text):
    return [ord(character) - ord(" ") + 4 for character in text]


@pytest.mark.parametrize("version", sorted(PROMPTS.keys() - WITHOUT_HISTORY - {"vqa"}))
def test_the_texts_of_turns_and_their_answers_are_the_published_prompt(version):
    """Where a template puts a space before an answer, SentencePiece makes it of the answer's own beginning."""
    history = (("q1", "a1"), ("q2", "a2"))
    texts = turn_texts(version, ["q1", "q2", "q"])
    gap = " " if version == "chat_old" else ""
    joined = "".join(text + gap + answer for text, answer in zip(texts, ("a1", "a2")))
    assert joined + texts[-1] == prompt_text(version, "q", history)


def test_vqa_has_turns_as_hugging_face_s_code_has_them():
    first, second = turn_texts("vqa", ["q1", "q2"])
    assert (first, second) == ("Question: q1 Short answer:", "\nQuestion: q2 Short answer:")


def test_a_template_without_a_place_says_so():
    with pytest.raises(ConfigError, match="base has no place for the turns before the last .* give one of chat, vqa"):
        turn_texts("base", ["q1", "q2"])
    assert turn_texts("base", ["q"]) == ["q"]
    for version in PROMPTS:
        with pytest.raises(ConfigError, match=f"{version} has no place for a system text.*--ignore-keys system"):
            turn_texts(version, ["q"], "Be brief.")


def test_every_answer_is_learnt_and_ends_where_the_next_prompt_begins(tokenizer):
    sample = build_sample(tokenizer, (";R:",), "de", L, 50, earlier=EARLIER)
    image = [0] * (L + 2)
    assert sample.input_ids.tolist() == [BOS, *image, *ids("P:ab;Q:c;R:de"), EOS]
    no = -100
    learnt = [no, no, *ids("ab"), EOS, no, no, *ids("c"), EOS, no, no, *ids("de"), EOS]
    assert sample.labels.tolist() == [no] * (1 + L + 2) + learnt
    assert sample.image_embed_mask.tolist() == [0, *[1] * (L + 2), *[0] * 14]
    last = build_sample(tokenizer, (";R:",), "de", L, 50, earlier=EARLIER, learns_earlier=False)
    assert last.input_ids.tolist() == sample.input_ids.tolist()
    assert last.labels.tolist() == [no] * 17 + [*ids("de"), EOS]


def test_each_answer_has_the_tokens_and_labels_that_it_has_as_the_last(tokenizer):
    """What is learnt of a conversation is what its beginnings, each with its last answer alone, teach together."""
    turns = [*EARLIER, ((";R:",), "de")]
    whole = build_sample(tokenizer, *turns[-1], L, 50, earlier=turns[:-1])
    places = []
    for number, (prompt, answer) in enumerate(turns):
        part = build_sample(tokenizer, prompt, answer, L, 50, earlier=turns[:number], learns_earlier=False)
        size = len(part.input_ids) - 1
        assert part.input_ids.tolist()[:size] == whole.input_ids.tolist()[:size]
        own = (part.labels != -100).nonzero()[:, 0]
        assert whole.labels[own].tolist() == part.labels[own].tolist()
        places += own.tolist()
    assert places == (whole.labels != -100).nonzero()[:, 0].tolist()


def test_without_the_answer_all_turns_stand_before_the_question(tokenizer):
    whole = build_sample(tokenizer, (";R:",), "de", L, 50, earlier=EARLIER)
    asked = build_sample(tokenizer, (";R:",), None, L, 8, earlier=EARLIER)  # not cut: whoever generates sees to it
    assert asked.input_ids.tolist() == whole.input_ids.tolist()[:-3] and (asked.labels == -100).all()


@pytest.mark.parametrize("length", range(9, 22))
def test_a_conversation_that_does_not_fit_ends_with_the_last_turn_that_does(tokenizer, length):
    whole = build_sample(tokenizer, (";R:",), "de", L, 50, earlier=EARLIER)
    full = len(whole.input_ids)
    if length < 10:
        with pytest.raises(ConfigError, match="--max_length: 9 is too short, this prompt alone takes 8 tokens"):
            build_sample(tokenizer, (";R:",), "de", L, length, earlier=EARLIER)
        return
    sample = build_sample(tokenizer, (";R:",), "de", L, length, earlier=EARLIER)
    size = len(sample.input_ids)
    assert size <= length and size + sample.left_out == full
    ends = sample.input_ids.tolist()[-1] == EOS
    assert sample.input_ids.tolist()[: size - ends] == whole.input_ids.tolist()[: size - ends]
    learnt = (sample.labels != -100).tolist()
    assert sample.labels.tolist()[: size - ends] == whole.labels.tolist()[: size - ends] and learnt[-1]
    if length == 13:  # BOS, image, P:ab, and the next prompt with an answer of one token and EOS do not fit
        assert sample.labels.tolist()[-3:] == [*ids("ab"), EOS]


def test_an_empty_answer_teaches_to_end_at_once(tokenizer):
    sample = build_sample(tokenizer, (";Q:",), "", L, 50, earlier=[(("P:",), "")])
    assert sample.labels.tolist() == [-100, -100, -100, EOS, -100, -100, EOS]

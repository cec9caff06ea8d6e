"""A conversation says what greedy decoding of the same prompt says, whoever answers and whatever came before."""

import json
from functools import partial

import pytest
from PIL import Image

from sat_lora import AdapterError, ConfigError, DataError, load_adapter
from sat_lora.chat import Chat
from sat_lora.chat.session import Turn
from sat_lora.cogvlm import load_cogvlm
from sat_lora.cogvlm.inputs.image import load_image
from sat_lora.cogvlm.inputs.prompts import prompt_text
from sat_lora.cogvlm.inputs.text import build_sample, load_tokenizer
from sat_lora.data.samples import collate
from tests.support.decoding import without_cache

pytestmark = pytest.mark.usefixtures("single_process_group")
LENGTH = 12  # tokens of an answer


@pytest.fixture
def chat_of(base):
    """A function that begins a conversation."""
    return partial(begin, base)


@pytest.fixture
def greedy(base):
    """A function that answers without a conversation."""
    return partial(likeliest, base)


def begin(base, adapters=None, **settings) -> Chat:
    return Chat(load_cogvlm(base), adapters=adapters, **{"version": "chat", "max_new_tokens": LENGTH, **settings})


def likeliest(base, adapter, text: str, picture=None, length: int = LENGTH) -> str:
    """The likeliest tokens after a text, each from a whole pass over all before it, without a cache."""
    model, config = load_cogvlm(base)
    if adapter is not None:
        load_adapter(model, adapter)
    model.eval()
    tokenizer = load_tokenizer(base)
    image = None if picture is None else load_image(picture, tuple(config["eva_args"]["image_size"]))
    parts = (text,) if image is None else ("", text)
    sample = build_sample(tokenizer, parts, None, config["image_length"], 2048, image)
    batch = collate([sample], image_size=tuple(config["eva_args"]["image_size"]))
    tokens = without_cache(model, batch, length)[0]
    answer = tokens[: (*tokens, tokenizer.eos_token_id).index(tokenizer.eos_token_id)]
    return tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("version", ["chat", "base"])
def test_every_turn_is_greedy_decoding_of_the_prompt_with_the_turns_before(chat_of, greedy, adapters, picture, version):
    chat = chat_of({"mine": adapters["mine"]}, version=version)
    turns = ()
    for number, query in enumerate(("12 34", "what?", "and now 5")):
        answer = chat.ask(query, picture if number == 0 else None)
        assert answer == greedy(adapters["mine"], prompt_text(version, query, turns), picture)
        turns = (*turns, (query, answer.strip()))
    assert [(turn.query, turn.answer) for turn in chat.turns] == list(turns)
    assert chat.keeps_history == (version == "chat")


def test_who_answers_is_chosen_and_the_base_is_the_base(chat_of, greedy, adapters, picture):
    chat = chat_of(adapters)
    text = prompt_text("chat", "12 34")
    expected = {"base": greedy(None, text, picture)}
    expected |= {name: greedy(folder, text, picture) for name, folder in adapters.items()}
    assert len(set(expected.values())) == 3
    assert chat.speaker == "mine" and chat.adapters == ["mine", "other"]
    chat.show(picture)
    assert {name: "".join(pieces) for name, pieces in chat.compare("12 34")} == expected
    assert chat.speaker == "mine" and not chat.turns
    for name in ("other", "base", "mine"):
        chat.use(name)
        assert chat.ask("12 34", picture) == expected[name]
        assert chat.turns[-1].speaker == name == chat.speaker


def test_a_comparison_that_is_cut_leaves_the_speaker(chat_of, adapters, picture):
    chat = chat_of(adapters)
    comparison = chat.compare("12")
    name, pieces = next(comparison)
    next(pieces)
    assert name == chat.speaker == "base"
    comparison.close()
    assert chat.speaker == "mine"


def test_a_picture_of_any_kind_begins_anew(chat_of, greedy, adapters, picture):
    chat = chat_of({"mine": adapters["mine"]})
    by_path = chat.ask("12", picture)
    chat.ask("more")
    assert chat.ask("12", picture.read_bytes()) == by_path and len(chat.turns) == 1
    assert chat.ask("12", Image.open(picture)) == by_path and len(chat.turns) == 1
    chat.reset(keeps_image=True)
    assert chat.has_image and chat.ask("12") == by_path
    chat.reset()
    assert not chat.has_image and chat.ask("12") == greedy(adapters["mine"], prompt_text("chat", "12"))


def test_a_broken_picture_leaves_the_conversation_as_it_was(chat_of, adapters, picture, tmp_path):
    chat = chat_of({"mine": adapters["mine"]})
    chat.ask("12", picture)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be read as an image"):
        chat.ask("12", tmp_path / "x.png")
    assert len(chat.turns) == 1 and chat.has_image


def test_the_oldest_turns_give_way(chat_of, greedy, base, adapters):
    chat = chat_of({"mine": adapters["mine"]}, max_length=120)
    for number in range(6):
        chat.ask(f"question {number}")
    kept = tuple((turn.query, turn.answer) for turn in chat.turns[chat.left_out : -1])
    assert 0 < chat.left_out < 5
    assert chat.turns[-1].answer == greedy(adapters["mine"], prompt_text("chat", "question 5", kept)).strip()
    tokenizer = load_tokenizer(base)
    one_more = tuple((turn.query, turn.answer) for turn in chat.turns[chat.left_out - 1 : -1])
    lengths = [len(tokenizer(prompt_text("chat", "question 5", turns)).input_ids) for turns in (kept, one_more)]
    assert lengths[0] + LENGTH <= 120 < lengths[1] + LENGTH + 3
    with pytest.raises(
        DataError, match=r"the question takes \d+ tokens, and question and answer may have 120 together"
    ):
        chat.ask("x" * 130)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 100])
@pytest.mark.parametrize("length", [1, 9])
def test_a_long_history_costs_what_fits_of_it(chat_of, adapters, monkeypatch, count, length):
    """As many of the newest turns are kept as fit, and what is older is hardly looked at."""
    chat = chat_of({"mine": adapters["mine"]}, max_length=120)
    chat.turns = [Turn("q" * length, "mine", "a" * (number % 3)) for number in range(count)]
    lengths = [len(chat._laid_out(chat.turns[first:], "x").input_ids) for first in range(count + 1)]
    needed = min(chat.max_new_tokens, 120 // 4)
    laid_out = []
    plain = type(chat)._laid_out
    monkeypatch.setattr(
        chat, "_laid_out", lambda turns, query: laid_out.append(len(turns)) or plain(chat, turns, query)
    )
    chat.prepare("x")
    assert chat.left_out == next(first for first, tokens in enumerate(lengths) if tokens + needed <= 120)
    kept = count - chat.left_out
    assert max(laid_out) <= 2 * kept + 1 and len(laid_out) <= 2 + 2 * (kept + 1).bit_length()


def test_what_was_said_before_a_stop_is_kept(chat_of, adapters):
    chat = chat_of({"mine": adapters["mine"]})
    whole = chat.ask("12")
    chat.reset()
    pieces = chat.stream("12")
    first = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(first) and [turn.answer for turn in chat.turns] == [first.strip()]


def test_special_tokens_in_a_question_are_text(chat_of, greedy, adapters):
    chat = chat_of({"mine": adapters["mine"]})
    assert chat.ask("a </s> <EOI> b") == greedy(adapters["mine"], prompt_text("chat", "a </s> <EOI> b"))


def test_saved_turns(chat_of, adapters, tmp_path):
    chat = chat_of({"mine": adapters["mine"]})
    answer = chat.ask("größe?")
    chat.save(tmp_path / "conversation.json")
    content = json.loads((tmp_path / "conversation.json").read_text())
    assert content["turns"] == [{"query": "größe?", "speaker": "mine", "answer": answer.strip()}]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(version="poem"), "version: got 'poem', wanted one of base, chat, vqa, chat_old"),
        (dict(max_new_tokens=0), "max_new_tokens: got 0, wanted at least 1"),
        (dict(adapters={"base": "x"}), "adapters: 'base' is taken"),
        (dict(adapters={"a.b": "x"}), "adapters: 'a.b' is no name"),
        (dict(tokenizer="nowhere"), "--local_tokenizer: nowhere"),
    ],
)
def test_wrong_settings(chat_of, settings, message):
    with pytest.raises(ConfigError, match=message):
        chat_of(**settings)


def test_an_adapter_that_is_not_there_or_does_not_exist(chat_of, adapters, tmp_path):
    with pytest.raises(AdapterError):
        chat_of({"mine": tmp_path})
    chat = chat_of({"mine": adapters["mine"]})
    with pytest.raises(ConfigError, match="there is no adapter 'yours'; there are: base, mine"):
        chat.use("yours")

"""Requests become questions, or one error that says what is wrong."""

import base64
import json
import random

import pytest

from sat_lora.cogvlm.decoding.sampling import GREEDY, Sampling
from sat_lora.serve.questions import RequestError, read_question

PICTURE = b"\x89PNG no picture, but bytes"
URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


def read(content, *, keeps_history=True):
    return read_question(content, speakers=["mine", "base"], keeps_history=keeps_history)


def user(content) -> dict:
    return {"role": "user", "content": content}


def asked(*messages, **fields) -> dict:
    return {"messages": [*messages], **fields}


def test_a_question_with_a_picture_after_turns():
    parts = [{"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, {"type": "text", "text": "what?"}]
    question = read(
        asked(user(parts), {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}, user("how old?"),
              model="base", temperature=0.5, top_p=0.9, seed=3, max_tokens=7, stop="\n", stream=True, n=1, user="me")
    )  # fmt: skip
    assert (question.speaker, question.query, question.image) == ("base", "how old?", PICTURE)
    assert question.turns == (("what?", "a cat"),)
    assert question.sampling == Sampling(temperature=0.5, top_p=0.9, seed=3)
    assert (question.max_new_tokens, question.stop, question.streams) == (7, ("\n",), True)


def test_what_is_left_out_or_null():
    question = read(asked(user("x"), model=None, temperature=None, stop=None, max_tokens=None))
    assert (question.speaker, question.turns, question.image, question.stop) == ("mine", (), None, ())
    assert question.sampling == GREEDY and question.max_new_tokens is None and not question.streams


def test_temperature_zero_is_greedy_whatever_comes_with_it():
    assert read(asked(user("x"), temperature=0, top_p=0.5, top_k=3)).sampling == GREEDY


@pytest.mark.parametrize(
    "content, message, status",
    [
        (3, "the body: got 3, wanted an object", 400),
        ([], "the body: got a list, wanted an object", 400),
        ({}, "messages: wanted at least one", 400),
        (asked(), "messages: wanted at least one", 400),
        ({"messages": "x"}, "messages: got 'x', wanted a list", 400),
        (asked("x"), r"messages\[0\]: got 'x', wanted an object", 400),
        (asked(user("x"), model="yours"), "model: there is no 'yours'; there are: mine, base", 404),
        (asked(user("x"), model=3), "model: got 3, wanted a text", 400),
        (asked({"role": "system", "content": "be kind"}, user("x")), "no place for a system text", 400),
        (asked({"role": "assistant", "content": "x"}), r"messages\[0\].role: got 'assistant', wanted 'user'", 400),
        (asked(user("x"), user("y")), "user and assistant take turns", 400),
        (asked(user("x"), {"role": "assistant", "content": "y"}), "the last one has to be the user's", 400),
        (asked(user(None)), r"messages\[0\].content: got None, wanted a text or a list of parts", 400),
        (asked(user([{"type": "audio"}])), r"content\[0\]: got a dict, wanted a part of type text or image_url", 400),
        (asked(user([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}])), "no address is fetched", 400),
        (asked(user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])), "no file is read", 400),
        (asked(user([{"type": "image_url", "image_url": "/etc/passwd"}])), "no file is read", 400),
        (asked(user([{"type": "image_url"}])), "got None, wanted data:image", 400),
        (asked(user([{"type": "image_url", "image_url": "data:image/png;base64,%%"}])), "its base64 is broken", 400),
        (asked(user([{"type": "image_url", "image_url": URL}] * 2)), "got 2 pictures, and this base takes one", 400),
        (asked(user("x"), temperature="hot"), "temperature: got 'hot', wanted a number", 400),
        (asked(user("x"), temperature=True), "temperature: got True, wanted a number", 400),
        (asked(user("x"), temperature=-1), "temperature: got -1.0, wanted a number of at least 0", 400),
        (asked(user("x"), temperature=1, top_p=7), "top_p: got 7.0, wanted", 400),
        (asked(user("x"), max_tokens=0), "max_tokens: got 0, wanted at least 1", 400),
        (asked(user("x"), max_tokens=1.5), "max_tokens: got 1.5, wanted a whole number", 400),
        (asked(user("x"), stop=["a", ""]), "stop: wanted a text, or at most 4 of them, none empty", 400),
        (asked(user("x"), stop=list("abcde")), "stop: wanted a text, or at most 4", 400),
        (asked(user("x"), n=2), "n: got more than one answer", 400),
        (asked(user("x"), stream="yes"), "stream: got 'yes', wanted true or false", 400),
        (asked(user("x"), presence_penalty=1), "presence_penalty: not known here; repetition_penalty is", 400),
        (asked(user("x"), tools=[{}]), "'tools': not known here; leave it out", 400),
        (asked(user("x"), seed=2**70), "seed: wanted a whole number of 64 bits", 400),
        (asked(*[user("x")] * 300), "messages: got 300, wanted 256 at most", 400),
    ],
)
def test_what_is_wrong_is_one_error(content, message, status):
    with pytest.raises(RequestError, match=message) as caught:
        read(content)
    assert caught.value.status == status


def test_turns_where_the_prompt_format_has_no_place():
    content = asked(user("x"), {"role": "assistant", "content": "y"}, user("z"))
    with pytest.raises(RequestError, match="no place for earlier turns"):
        read(content, keeps_history=False)


def test_a_thousand_mutations_are_questions_or_errors():
    """Nothing but RequestError comes out of it, whatever comes in."""
    whole = json.dumps(
        asked(user([{"type": "text", "text": "x"}]), {"role": "assistant", "content": "y"}, user("z"), stop=["a"], n=1)
    )
    odd = [None, True, -1, 0, 1e400, "", "x" * 200, [], {}, [[]], {"": None}, 2**80, "\ud800", "\x00"]
    draw = random.Random(0)

    def mutated(value):
        if draw.random() < 0.15:
            return draw.choice(odd)
        if isinstance(value, dict):
            return {name: mutated(inner) for name, inner in value.items() if draw.random() < 0.95}
        return [mutated(inner) for inner in value] if isinstance(value, list) else value

    refused = 0
    for _ in range(1000):
        try:
            read(mutated(json.loads(whole)))
        except RequestError as error:
            refused += 1
            assert error.status in (400, 404) and len(str(error)) < 400
    assert 200 < refused < 1000

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


def test_an_answer_of_openai_goes_back_as_a_turn():
    """As its client gives it, with all its fields, of which those that are empty say nothing."""
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    answer = {"role": "assistant", "content": "y", **empty}
    assert read(asked(user("x"), answer, {**user("z"), "name": "me"})).turns == (("x", "y"),)


@pytest.mark.parametrize("head", ["DATA:image/png;base64", "Data:;BASE64", "data:IMAGE/PNG;Base64"])
def test_a_data_url_is_one_in_any_case(head):
    """RFC 3986 3.1: schemes are case-insensitive."""
    url = f"{head},{URL.partition(',')[2]}"
    assert read(asked(user([{"type": "image_url", "image_url": {"url": url}}]))).image == PICTURE


NOTHING = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "auto",
    "parallel_tool_calls": False,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "stop": [],
    "stream_options": {"include_usage": True},
    "prediction": {"type": "content", "content": "x"},
}
OF_OPENAI = """
audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens metadata modalities
n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_retention reasoning_effort
response_format safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools
top_logprobs top_p user verbosity web_search_options
""".split()


def test_what_asks_for_nothing_is_passed_over():
    expected = read(asked(user("x")))
    for name, value in NOTHING.items():
        assert read(asked(user("x"), **{name: value})) == expected, name
    assert read(asked(user("x"), **NOTHING)) == expected
    assert read(asked(user("x"), **dict.fromkeys(OF_OPENAI))) == expected


@pytest.mark.parametrize(
    "field",
    [
        {"logprobs": True},
        {"logprobs": 0},
        {"top_logprobs": 2},
        {"top_logprobs": False},
        {"tool_choice": "required"},
        {"logit_bias": {"5": 1}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text", "x": 1}},
        {"modalities": ["text", "audio"]},
        {"reasoning_effort": "high"},
        {"best_of": 1},
    ],
)
def test_what_would_change_the_answer_is_refused(field):
    with pytest.raises(RequestError, match=f"'{next(iter(field))}': not known here; leave it out"):
        read(asked(user("x"), **field))


def test_the_most_tokens_have_two_names():
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
        assert read(asked(user("x"), **fields)).max_new_tokens == 5
    assert read(asked(user("x"), max_tokens=None, max_completion_tokens=5)).max_new_tokens == 5


LARGE = 10**400  # a number that json may hold, and no float
ENORMOUS = 10**5000  # one that Python does not write


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "top_k", "repetition_penalty", "seed", "n", "max_tokens", "max_completion_tokens",
             "presence_penalty", "frequency_penalty", "stop", "stream", "model", "messages", "logprobs", "unknown"]
)  # fmt: skip
def test_a_number_of_any_size_is_a_value_or_one_short_error(name):
    for value in (LARGE, ENORMOUS, 2**1024):
        if name in ("top_k", "max_tokens", "max_completion_tokens"):
            read({**asked(user("x"), temperature=1), name: value})
    values = [-LARGE, -ENORMOUS, -(2**1024), 1e400]
    values += [] if name in ("top_k", "max_tokens", "max_completion_tokens") else [LARGE, ENORMOUS, 2**1024]
    for value in values:
        with pytest.raises(RequestError, match=name) as caught:
            read({**asked(user("x"), temperature=1), name: value})
        assert len(str(caught.value)) < 200


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
        (asked(user("x"), n=2), "n: got 2, wanted 1: a request has one answer", 400),
        (asked(user("x"), n=0), "n: got 0, wanted 1: a request has one answer", 400),
        (asked(user("x"), n=-3), "n: got -3, wanted 1", 400),
        (asked(user([])), r"messages\[0\].content: got an empty list, wanted a text or at least one part", 400),
        (
            asked(user("x"), {"role": "assistant", "content": []}, user("y")),
            r"messages\[1\].content: got an empty",
            400,
        ),
        (asked(user("x"), max_tokens=5, max_completion_tokens=6), "got two different numbers; give one of them", 400),
        (
            asked(user("x"), max_tokens=5, max_completion_tokens=0),
            "max_completion_tokens: got 0, wanted at least 1",
            400,
        ),
        (asked(user("x"), max_completion_tokens=-1), "max_completion_tokens: got -1, wanted at least 1", 400),
        (asked(user("x"), temperature=LARGE), "temperature: got a number of 1329 bits, which is too large", 400),
        (asked(user("x"), top_p=-LARGE), "top_p: got a number of 1329 bits, which is too large", 400),
        (asked(user("x"), repetition_penalty=LARGE), "repetition_penalty: got a number of 1329 bits, which", 400),
        (asked(user("x"), temperature=1, top_k=-LARGE), "top_k: got a number of 1329 bits, wanted a whole number", 400),
        (asked(user("x"), stream="yes"), "stream: got 'yes', wanted true or false", 400),
        (asked(user("x"), presence_penalty=1), "presence_penalty: not known here; repetition_penalty is", 400),
        (asked(user("x"), tools=[{}]), "'tools': not known here; leave it out", 400),
        (asked(user("x"), seed=2**70), "seed: wanted a whole number of 64 bits", 400),
        (
            asked({**user("x"), "images": [URL]}),
            r"messages\[0\]: 'images': not known here; .* send a picture as a part",
            400,
        ),
        (asked({**user("x"), "image": URL}), "'image': not known here", 400),
        (
            asked(user([{"type": "text", "text": "x", "image_url": {"url": URL}}])),
            r"content\[0\]: 'image_url': not",
            400,
        ),
        (
            asked(user("x"), {"role": "assistant", "content": "y", "tool_calls": [{}]}, user("z")),
            r"messages\[1\]: 'tool_calls': not known here",
            400,
        ),
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
        asked(
            user([{"type": "text", "text": "x"}]), {"role": "assistant", "content": "y"}, user("z"), stop=["a"], n=1,
            temperature=1.0, top_p=0.5, top_k=3, repetition_penalty=1.1, seed=3, max_tokens=5, presence_penalty=0,
        )
    )  # fmt: skip
    odd = [None, True, -1, 0, 1e400, "", "x" * 200, [], {}, [[]], {"": None}, 2**80, "\ud800", "\x00"]
    odd += [10**400, -(10**400), 2**1024, 10**5000, {"type": "text"}, "data:;base64,", -0.0]
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
            assert error.status in (400, 404) and len(str(error)) < 500
    assert 200 < refused < 1000

"""The server over a real socket, asked by OpenAI's own client."""

import base64
import contextlib
import json
import threading
import time

import httpx
import openai
import pytest
import torch

from sat_lora.chat import Chat
from sat_lora.cogvlm import load_cogvlm
from sat_lora.serve.app import RequestLimits
from tests.support.serving import LENGTH, chat_of, served

pytestmark = [pytest.mark.usefixtures("single_process_group"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def address(base, adapters, single_process_group):
    with served(chat_of(base, adapters), limits=RequestLimits(body=2**20)) as address:
        yield address


def client_of(address, key="any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def question_of(picture, text="12 34", **more) -> dict:
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "mine", "messages": [{"role": "user", "content": parts}], **more}


def test_answers_are_those_of_a_conversation(base, adapters, picture, address):
    chat = chat_of(base, adapters)
    client = client_of(address)
    assert [model.id for model in client.models.list()] == ["mine", "base", "other"]
    for name in ("base", "mine", "other"):
        chat.use(name)
        expected = chat.ask("12 34", picture)
        answer = client.chat.completions.create(**{**question_of(picture), "model": name})
        (choice,) = answer.choices
        assert (choice.message.content, answer.model) == (expected.strip(), name)
        assert answer.usage.completion_tokens == chat.usage.completion_tokens
        assert answer.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
        assert choice.finish_reason == ("stop" if chat.usage.is_whole else "length")
        chunks = [*client.chat.completions.create(**{**question_of(picture), "model": name}, stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_turns_come_with_the_question(base, adapters, picture, address):
    chat = chat_of(base, {"mine": adapters["mine"]})
    first, second = chat.ask("12 34", picture), chat.ask("more")
    request = question_of(picture)
    request["messages"] += [{"role": "assistant", "content": first.strip()}, {"role": "user", "content": "more"}]
    assert client_of(address).chat.completions.create(**request).choices[0].message.content == second.strip()


def test_drawn_answers_follow_the_seed_and_limits_are_kept(picture, address):
    create = client_of(address).chat.completions.create
    drawn = [create(**question_of(picture, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    first, again, other = (answer.choices[0].message.content for answer in drawn)
    assert first == again != other
    short = create(**question_of(picture, max_tokens=3))
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_errors_are_those_of_openai(picture, address):
    create = client_of(address).chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no 'yours'"):
        create(**{**question_of(picture), "model": "yours"})
    with pytest.raises(openai.BadRequestError, match="the question takes 3"):
        create(**question_of(picture, "x" * 3000))
    for streams in (False, True):
        with pytest.raises(openai.BadRequestError, match="the image: cannot be read as an image"):
            broken = question_of(picture, stream=streams)
            broken["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
            create(**broken)
    with pytest.raises(openai.APIStatusError, match="the body is longer than 1048576 bytes") as caught:
        create(**question_of(picture, "x" * 2**21))
    assert caught.value.status_code == 413
    with httpx.Client(base_url=address) as http:
        for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"messages": NaN}'):
            assert http.post("/v1/chat/completions", content=content).status_code == 400
        for method in ("GET", "HEAD", "PUT"):
            refusal = http.request(method, "/v1/chat/completions")
            assert (refusal.status_code, refusal.headers["Allow"]) == (405, "POST")
        assert "there is nothing at this address" in http.get("/../../etc/passwd").json()["error"]["message"]
        assert http.get("/health").json() == {"status": "ok"}
        metrics = http.get("/metrics").text
    assert 'sat_lora_requests_total{status="413"} 1.0' in metrics
    assert "sat_lora_waiting_requests 0.0" in metrics
    assert create(**question_of(picture)).choices  # and goes on


def test_a_key_is_wanted_of_everybody_where_there_is_one(base, adapters, picture):
    with served(chat_of(base, {"mine": adapters["mine"]}), api_key="secret") as address:
        for key in ("other", "secre", "secret2"):
            with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
                client_of(address, key).models.list()
        assert client_of(address, "secret").models.list().data
        statuses = [httpx.get(f"{address}{path}").status_code for path in ("/health", "/metrics", "/v1/models", "/x")]
        assert statuses == [200, 401, 401, 401]


class SlowChat(Chat):
    """A conversation whose pieces wait until they may come."""

    def prepare(self, query):
        self.begun.append(query)
        return super().prepare(query)

    def answer_together(self, questions):
        for pieces in super().answer_together(questions):
            self.go.wait(30)
            yield pieces


@pytest.fixture
def slow(base, adapters):
    chat = SlowChat(load_cogvlm(base), adapters={"mine": adapters["mine"]}, version="chat", max_new_tokens=LENGTH)
    chat.go, chat.begun = threading.Event(), []
    return chat


def in_background(target, *args) -> threading.Thread:
    thread = threading.Thread(target=target, args=args)
    thread.start()
    return thread


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def waiting(address) -> float:
    return float(httpx.get(f"{address}/metrics").text.partition("\nsat_lora_waiting_requests ")[2].split()[0])


def test_a_full_queue_refuses_and_keeps_the_order(slow, picture):
    with served(slow, limits=RequestLimits(waiting=2, together=1)) as address:
        answers: list[str] = []

        def ask(text):
            answer = client_of(address).chat.completions.create(**question_of(picture, text))
            answers.append((text, answer.choices[0].finish_reason))

        threads = [in_background(ask, "first")]
        wait_for(lambda: slow.begun == ["first"])
        for number, text in enumerate(("second", "third"), start=1):
            threads.append(in_background(ask, text))
            wait_for(lambda number=number: waiting(address) == number)
        with pytest.raises(openai.RateLimitError, match="2 requests are waiting already"):
            ask("fourth")
        slow.go.set()
        for thread in threads:
            thread.join()
        assert [text for text, _ in answers] == slow.begun == ["first", "second", "third"]


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_frees_its_place(slow, picture, streams):
    with served(slow) as address:
        path = f"{address}/v1/chat/completions"
        answering = in_background(_post_and_leave, path, question_of(picture, "gone", stream=streams))
        wait_for(lambda: slow.begun == ["gone"])
        waits = in_background(_post_and_leave, path, question_of(picture, "never", stream=streams))
        wait_for(lambda: waiting(address) == 1)
        for thread in (answering, waits):
            thread.join()
        wait_for(lambda: 'status="499"} 2.0' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        assert client_of(address).chat.completions.create(**question_of(picture, "next")).choices
        assert slow.begun == ["gone", "next"]


def test_a_client_that_goes_in_the_middle_ends_its_answer(slow, picture):
    slow.go.set()
    with served(slow) as address:
        path = f"{address}/v1/chat/completions"
        with httpx.stream("POST", path, json=question_of(picture, "gone", stream=True)) as answer:
            next(answer.iter_lines())
            slow.go.clear()
        slow.go.set()
        assert client_of(address).chat.completions.create(**question_of(picture, "next")).choices
        assert slow.begun == ["gone", "next"]


class QuickChat(Chat):
    """A conversation whose answers come piece after piece, and end when nobody listens any more."""

    def answer_together(self, questions):
        for self.pieces in range(10**6):
            time.sleep(0.01)
            yield ["x"] * len(questions)


def test_a_client_that_goes_ends_an_answer_that_comes_quickly(base, adapters, picture):
    chat = QuickChat(load_cogvlm(base), adapters={"mine": adapters["mine"]}, version="chat")
    with served(chat) as address:
        _post_and_leave(f"{address}/v1/chat/completions", question_of(picture))
        wait_for(lambda: 'status="499"} 1.0' in httpx.get(f"{address}/metrics").text)
        pieces = chat.pieces
        time.sleep(0.5)
        assert chat.pieces <= pieces + 1


def _post_and_leave(path, content) -> None:
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(path, json=content, timeout=1)


def test_time_is_limited(slow, picture):
    with served(slow, limits=RequestLimits(seconds=0.5)) as address:
        held = in_background(httpx.post, f"{address}/v1/chat/completions")
        create = client_of(address).chat.completions.create
        statuses = []

        def ask(text):
            try:
                statuses.append((text, create(**question_of(picture, text)).choices[0].finish_reason))
            except openai.APIStatusError as error:
                statuses.append((text, error.status_code))

        first = in_background(ask, "first")
        wait_for(lambda: slow.begun == ["first"])
        second = in_background(ask, "second")
        wait_for(lambda: waiting(address) == 1)
        time.sleep(0.6)
        slow.go.set()
        for waited in (first, second, held):
            waited.join()
        assert sorted(statuses) == [("first", "length"), ("second", 504)]


def test_the_end_of_the_server_ends_what_waits(slow, picture):
    results = []

    def ask(address, text):
        answer = httpx.post(f"{address}/v1/chat/completions", json=question_of(picture, text), timeout=30)
        results.append((text, answer.status_code))

    with served(slow) as address:
        threads = [in_background(ask, address, "first")]
        wait_for(lambda: slow.begun == ["first"])
        threads.append(in_background(ask, address, "second"))
        wait_for(lambda: waiting(address) == 1)
        slow.go.set()
    for thread in threads:
        thread.join()
    assert {text for text, _ in results} == {"first", "second"} and {status for _, status in results} <= {200, 503}


def test_a_fault_is_told_and_ends_nothing(slow, picture, monkeypatch):
    slow.go.set()

    def fault(self, questions):
        raise ZeroDivisionError("no")
        yield

    with served(slow) as address:
        with monkeypatch.context() as patch:
            patch.setattr(SlowChat, "answer_together", fault)
            with pytest.raises(openai.InternalServerError, match="ZeroDivisionError: no"):
                client_of(address).chat.completions.create(**question_of(picture))
        assert client_of(address).chat.completions.create(**question_of(picture)).choices


def test_whoever_only_looks_whether_it_is_there_is_answered(address):
    """HEAD is what `wget --spider` and many a health check ask."""
    with httpx.Client(base_url=address) as http:
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/mine"):
            head, got = http.head(path), http.get(path)
            assert head.status_code == got.status_code == 200 and not head.content and got.content
            assert head.headers["content-type"] == got.headers["content-type"]
        assert http.head("/v1/models/yours").status_code == http.head("/nothing").status_code == 404


def test_events_are_json_lines(picture, address):
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=question_of(picture, stream=True)) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"
    assert {json.loads(line.removeprefix("data: "))["object"] for line in lines[:-1]} == {"chat.completion.chunk"}


def test_those_for_one_adapter_are_answered_together_and_as_each_would_be_alone(base, adapters, slow, picture):
    """In one batch with the oldest; drawn answers and those of others on their own; nobody waits for a later one."""
    alone = chat_of(base, {"mine": adapters["mine"]})
    texts = ["12 34", "what is this?", "5", "and 6 7 8 9 0 1", "12"]
    batches = []
    together = slow.answer_together
    slow.answer_together = lambda questions: batches.append(len(questions)) or together(questions)
    answers: dict[str, str] = {}

    def ask(text, **more):
        answer = client_of(address).chat.completions.create(**{**question_of(picture, text), **more})
        answers[text] = (answer.choices[0].message.content, answer.usage.completion_tokens)

    with served(slow, limits=RequestLimits(together=3)) as address:
        asked = [in_background(ask, "first")]
        wait_for(lambda: slow.begun == ["first"])
        kinds = [dict(model="mine")] * 4 + [dict(model="base"), dict(temperature=1, seed=3), dict(max_tokens=2)]
        for number, (text, more) in enumerate(zip([*texts, "drawn", "short"], kinds), start=1):
            asked.append(threading.Thread(target=ask, args=(text,), kwargs=more))
            asked[-1].start()
            wait_for(lambda number=number: waiting(address) == number)
        slow.go.set()
        for thread in asked:
            thread.join()
    assert slow.begun == ["first", *texts[:3], texts[3], "short", texts[4], "drawn"] and batches == [1, 3, 2, 1, 1]
    for text, more in zip(texts, kinds):
        alone.use(more["model"])
        assert answers[text] == (alone.ask(text, picture).strip(), alone.usage.completion_tokens)
    alone.use("mine")
    alone.max_new_tokens = 2
    assert answers["short"] == (alone.ask("short", picture).strip(), 2)


def test_too_many_at_once_for_the_device_are_answered_one_by_one(slow, picture):
    together = slow.answer_together
    sizes = []

    def small_device(questions):
        sizes.append(len(questions))
        if len(questions) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from together(questions)

    slow.answer_together = small_device
    answers = []

    def ask(text):
        answers.append(
            client_of(address).chat.completions.create(**question_of(picture, text)).choices[0].finish_reason
        )

    with served(slow) as address:
        asked = [in_background(ask, "first")]
        wait_for(lambda: slow.begun == ["first"])
        for number, text in enumerate(("second", "third", "fourth"), start=1):
            asked.append(in_background(ask, text))
            wait_for(lambda number=number: waiting(address) == number)
        slow.go.set()
        for thread in asked:
            thread.join()
    assert len(answers) == 4 and sizes == [1, 3, 1, 1, 1]


def test_who_has_gone_leaves_room_in_a_full_queue(slow, picture):
    with served(slow, limits=RequestLimits(waiting=1)) as address:
        path = f"{address}/v1/chat/completions"
        answering = in_background(httpx.post, path)
        first = threading.Thread(target=httpx.post, args=(path,), kwargs=dict(json=question_of(picture), timeout=60))
        first.start()
        wait_for(lambda: slow.begun == ["12 34"])
        _post_and_leave(path, question_of(picture, "gone"))
        wait_for(lambda: 'status="499"} 1.0' in httpx.get(f"{address}/metrics").text)
        threading.Timer(0.2, slow.go.set).start()
        assert client_of(address).chat.completions.create(**question_of(picture, "next")).choices
        for thread in (answering, first):
            thread.join()
    assert slow.begun == ["12 34", "next"]

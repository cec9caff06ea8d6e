"""Who is answered with whom, and when: the oldest always, and with it those that may be."""

import time
from types import SimpleNamespace

import pytest

from sat_lora.cogvlm.decoding.sampling import Sampling
from sat_lora.serve.questions import RequestError, read_question
from sat_lora.serve.worker import Job, Worker


def worker_of(*, waiting=100, together=3) -> Worker:
    return Worker(SimpleNamespace(max_new_tokens=8), waiting, together)


def job_of(name: str, **settings) -> Job:
    content = {"model": name.rstrip("0123456789"), "messages": [{"role": "user", "content": name}], **settings}
    question = read_question(content, speakers=["a", "b", "c"], keeps_history=True)
    return Job(question, lambda event: None, time.monotonic() + 60)


def batches(worker: Worker) -> list[str]:
    """What is answered together, one batch after the other."""
    taken = []
    while worker.waiting:
        taken.append(" ".join(job.question.query for job in worker._next()))
    return taken


@pytest.mark.parametrize(
    "names, together, expected",
    [
        ("a1 a2 a3 a4", 3, ["a1 a2 a3", "a4"]),
        ("a1 b1 a2 b2 a3 b3", 3, ["a1 a2 a3", "b1 b2 b3"]),
        ("a1 b1 a2 c1 b2", 3, ["a1 a2", "b1 b2", "c1"]),
        ("b1 a1 a2 a3 a4", 2, ["b1", "a1 a2", "a3 a4"]),
        ("a1 b1 a2", 1, ["a1", "b1", "a2"]),
    ],
)
def test_the_oldest_is_answered_with_those_for_the_same_adapter(names, together, expected):
    worker = worker_of(together=together)
    for name in names.split():
        worker.submit(job_of(name))
    assert batches(worker) == expected


def test_drawn_answers_are_alone():
    worker = worker_of()
    for name, settings in (("a1", {}), ("a2", {"temperature": 1, "seed": 3}), ("a3", {}), ("a4", {"temperature": 1}),
                           ("a5", {"repetition_penalty": 1.2}), ("a6", {"temperature": 0})):  # fmt: skip
        worker.submit(job_of(name, **settings))
    assert batches(worker) == ["a1 a3 a6", "a2", "a4", "a5"]
    assert job_of("a", temperature=1).question.sampling == Sampling(temperature=1)


def test_nobody_is_passed_over_by_later_ones_for_more_than_a_batch():
    """One for b among a stream for a, which never ends, is answered next."""
    worker = worker_of(together=4)
    for number in range(10):
        worker.submit(job_of(f"a{number}"))
    worker.submit(job_of("b1"))
    order = []
    for number in range(10, 30):
        worker.submit(job_of(f"a{number}"))
        order.append([job.question.query for job in worker._next()])
    before = order.index(["b1"])
    assert sum(map(len, order[:before])) <= 10 + 4


def test_a_full_queue_has_room_where_somebody_has_gone():
    worker = worker_of(waiting=2)
    first, second = job_of("a1"), job_of("a2")
    worker.submit(first)
    worker.submit(second)
    with pytest.raises(RequestError, match="2 requests are waiting already"):
        worker.submit(job_of("a3"))
    first.is_cancelled.set()
    worker.submit(job_of("a4"))
    assert batches(worker) == ["a2 a4"]


def test_after_the_end_nothing_is_taken():
    worker = worker_of()
    worker.stop()
    with pytest.raises(RequestError, match="the server is ending") as error:
        worker.submit(job_of("a"))
    assert error.value.status == 503 and worker._next() == []

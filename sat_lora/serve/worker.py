"""The one thread that has the model: it answers questions in the order in which they came, some of them together."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import torch

from sat_lora.chat.session import Chat, Prepared, Turn, Usage
from sat_lora.cogvlm.decoding.sampling import GREEDY
from sat_lora.errors import SatLoraError
from sat_lora.serve.questions import Question, RequestError
from sat_lora.terminal.notice import log_fault


@dataclass(frozen=True)
class Piece:
    """What an answer grows by."""

    text: str


@dataclass(frozen=True)
class End:
    """The end of an answer: what it took; or what went wrong."""

    usage: Usage | None = None
    error: RequestError | None = None


@dataclass
class Job:
    """A question on its way. tell: is called, by the worker's thread, with every Piece and with the End."""

    question: Question
    tell: Callable[[Piece | End], None]
    deadline: float
    """When it is given up, by time.monotonic()."""
    is_cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Answers jobs in the order of their arrival; `start` and `stop` begin and end its thread.

    With the oldest job go those for the same adapter, up to `most_together`, in one batch; where tokens are drawn, each
    job is alone, so that it draws what its seed says.
    """

    def __init__(self, chat: Chat, most_waiting: int, most_together: int = 1):
        """Take a conversation, which nobody else may use from now on, and how many jobs may wait."""
        self._chat = chat
        self._most_new_tokens = chat.max_new_tokens
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._most_waiting = most_waiting
        self._most_together = most_together
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._stopping = threading.Event()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End the answers that are being made, and all that wait; return when the thread has ended."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. Raises RequestError of status 429 where it is full, 503 at the end."""
        with self._changed:
            if self._stopping.is_set():
                raise _ending()
            if len(self._jobs) >= self._most_waiting:
                self._jobs = deque(job for job in self._jobs if not job.is_cancelled.is_set())
            if len(self._jobs) >= self._most_waiting:
                raise RequestError(
                    f"{self._most_waiting} requests are waiting already; try again", 429, "rate_limit_error"
                )
            self._jobs.append(job)
            self._changed.notify()

    def _work(self) -> None:
        while jobs := self._next():
            self._answer(jobs)
        for job in self._jobs:
            job.tell(End(error=_ending()))

    def _next(self) -> list[Job]:
        """Wait for a job and return it, with those that are answered with it; none at the end."""
        with self._changed:
            while not self._jobs and not self._stopping.is_set():
                self._changed.wait()
            if self._stopping.is_set():
                return []
            first = self._jobs.popleft()
            together = [first]
            if _is_for_a_batch(first):
                same = [job for job in self._jobs if _is_for_a_batch(job) and _speaker(job) == _speaker(first)]
                together += same[: self._most_together - 1]
            chosen = set(map(id, together))
            self._jobs = deque(job for job in self._jobs if id(job) not in chosen)
            return together

    def _answer(self, jobs: list[Job]) -> None:
        """Tell the pieces of the jobs' answers and their ends. What goes wrong ends these jobs alone."""
        answering: list[tuple[Job, Prepared]] = []
        for job in jobs:
            if job.is_cancelled.is_set():
                continue
            if time.monotonic() > job.deadline:
                job.tell(End(error=RequestError("the request waited for longer than it may take", 504, "timeout")))
                continue
            try:
                answering.append((job, self._prepared(job.question)))
            except Exception as error:
                _fail([job], error)
        if not answering:
            return
        try:
            self._tell_pieces(answering)
        except torch.OutOfMemoryError as error:
            if len(answering) == 1:
                _fail([answering[0][0]], error)
                return
            # Too many at once for this device, where each alone may fit. Whoever has heard a piece hears of the error.
            self._most_together = max(1, len(answering) // 2)
            _fail([job for job, question in answering if question.answer.taken and _is_going(question)], error)
            for job, question in answering:
                if not question.answer.taken:
                    self._answer([job])
        except Exception as error:
            # Whatever it is, the next request is to be served; these clients and the log hear of it.
            _fail([job for job, question in answering if _is_going(question)], error)

    def _prepared(self, question: Question) -> Prepared:
        """Return a question as the model reads it. Raises DataError for a picture that cannot be read, or too much."""
        chat = self._chat
        chat.reset()
        chat.use(question.speaker)
        if question.image is not None:
            chat.show(question.image)
        chat.turns = [Turn(query, question.speaker, answer) for query, answer in question.turns]
        chat.sampling = question.sampling
        chat.max_new_tokens = min(question.max_new_tokens or self._most_new_tokens, self._most_new_tokens)
        chat.stop = question.stop
        return chat.prepare(question.query)

    def _tell_pieces(self, answering: list[tuple[Job, Prepared]]) -> None:
        """Tell pieces as they come, and the end of each answer once it is there, whatever the others still say."""
        going = list(range(len(answering)))
        with closing(self._chat.answer_together([question for _, question in answering])) as steps:
            for pieces in steps:
                for number in [*going]:
                    job, question = answering[number]
                    if pieces[number]:
                        job.tell(Piece(pieces[number]))
                    usage = question.usage
                    if not question.answer.is_finished:
                        is_late = time.monotonic() > job.deadline
                        if not (is_late or job.is_cancelled.is_set() or self._stopping.is_set()):
                            continue
                        question.answer.is_finished = True
                        usage = Usage(usage.prompt_tokens, usage.completion_tokens, is_whole=False)
                    going.remove(number)
                    job.tell(End(usage))
                if not going:
                    return


def _ending() -> RequestError:
    return RequestError("the server is ending", 503, "server_error")


def _is_for_a_batch(job: Job) -> bool:
    return job.question.sampling == GREEDY


def _speaker(job: Job) -> str:
    return job.question.speaker


def _is_going(question: Prepared) -> bool:
    return not question.answer.is_finished


def _fail(jobs: list[Job], error: Exception) -> None:
    """End jobs with an error: of their question; or of the server, whose log hears of it, once for all of them."""
    if not jobs:
        return
    failure = RequestError(str(error))
    if not isinstance(error, SatLoraError):
        failure = RequestError(f"{type(error).__name__}: {error}", 500, "server_error")
        log_fault("an answer", error)
    for job in jobs:
        job.tell(End(error=failure))

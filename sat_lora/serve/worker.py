"""The one thread that has the model: it answers questions one after the other, in the order in which they came."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from sat_lora.chat.session import Chat, Turn, Usage
from sat_lora.errors import SatLoraError
from sat_lora.serve.questions import Question, RequestError


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
    """Answers jobs in the order of their arrival; `start` and `stop` begin and end its thread."""

    def __init__(self, chat: Chat, most_waiting: int):
        """Take a conversation, which nobody else may use from now on, and how many jobs may wait."""
        self._chat = chat
        self._most_new_tokens = chat.max_new_tokens
        self._jobs: queue.Queue[Job | None] = queue.Queue(most_waiting + 1)
        self._most_waiting = most_waiting
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._stopping = threading.Event()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return self._jobs.qsize()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End the answer that is being made, and all that wait; return when the thread has ended."""
        self._stopping.set()
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. Raises RequestError of status 429 where it is full, 503 at the end."""
        if self._stopping.is_set():
            raise RequestError("the server is ending", 503, "server_error")
        if self._jobs.qsize() >= self._most_waiting:
            raise RequestError(f"{self._most_waiting} requests are waiting already; try again", 429, "rate_limit_error")
        self._jobs.put_nowait(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._stopping.is_set():
                job.tell(End(error=RequestError("the server is ending", 503, "server_error")))
            elif not job.is_cancelled.is_set():
                job.tell(self._answer(job))

    def _answer(self, job: Job) -> End:
        """Tell the pieces of an answer, and return its end."""
        if time.monotonic() > job.deadline:
            return End(error=RequestError("the request waited for longer than it may take", 504, "timeout"))
        try:
            return self._pieces(job)
        except SatLoraError as error:  # a picture that cannot be read, a question that is too long
            return End(error=RequestError(str(error)))
        except Exception as error:
            # Whatever it is, the next request is to be served; this one's client and the log hear of it.
            return End(error=RequestError(f"{type(error).__name__}: {error}", 500, "server_error"))

    def _pieces(self, job: Job) -> End:
        chat = self._chat
        question = job.question
        chat.reset()
        chat.use(question.speaker)
        if question.image is not None:
            chat.show(question.image)
        chat.turns = [Turn(query, question.speaker, answer) for query, answer in question.turns]
        chat.sampling = question.sampling
        chat.max_new_tokens = min(question.max_new_tokens or self._most_new_tokens, self._most_new_tokens)
        chat.stop = question.stop
        chat.usage = None
        with closing(chat.stream(question.query)) as pieces:
            for piece in pieces:
                job.tell(Piece(piece))
                is_late = time.monotonic() > job.deadline
                if is_late or job.is_cancelled.is_set() or self._stopping.is_set():
                    usage = chat.usage or Usage(0, 0, False)
                    return End(Usage(usage.prompt_tokens, usage.completion_tokens, is_whole=False))
        return End(chat.usage)

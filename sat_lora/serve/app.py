"""The HTTP side: OpenAI's chat completions and models, health and metrics, on FastAPI."""

import asyncio
import base64
import binascii
import contextlib
import functools
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sat_lora.chat.session import BASE, Chat, Usage
from sat_lora.files.foreign import parse_json
from sat_lora.serve.bodies import Bodies
from sat_lora.serve.gate import OPEN, PAGE, Gate, OwnSenders, is_of_page
from sat_lora.serve.questions import Question, RequestError, read_question
from sat_lora.serve.worker import End, Job, Piece, Worker
from sat_lora.terminal.notice import log_fault

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a request may take. seconds: from its arrival to its last token. body: bytes. waiting: requests. together:
    those that are answered in one batch.
    """

    seconds: float = 120.0
    body: int = 20 * 2**20
    waiting: int = 64
    together: int = 8


@dataclass
class Metrics:
    """What /metrics tells, in a registry of its own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        ours = {"registry": self.registry, "namespace": "sat_lora"}
        self.requests = Counter("requests", "Chat completions by HTTP status.", ["status"], **ours)
        self.tokens = Counter("tokens", "Tokens of prompts and of answers.", ["kind"], **ours)
        self.seconds = Histogram("answer_seconds", "From a request's arrival to its last token.", **ours)
        self.waiting = Gauge("waiting_requests", "Requests in the queue.", **ours)


def build_app(
    chat: Chat, *, limits: RequestLimits = RequestLimits(), api_key: str | None = None, with_page: bool = False
) -> FastAPI:
    """Return the application, which alone uses the conversation from now on.

    `model` of a request is "base" or the name of an adapter; without one, who answers in the conversation. api_key:
    what every request but /health has to bring as its bearer token; to the page a browser brings it as a password.
    Without a key only this machine's own programs and pages are answered. with_page: whether there is a page at /.
    Raises ConfigError where the packages for it are missing.
    """
    worker = Worker(chat, limits.waiting, limits.together)
    bodies = Bodies(limits.body, limits.seconds)
    metrics = Metrics()
    metrics.waiting.set_function(lambda: worker.waiting)
    speakers = list(dict.fromkeys([chat.speaker, BASE, *chat.adapters]))
    keeps_history = chat.keeps_history

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            async with contextlib.nullcontext() if page is None else page.running():
                yield
        finally:
            await asyncio.to_thread(worker.stop)

    async def ask(content: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Yield the pieces of an answer to the page."""
        arrival = time.monotonic()
        try:
            question = read_question(content, speakers=speakers, keeps_history=keeps_history)
            answer = _Answer(question, arrival + limits.seconds, metrics, arrival)
            worker.submit(answer.job)
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        except RequestError as error:
            metrics.requests.labels(error.status).inc()
            raise

    page = None
    if with_page:
        from sat_lora.serve.page import Page

        page = Page(
            ask,
            speakers=speakers,
            keeps_history=keeps_history,
            most_bytes=limits.body,
            most_waiting=limits.waiting,
            max_pixels=chat.max_pixels,
        )
    app = FastAPI(
        title="sat_lora", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan
    )

    if page is not None:
        app.add_middleware(Gate, page=page.app, refuse=_refusal, bodies=bodies)
    if api_key is None:
        app.add_middleware(OwnSenders, refuse=_refusal)
    else:
        app.add_middleware(_Keys, key=api_key, has_page=page is not None)
    app.add_middleware(_LastResort, metrics=metrics)

    @app.exception_handler(404)
    async def no_such_place(request: Request, error: Exception) -> Response:
        places = "/v1/chat/completions, /v1/models, /health, /metrics"
        about = "" if page is not None or request.url.path != PAGE else "; pip install 'sat_lora[page]' for a page here"
        return _refusal(RequestError(f"there is nothing at this address; there are {places}{about}", 404))

    @app.exception_handler(405)
    async def no_such_method(request: Request, error: HTTPException) -> Response:
        refusal = _refusal(RequestError(f"{request.method} is not what this address takes", 405))
        refusal.headers.update(error.headers or {})  # what it takes: Allow
        return refusal

    get = functools.partial(app.api_route, methods=["GET", "HEAD"])  # HEAD as health checks ask: `wget --spider`

    @get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if worker.is_alive else "ending"}, 200 if worker.is_alive else 503)

    @get("/metrics")
    async def tell_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [*map(_model, speakers)]})

    @get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name not in speakers:
            known = ", ".join(speakers)
            return _refusal(RequestError(f"there is no model of this name; there are: {known}", 404, "model_not_found"))
        return JSONResponse(_model(name))

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        arrival = time.monotonic()
        try:
            content = _json(await bodies.read(request.receive))
            question = read_question(content, speakers=speakers, keeps_history=keeps_history)
            answer = _Answer(question, arrival + limits.seconds, metrics, arrival)
            worker.submit(answer.job)
            return await (answer.streamed(request) if question.streams else answer.whole(request))
        except RequestError as error:
            metrics.requests.labels(error.status).inc()
            return _refusal(error)

    return app


def _model(name: str) -> dict[str, Any]:
    """Return what OpenAI's clients are told of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "sat_lora"}


class _LastResort:
    """Answers with one error where something unforeseen is raised for a request, counts it, and tells the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            if scope["type"] != "http" or has_begun:  # too late for an answer: the connection ends, and the log says it
                raise
            await _refusal(_unforeseen(error, self._metrics))(scope, receive, send)


def _unforeseen(error: Exception, metrics: Metrics) -> RequestError:
    """Return what a client is told of an error that nobody thought of, counted; the log has all of it."""
    log_fault("a request", error)
    metrics.requests.labels(500).inc()
    return RequestError("the server has failed at this request; its log says where", 500, "server_error")


class _Keys:
    """Lets nobody pass without the key, but to what is OPEN.

    Programs bring it as a bearer token. To the page a browser brings it as the password of any name, after asking for
    it; to nothing else, since it would bring it for the pages of other sites as well.
    """

    def __init__(self, app: ASGIApp, key: str, has_page: bool):
        self._app = app
        self._key = key.encode()
        self._has_page = has_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            is_of_browser = self._has_page and is_of_page(scope["path"])
            given = dict(scope["headers"]).get(b"authorization", b"")
            key = _key_in(given, takes_password=is_of_browser)
            if key is None or not hmac.compare_digest(key, self._key):
                error = RequestError("the key is missing or wrong: Authorization: Bearer KEY", 401, "auth_error")
                refusal = _refusal(error)
                if is_of_browser:
                    refusal.headers["WWW-Authenticate"] = 'Basic realm="sat_lora: the key as password", charset="UTF-8"'
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _key_in(authorization: bytes, *, takes_password: bool) -> bytes | None:
    """Return the key that a header brings; None where it brings none."""
    scheme, _, credentials = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials
    if scheme.lower() == b"basic" and takes_password:
        try:
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


class _Answer:
    """An answer on its way from the worker's thread to a client."""

    def __init__(self, question: Question, deadline: float, metrics: Metrics, arrival: float):
        self._question = question
        self._metrics = metrics
        self._arrival = arrival
        self._events: asyncio.Queue[Piece | End] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.speaker}
        self.job = Job(question, self._tell, deadline)

    def _tell(self, event: Piece | End) -> None:
        """Hand an event over from the worker's thread; nobody is told where the server has ended meanwhile."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def whole(self, request: Request) -> Response:
        """Return the answer in one piece. Raises RequestError where there is none."""
        text, end = await self._unless_gone(request, self._text())
        usage = self._usage_of(end)
        message = {"role": "assistant", "content": text.strip()}
        choice = {"index": 0, "message": message, "finish_reason": _reason(usage)}
        return JSONResponse({**self._head, "object": "chat.completion", "choices": [choice], "usage": _told(usage)})

    async def _text(self) -> tuple[str, End]:
        """Return all the pieces as one text, and the end."""
        text = ""
        while isinstance(event := await self._events.get(), Piece):
            text += event.text
        return text, event

    async def streamed(self, request: Request) -> Response:
        """Return the answer as server-sent events. Raises RequestError where it fails before its first piece."""
        first = await self._unless_gone(request, self._events.get())
        if isinstance(first, End) and first.error is not None:
            raise first.error
        return StreamingResponse(self._lines(first), media_type="text/event-stream")

    async def _unless_gone(self, request: Request, result: Coroutine[Any, Any, _T]) -> _T:
        """Return a result. Raises RequestError, and cancels the job, where the client goes before it is there."""
        tasks = asyncio.ensure_future(result), asyncio.ensure_future(_goes(request))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            self.job.is_cancelled.set()
            raise RequestError("the client has gone", 499)
        finally:
            for task in tasks:
                task.cancel()

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yield the pieces of the answer. Raises RequestError where it fails; cancels the job when it is closed."""
        try:
            while isinstance(event := await self._events.get(), Piece):
                yield event.text
            self._usage_of(event)
        finally:
            self.job.is_cancelled.set()

    async def _lines(self, event: Piece | End) -> AsyncIterator[str]:
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while isinstance(event, Piece):
                yield self._chunk({"content": event.text})
                event = await self._events.get()
            if event.error is not None:
                self._metrics.requests.labels(event.error.status).inc()
                yield _event(_error(event.error))
                return
            usage = self._usage_of(event)
            yield self._chunk({}, _reason(usage), _told(usage))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(_error(_unforeseen(error, self._metrics)))
        finally:
            self.job.is_cancelled.set()  # of a client that has gone

    def _chunk(self, delta: dict[str, str], reason: str | None = None, usage: dict[str, int] | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        more = {} if usage is None else {"usage": usage}
        return _event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def _usage_of(self, end: End) -> Usage:
        """Return what the answer took, counted. Raises RequestError where it failed."""
        if end.error is not None:
            raise end.error
        usage = end.usage or Usage(0, 0, True)
        self._metrics.requests.labels(200).inc()
        self._metrics.tokens.labels("prompt").inc(usage.prompt_tokens)
        self._metrics.tokens.labels("answer").inc(usage.completion_tokens)
        self._metrics.seconds.observe(time.monotonic() - self._arrival)
        return usage


async def _goes(request: Request) -> None:
    """Return when the client of a request that is read has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _reason(usage: Usage) -> str:
    return "stop" if usage.is_whole else "length"


def _told(usage: Usage) -> dict[str, int]:
    """Return OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _error(error: RequestError) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": error.kind, "param": None, "code": error.status}}


def _refusal(error: RequestError) -> Response:
    """Return an error as OpenAI's clients read it."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(_error(error), error.status, headers)


def _json(body: bytes) -> object:
    try:
        return parse_json(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error

"""What stands before the server: who may send requests where there is no key. And before the page: which of Gradio's
addresses are there at all, and what a request to them may hold.

Gradio has some seventy addresses: files by path, uploads, a proxy, ways to edit the app. The page needs the handful
below, none of which reads a file of a request's choice or fetches an address.
"""

import ipaddress
import re
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sat_lora.files.foreign import parse_json
from sat_lora.serve.bodies import Bodies
from sat_lora.serve.questions import RequestError

PAGE = "/"
OPEN = ("/health",)  # to everybody
_READ = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico"
    r"|/(?:assets|static)(?:/[\w-][\w.+-]*)+"
    r"|/gradio_api/(?:info|startup-events|theme\.css|queue/data|heartbeat/\w+)"
)
_WRITTEN = re.compile(r"/gradio_api/(?:queue/join|cancel|reset)")
_OF_FILES = ("path", "url", "file", "is_stream")
"""Keys by which Gradio's values name a file or an address."""

HEADERS = {
    # The browser fetches from this server alone, whatever the page or an answer says; Gradio makes functions of texts.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def is_of_page(path: str) -> bool:
    """Return whether an address is one of the page's: of those a browser asks its user for the key."""
    return bool(_READ.fullmatch(path) or _WRITTEN.fullmatch(path))


Refuse = Callable[[RequestError], ASGIApp]
"""Makes a response of an error."""


class OwnSenders:
    """Passes what this machine's programs and pages send, for a server without a key, and what is OPEN.

    The pages of other sites are open in browsers of this machine, too. They get at no answer: neither by sending
    requests here, which a browser marks with their origin, nor by a name of their own that leads here.
    """

    def __init__(self, app: ASGIApp, *, refuse: Refuse):
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                if not is_own_name(_header(scope, b"host") or ""):
                    raise RequestError(
                        "without a key the server answers at the names of this machine alone (localhost, 127.0.0.1); "
                        "start it with a key",
                        403,
                    )
                check_origin(scope)
            except RequestError as error:
                await self._refuse(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_origin(scope: Scope) -> None:
    """Raise RequestError where the page of another site sends the request; programs name no origin."""
    origin = _header(scope, b"origin")
    if origin is not None and _netloc(origin) != _header(scope, b"host"):
        raise RequestError("requests of other sites are not taken", 403)


def _header(scope: Scope, name: bytes) -> str | None:
    value = dict(scope["headers"]).get(name)
    return None if value is None else value.decode("latin-1")


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


class Gate:
    """Passes requests for the page on to it, and all others to the application.

    page: Gradio's application. refuse: makes a response of an error. bodies: reads those of requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        page: ASGIApp,
        refuse: Refuse,
        bodies: Bodies,
    ):
        self._app = app
        self._page = page
        self._refuse = refuse
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Nothing but http passes: the page has no web sockets."""
        if scope["type"] != "http" or not is_of_page(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            check_origin(scope)  # with a key as well: a browser brings that by itself
            passed, receive = await self._checked(scope, receive)
        except RequestError as error:
            await self._refuse(error)(scope, receive, send)
            return
        await self._page(passed, receive, _with_headers(send))

    async def _checked(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Return a request as it may pass. Raises RequestError for one that may not."""
        path = scope["path"]
        method = scope["method"]
        if _READ.fullmatch(path) and method in ("GET", "HEAD"):
            # What is asked of the page itself could name a state that was stored as a file.
            return ({**scope, "query_string": b""} if path == PAGE else scope), receive
        if not _WRITTEN.fullmatch(path) or method != "POST":
            raise RequestError(f"{method} is not what this address takes", 405)
        body = await self._bodies.read(receive)
        try:
            content = parse_json(body) if body else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {error}") from error
        if not isinstance(content, dict) or _names_a_file(content):
            raise RequestError("the page takes no file, address or path")
        return scope, _replayed(body, receive)


def is_own_name(host: str) -> bool:
    """Return whether the host of a request is a name of this machine that only it itself uses."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _names_a_file(value: object) -> bool:
    if isinstance(value, dict):
        return any(key in value for key in _OF_FILES) or any(map(_names_a_file, value.values()))
    return isinstance(value, list) and any(map(_names_a_file, value))


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once more, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _with_headers(send: Send) -> Callable[[Message], Awaitable[None]]:
    """Return a `send` that adds HEADERS, in place of those of the page by the same names."""
    ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = message.get("headers", [])
            kept = [(name, value) for name, value in given if name.lower().decode("latin-1") not in HEADERS]
            message = {**message, "headers": [*kept, *ours]}
        await send(message)

    return send_more

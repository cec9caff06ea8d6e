"""The bodies of requests: read whole, within limits of one and of all together."""

import asyncio

from starlette.types import Receive

from sat_lora.serve.questions import RequestError

BODIES_HELD = 16  # times the most that one may have


class Bodies:
    """Reads bodies. most: bytes of one; those being read have BODIES_HELD times as many. seconds: until it is whole."""

    def __init__(self, most: int, seconds: float):
        self._most = most
        self._seconds = seconds
        self._held = 0

    async def read(self, receive: Receive) -> bytes:
        """Return a request's body. Raises RequestError: of status 413 as soon as it is too long, 429 where too much is
        being read already, 408 where it takes too long, 499 where the client goes before its end.
        """
        parts: list[bytes] = []
        try:
            return await asyncio.wait_for(self._read(receive, parts), self._seconds)
        except asyncio.TimeoutError as error:  # noqa: UP041 (another class before Python 3.11)
            raise RequestError(f"the body has not come within {self._seconds:g} seconds", 408, "timeout") from error
        finally:
            self._held -= sum(map(len, parts))

    async def _read(self, receive: Receive, parts: list[bytes]) -> bytes:
        length = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError("the client has gone", 499)
            part = message.get("body", b"")
            parts.append(part)
            length += len(part)
            self._held += len(part)
            if length > self._most:
                raise RequestError(f"the body is longer than {self._most} bytes; send a smaller picture", 413)
            if self._held > BODIES_HELD * self._most:
                raise RequestError("too many large requests at once; try again", 429, "rate_limit_error")
            if not message.get("more_body"):
                return b"".join(parts)

"""What a request of OpenAI's chat completions asks: checked, before anything of the model hears of it.

Nothing is fetched and no file is read for a request: a picture comes in it, as a data URL.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sat_lora.cogvlm.decoding.sampling import Sampling
from sat_lora.cogvlm.inputs.picture_kinds import film_suffix
from sat_lora.errors import ConfigError
from sat_lora.printable import printable

SHOWN = 80  # characters of a value in a message
MOST_MESSAGES = 256
MOST_STOPS = 4  # as OpenAI's
FILM_PARTS = ("video_url", "video", "input_video")
NO_FILMS = "pictures alone are served: send a picture, or ask about films with sat-lora chat --image"
WITHOUT_MEANING = frozenset(
    "user store metadata stream_options parallel_tool_calls service_tier n safety_identifier prompt_cache_key".split()
)
"""Fields that change no answer here, and are passed over: n may be 1 alone."""


class RequestError(Exception):
    """A request that cannot be served. status: of HTTP. kind: OpenAI's `type` of the error."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Question:
    """One answer that is wanted: by whom, after which turns, and about which picture."""

    speaker: str
    query: str
    turns: tuple[tuple[str, str], ...]
    image: bytes | None
    sampling: Sampling
    max_new_tokens: int | None
    stop: tuple[str, ...]
    streams: bool


def read_question(content: object, *, speakers: Sequence[str], keeps_history: bool) -> Question:
    """Return the question of a request's json. speakers: names that `model` may have; the first is the default.

    keeps_history: whether the prompt format has a place for earlier turns. Raises RequestError with what is wrong.
    """
    if not isinstance(content, dict):
        raise RequestError(f"the body: got {_shown(content)}, wanted an object")
    fields = _Fields(content)
    speaker = fields.take("model", str, speakers[0])
    if speaker not in speakers:
        known = ", ".join(speakers)
        raise RequestError(f"model: there is no {_shown(speaker)}; there are: {known}", 404, "model_not_found")
    query, turns, image = _conversation(fields.take("messages", list, None))
    if turns and not keeps_history:
        raise RequestError(
            "messages: this base's prompt format has no place for earlier turns; send the question alone"
        )
    if fields.take("n", int, 1) != 1:
        raise RequestError("n: got more than one answer, wanted 1")
    most = fields.take("max_completion_tokens", int, None)
    most = fields.take("max_tokens", int, None) if most is None else most
    if most is not None and most < 1:
        raise RequestError(f"max_tokens: got {most}, wanted at least 1")
    stop = fields.take("stop", str | list, None) or []
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MOST_STOPS or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(f"stop: wanted a text, or at most {MOST_STOPS} of them, none empty")
    streams = fields.take("stream", bool, False)
    sampling = _sampling(fields)
    fields.refuse_others()
    return Question(
        speaker=speaker,
        query=query,
        turns=turns,
        image=image,
        sampling=sampling,
        max_new_tokens=most,
        stop=tuple(stop),
        streams=streams,
    )


class _Fields:
    """The fields of an object, taken one by one; null is a field left out."""

    def __init__(self, content: Mapping[str, Any]):
        self._left = {name: value for name, value in content.items() if value is not None}

    def take(self, name: str, kind: Any, default: Any) -> Any:
        """Return a field's value. Raises RequestError if it is of another type."""
        value = self._left.pop(name, default)
        is_wrong = isinstance(value, bool) and kind is not bool
        if value is not default and (is_wrong or not isinstance(value, kind)):
            raise RequestError(f"{name}: got {_shown(value)}, wanted {_KINDS.get(kind, 'a text or a list of texts')}")
        return value

    def refuse_others(self) -> None:
        """Raise RequestError if fields are left that would change the answer."""
        if others := sorted(set(self._left) - WITHOUT_MEANING):
            raise RequestError(f"{', '.join(map(_shown, others[:5]))}: not known here; leave it out")


_KINDS: dict[Any, str] = {
    str: "a text",
    list: "a list",
    int: "a whole number",
    bool: "true or false",
    int | float: "a number",
}


def _sampling(fields: _Fields) -> Sampling:
    """Return how tokens are chosen; the likeliest, where nothing is said. Raises RequestError for wrong numbers."""
    for name in ("frequency_penalty", "presence_penalty"):
        if fields.take(name, int | float, 0):
            raise RequestError(f"{name}: not known here; repetition_penalty is")
    known: dict[str, Any] = {
        "temperature": float(fields.take("temperature", int | float, 0)),
        "top_p": float(fields.take("top_p", int | float, 1)),
        "top_k": fields.take("top_k", int, 0),
        "repetition_penalty": float(fields.take("repetition_penalty", int | float, 1)),
        "seed": fields.take("seed", int, None),
    }
    if known["temperature"] == 0:  # the likeliest token is the likeliest of any
        known |= {"top_p": 1.0, "top_k": 0}
    if known["seed"] is not None and not -(2**63) <= known["seed"] < 2**63:
        raise RequestError("seed: wanted a whole number of 64 bits")
    try:
        return Sampling(**known)
    except ConfigError as error:
        raise RequestError(str(error)) from error


def _conversation(messages: Any) -> tuple[str, tuple[tuple[str, str], ...], bytes | None]:
    """Return the last question, the turns before it, and the picture."""
    if not messages:
        raise RequestError("messages: wanted at least one, of the user")
    if len(messages) > MOST_MESSAGES:
        raise RequestError(f"messages: got {len(messages)}, wanted {MOST_MESSAGES} at most")
    texts: list[str] = []
    images: list[bytes] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where}: got {_shown(message)}, wanted an object with role and content")
        role = message.get("role")
        if role in ("system", "developer"):
            raise RequestError(
                f"{where}: CogVLM's prompt formats have no place for a {role} text; put it into the question"
            )
        expected = ("user", "assistant")[len(texts) % 2]
        if role != expected:
            raise RequestError(f"{where}.role: got {_shown(role)}, wanted {expected!r}: user and assistant take turns")
        texts.append(_text_of(message.get("content"), f"{where}.content", images if role == "user" else None))
    if len(texts) % 2 == 0:
        raise RequestError("messages: the last one has to be the user's")
    if len(images) > 1:
        raise RequestError(f"messages: got {len(images)} pictures, and this base takes one in a conversation")
    return texts[-1], tuple(zip(texts[:-1:2], texts[1::2])), images[0] if images else None


def _text_of(content: object, where: str, images: list[bytes] | None) -> str:
    """Return the text of a message's content, and add its pictures to `images`; None where there may be none."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: got {_shown(content)}, wanted a text or a list of parts")
    texts = []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in FILM_PARTS:
            raise RequestError(f"{place}: a film; {NO_FILMS}")
        elif kind == "image_url" and images is not None:
            url = part.get("image_url")
            images.append(_content_of(url.get("url") if isinstance(url, dict) else url, f"{place}.image_url"))
        else:
            wanted = "a part of type text" + (" or image_url" if images is not None else "")
            raise RequestError(f"{place}: got {_shown(part)}, wanted {wanted}")
    return "\n".join(texts)


def _content_of(url: object, where: str) -> bytes:
    """Return the bytes of a data URL."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise RequestError(
            f"{where}: got {_shown(url)}, wanted data:image/png;base64,...: no address is fetched and no file is read"
        )
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: its base64 is broken") from error
    if head.lower().startswith("data:video/") or film_suffix(content[:400]) is not None:
        raise RequestError(f"{where}: a film; {NO_FILMS}")
    return content


def _shown(value: object) -> str:
    """Return the beginning of a value, as a message may show it."""
    text = printable(repr(value)) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

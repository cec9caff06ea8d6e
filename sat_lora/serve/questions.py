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
from sat_lora.data.records.turns import is_left_out
from sat_lora.errors import ConfigError
from sat_lora.printable import printable

SHOWN = 80  # characters of a value in a message
BITS_SHOWN = 256  # of a number; Python writes none of thousands of digits
MOST_MESSAGES = 256
MOST_STOPS = 4  # as OpenAI's
FILM_PARTS = ("video_url", "video", "input_video")
NO_FILMS = "pictures alone are served: send a picture, or ask about films with sat-lora chat --image"
WITHOUT_MEANING = frozenset(
    "user store metadata stream_options parallel_tool_calls service_tier safety_identifier prompt_cache_key "
    "prompt_cache_retention prediction".split()
)
"""Fields that change no answer here, and are passed over."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not known here, and the values of theirs that ask for nothing, and are passed over."""


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
    if (answers := fields.take("n", int, 1)) != 1:
        raise RequestError(f"n: got {_shown(answers)}, wanted 1: a request has one answer")
    most = _most_tokens(fields)
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

    def number(self, name: str, default: float) -> float:
        """Return a field's value. Raises RequestError if it is no number, or too large for one that is calculated with.

        JSON has numbers of any size.
        """
        value = self.take(name, int | float, default)
        try:
            return float(value)
        except OverflowError as error:
            raise RequestError(f"{name}: got {_shown(value)}, which is too large") from error

    def refuse_others(self) -> None:
        """Raise RequestError if fields are left that would change the answer."""
        others = sorted(name for name, value in self._left.items() if not _changes_nothing(name, value))
        if others:
            raise RequestError(f"{', '.join(map(_shown, others[:5]))}: not known here; leave it out")


def _changes_nothing(name: str, value: Any) -> bool:
    """Return whether a field that is not known here may be passed over. False is not the 0 that Python takes it for."""
    return name in WITHOUT_MEANING or any(
        type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(name, ())
    )


_KINDS: dict[Any, str] = {
    str: "a text",
    list: "a list",
    int: "a whole number",
    bool: "true or false",
    int | float: "a number",
}


def _most_tokens(fields: _Fields) -> int | None:
    """Return how many tokens the answer may have, under the newer or the older of OpenAI's names, or both."""
    given = {name: fields.take(name, int, None) for name in ("max_completion_tokens", "max_tokens")}
    wanted = {name: most for name, most in given.items() if most is not None}
    for name, most in wanted.items():
        if most < 1:
            raise RequestError(f"{name}: got {_shown(most)}, wanted at least 1")
    if len({*wanted.values()}) > 1:
        raise RequestError("max_tokens and max_completion_tokens: got two different numbers; give one of them")
    return next(iter(wanted.values()), None)


def _sampling(fields: _Fields) -> Sampling:
    """Return how tokens are chosen; the likeliest, where nothing is said. Raises RequestError for wrong numbers."""
    for name in ("frequency_penalty", "presence_penalty"):
        if fields.number(name, 0):
            raise RequestError(f"{name}: not known here; repetition_penalty is")
    known: dict[str, Any] = {
        "temperature": fields.number("temperature", 0),
        "top_p": fields.number("top_p", 1),
        "top_k": fields.take("top_k", int, 0),
        "repetition_penalty": fields.number("repetition_penalty", 1),
        "seed": fields.take("seed", int, None),
    }
    if known["temperature"] == 0:  # the likeliest token is the likeliest of any
        known |= {"top_p": 1.0, "top_k": 0}
    if known["top_k"] < 0:
        raise RequestError(f"top_k: got {_shown(known['top_k'])}, wanted a whole number, 0 for all tokens")
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
        _refuse_others(message, ("role", "content", "name"), where)
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
    if not content:
        raise RequestError(f"{where}: got an empty list, wanted a text or at least one part")
    texts = []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _refuse_others(part, ("type", "text"), place)
            texts.append(part["text"])
        elif kind in FILM_PARTS:
            raise RequestError(f"{place}: a film; {NO_FILMS}")
        elif kind == "image_url" and images is not None:
            _refuse_others(part, ("type", "image_url"), place)
            url = part.get("image_url")
            images.append(_content_of(url.get("url") if isinstance(url, dict) else url, f"{place}.image_url"))
        else:
            wanted = "a part of type text" + (" or image_url" if images is not None else "")
            raise RequestError(f"{place}: got {_shown(part)}, wanted {wanted}")
    return "\n".join(texts)


def _refuse_others(part: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise RequestError where a message or a part of one says more than the known fields, as a picture under another
    name; what is empty, as it stands in OpenAI's own answers, says nothing, and neither does a cache's mark.
    """
    passed_over = (*known, "cache_control")
    others = sorted(name for name, value in part.items() if name not in passed_over and not is_left_out(value))
    if others:
        raise RequestError(
            f"{where}: {', '.join(map(_shown, others[:5]))}: not known here; leave it out, and send a picture as a "
            'part of the content: {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
        )


def _content_of(url: object, where: str) -> bytes:
    """Return the bytes of a data URL."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    kind = head.lower()  # a scheme is one in any case, and so is base64
    if not comma or not kind.startswith("data:") or not kind.endswith(";base64"):
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
    if isinstance(value, int) and value.bit_length() > BITS_SHOWN:
        return f"a number of {value.bit_length()} bits"
    text = printable(repr(value)) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

"""Lists of turns, however their roles and texts are called: checked for their order, and put in pairs."""

import json
import mimetypes
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sat_lora.data.records.record import FILM_MARK, TURNS, Fields, RecordError, RecordOptions, listed

ROLES = {
    "user": "user", "human": "user", "question": "user", "prompter": "user", "usr": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "cogvlm": "assistant", "answer": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
_TURN_KEYS = frozenset(TURNS)
NOTES = frozenset("id name source timestamp created_at".split())
"""What stands in a turn and says nothing of it."""
LEARNT_KEYS = ("weight", "loss", "train", "training")
"""Keys of a turn that say whether its answer is learnt, as in the data of OpenAI, ms-swift and axolotl."""
_FILM_KEYS = ("video", "videos")
_IMAGE_KEYS = ("image", "images", *_FILM_KEYS)
"""Keys of a turn that name its images, as in GLM-4V's data; they stand before its text, or where it has marks."""
_TAGGED = re.compile(r"(?:Picture \d+:\s?)?<img>([^<>\n]+)</img>")
"""The image that a text of Qwen-VL's data names."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "image", "input_image", "video_url", "video", "input_video")
_PART_KEYS = ("image_url", "image", "video_url", "video", "url", "path", "source")

Turn = tuple[str, str]
"""The role and the text of a turn."""


def turns_key(record: Mapping[str, Any]) -> str | None:
    """Return the key of a record's list of turns; None if there is none, or not exactly one."""
    if _TURN_KEYS.isdisjoint(record):
        return None
    keys = [key for key in record if key in TURNS and isinstance(record[key], list) and record[key]]
    return keys[0] if len(keys) == 1 else None


def first_turn(record: Mapping[str, Any]) -> Any:
    """Return the first element of a record's list of turns; None if there is none."""
    key = turns_key(record)
    return None if key is None else record[key][0]


def is_left_out(value: Any) -> bool:
    """Return whether a value of a key that is not read says nothing: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})


def passed_over_by(keys: Sequence[str]) -> str:
    """Return which option passes over keys, as a clause."""
    return f"--ignore-keys {' '.join(shlex.quote(key[:60]) for key in keys[:5])} passes over what is not to be learnt"


def rewrite_turns(record: Fields, role_key: str, text_key: str, options: RecordOptions) -> list[Fields]:
    """Return the record with its list of turns as prompt, answer, history and system, in a list.

    role_key, text_key: of a turn. Images that stand among the parts of a text are put before those of the record.
    Raises RecordError.
    """
    key = turns_key(record) or ""
    images: list[Any] = []
    problems: list[str] = []
    turns: list[Turn] = []
    unlearnt: list[int] = []
    for number, turn in enumerate(record[key], 1):
        try:
            turns.append(_read_turn(turn, role_key, text_key, options, images))
            if turns[-1][0] == "assistant" and not _is_learnt(turn, options.ignored):
                unlearnt.append(number - 1)
        except RecordError as error:
            problems += [f'turn {number} of "{key}" {problem}' for problem in error.problems]
    if problems:
        raise RecordError(*problems)
    fields = with_turns(record, key, turns, images)
    if unlearnt and unlearnt[-1] == len(turns) - 1:
        named = [name for name in LEARNT_KEYS if name in record[key][-1]]
        raise RecordError(
            f'the last answer of "{key}" is not to be learnt ({listed(named)}), so its turns teach nothing; leave the '
            f"last ones out, or give --ignore-keys {' '.join(named)} to learn it"
        )
    first = len(turns) % 2  # a system text stands before the turns
    return [{**fields, "unlearnt": [(place - first) // 2 for place in unlearnt]} if unlearnt else fields]


def with_turns(record: Fields, key: str, turns: Sequence[Turn], images: Sequence[Any] = ()) -> Fields:
    """Return the record with these turns as prompt, answer, history and system in place of its list under `key`.

    Raises RecordError if their order is not (system), user, assistant, user, assistant, ...
    """
    systems = [text for role, text in turns if role == "system"]
    rest = [*turns[1:]] if turns and turns[0][0] == "system" else [*turns]
    for number, (role, _) in enumerate(rest):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            place = number + 1 + len(turns) - len(rest)
            raise RecordError(
                f'turn {place} of "{key}" is of the {role}, wanted the {wanted}: turns go user, assistant, user, '
                "assistant, with a system text before the first alone"
            )
    if not rest or len(rest) % 2:
        last = "there is no turn" if not rest else "the last turn is of the user, and nobody answers"
        raise RecordError(f'"{key}": {last}; a conversation ends with an answer to learn')
    twice = [name for name in ("prompt", "answer", "history") if record.get(name) is not None]
    if systems and record.get("system"):
        twice.append("system")
    if twice:
        raise RecordError(f'{listed(twice)} beside "{key}", which says the same; leave one of them out')
    pairs = [(rest[place][1], rest[place + 1][1]) for place in range(0, len(rest), 2)]
    fields = {name: value for name, value in record.items() if name != key}
    fields |= {"prompt": pairs[-1][0], "answer": pairs[-1][1]}
    if pairs[1:]:
        fields["history"] = pairs[:-1]
    if systems:
        fields["system"] = systems[0]
    if images:
        if any(record.get(name) for name in ("image", "images")):
            raise RecordError(f'images among the turns of "{key}" and beside them; name each in one place')
        fields["image"] = [*images]
    return fields


def _is_learnt(turn: Mapping[str, Any], ignored: Collection[str]) -> bool:
    """Return whether the answer of a turn is learnt. Raises RecordError for a weight that is neither 0 nor 1."""
    values = {key: turn[key] for key in LEARNT_KEYS if turn.get(key) is not None and key not in ignored}
    for key, value in values.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError(
                f'has "{key}" {json.dumps(value)[:20]}: an answer is learnt (1) or not (0); {passed_over_by([key])}'
            )
    return all(values.values())


def _read_turn(turn: Any, role_key: str, text_key: str, options: RecordOptions, images: list[Any]) -> Turn:
    """Return a turn, and add its images to `images`."""
    mark = options.image_mark
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise RecordError(f'is not {{"{role_key}": ..., "{text_key}": ...}}')
    known = {role_key, text_key, *NOTES, *_IMAGE_KEYS, *LEARNT_KEYS, *options.ignored}
    unknown = [key for key, value in turn.items() if key not in known and not is_left_out(value)]
    if unknown:
        raise RecordError(f"has {listed(unknown, 5)}, which is not read; {passed_over_by(unknown)}")
    name = turn[role_key]
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RecordError(f"is of {str(name)[:40]!r}; known are user, assistant, system and what others call them")
    content = turn[text_key]
    own = [image for key in _IMAGE_KEYS if key not in options.ignored for image in _listed(turn.get(key))]
    if own and role != "user":
        raise RecordError(f"of the {role} has an image; images stand in turns of the user")
    if isinstance(content, str):
        if role == "user":
            if any(turn.get(key) is not None for key in _FILM_KEYS) and mark and mark not in content:
                content = content.replace(FILM_MARK, mark)
            named = [tag for tag in _TAGGED.finditer(content) if _names_an_image(tag[1], options)]
            for tag in reversed(named):
                content = content[: tag.start()] + mark + content[tag.end() :]
            images += [*own, *(tag[1] for tag in named)]
            missing = len(own) if not mark or mark not in content else 0
            content = mark * missing + content
        return role, content
    if own:
        raise RecordError("has images among its parts and beside them; name each in one place")
    if not isinstance(content, list):
        raise RecordError(f'has no text in "{text_key}"')
    texts = []
    for part in content:
        text, image = _read_part(part)
        texts.append(mark if text is None else text)
        if text is None and role != "user":
            raise RecordError(f"of the {role} has an image; images stand in turns of the user")
        if image is not None:
            images.append(image)
    return role, "".join(texts)


def _names_an_image(text: str, options: RecordOptions) -> bool:
    """Return whether what stands in <img> names an image: HTML that is asked about has other texts there."""
    if text.startswith("data:") or "://" in text:
        return True
    kind, _ = mimetypes.guess_type(text.strip(), strict=False)
    is_picture = kind is not None and kind.startswith(("image/", "video/"))
    return is_picture or (options.folder is not None and os.path.isfile(options.folder / text))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _read_part(part: Any) -> tuple[str | None, Any]:
    """Return (text, None) of a part, or (None, the image): None as well where that is named beside the turns."""
    if isinstance(part, str):
        return part, None
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None and isinstance(part, dict):  # Qwen's parts have no type
        kind = next((name for name in ("text", "image", "video") if name in part), None)
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"], None
    if kind in _IMAGE_PARTS:
        image = next((part[name] for name in _PART_KEYS if part.get(name) is not None), None)
        return None, image
    raise RecordError(f"has a part of type {str(kind)[:40]!r}; known are text and image_url")

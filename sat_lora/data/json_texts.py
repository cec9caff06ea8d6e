"""JSON that people and editors wrote: read value by value, each key once, and what is wrong with it in plain words."""

import json
import re
from collections import Counter
from collections.abc import Iterator

from sat_lora.files.foreign import parse_json, parse_json_at

SPACE = " \t\n\r"  # what JSON calls so


def read_object(content: bytes | str) -> object:
    """Return what the JSON of one sample says.

    Raises ValueError, with what may help, if it is no JSON or names a key twice.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        return parse_json(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(json_problem(error)) from None
    except ValueError as error:
        raise ValueError(short_problem(error)) from None


class Place:
    """A position in a text, and the number of its line."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self._counted = 0
        self._line = 1

    def line_at(self, position: int) -> int:
        """Return the number, from 1, of the line that the position lies in."""
        if position < self._counted:
            return 1 + self.text.count("\n", 0, position)
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def skip(self, characters: str) -> str:
        """Go on to the first character that is none of these, and return it; "" at the end."""
        while self.position < len(self.text) and self.text[self.position] in characters:
            self.position += 1
        return self.text[self.position : self.position + 1]


def elements(place: Place) -> Iterator[tuple[int, object]]:
    """Yield (line, value) of an array's elements, or of objects one after the other.

    Raises json.JSONDecodeError or ValueError at the first that is no JSON.
    """
    opened = place.skip(SPACE + "\ufeff") == "["
    place.position += opened
    first = True
    while following := place.skip(SPACE + ("" if opened else "\ufeff\x1a")):
        if opened and following == "]" and first:
            break
        number = place.line_at(place.position)
        value, place.position = parse_json_at(place.text, place.position, object_pairs_hook=unique_keys)
        yield number, value
        first = False
        following = place.skip(SPACE)
        if opened and following == "]":
            break
        if opened:
            if following != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", place.text, place.position)
            place.position += 1
    else:
        if opened:
            raise json.JSONDecodeError("Expecting value", place.text, place.position)
        return
    place.position += 1
    if place.skip(SPACE + "\ufeff\x1a"):
        raise json.JSONDecodeError("Extra data", place.text, place.position)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return the object of the pairs. Raises ValueError if a key comes twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f'the key "{twice[:60]}" comes twice in one object')
    return content


def short_problem(error: ValueError) -> str:
    """Return what an error of parsing says, in short."""
    text = str(error)
    return "a number has thousands of digits" if "integer string conversion" in text else text


def json_problem(error: json.JSONDecodeError) -> str:
    """Return the parser's words, the place, and the usual cause, as one clause."""
    at = error.doc[error.pos : error.pos + 1]
    before = error.doc[: error.pos].rstrip()
    begins = error.doc[error.pos : error.pos + 8].lstrip()
    cause = ""
    if "\0" in error.doc[error.pos : error.pos + 2]:
        cause = "NUL bytes: the file was cut off, or never written to its end"
    elif at == "'":
        cause = "Python's way to write it; json.dumps writes JSON"
    elif re.match(r"None|True|False", begins):
        cause = "Python's word; JSON says null, true and false"
    elif at in ("\u201c", "\u201d", "\u201e", "\u2018", "\u2019"):
        cause = 'typographic quotes; JSON has " alone'
    elif begins.startswith(("//", "/*", "#")):
        cause = "JSON has no comments"
    elif error.msg == "Extra data" and not error.doc.lstrip(SPACE + "\ufeff").startswith(("{", "[")):
        cause = "a sample begins with {"
    elif (at in ("}", "]") and before.endswith(",")) or (error.msg in ("Extra data", "Expecting value") and at == ","):
        cause = "a comma too many"
    elif at.isspace() and at not in SPACE:
        cause = f"U+{ord(at):04X} is no space of JSON"
    elif error.msg == "Extra data":
        cause = "one object per line"
    elif error.msg.startswith("Invalid control character"):
        cause = f"U+{ord(at or chr(0)):04X} as it is; inside a text it is written \\u{ord(at or chr(0)):04x}"
    elif error.msg.startswith("Invalid \\escape"):
        cause = "a backslash is written \\\\"
    elif not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated"):
        cause = "it ends too early"
    elif error.msg.startswith("Expecting ',' delimiter"):
        cause = "a comma is missing, or the backslash before a quote inside a text"
    elif error.pos == 0:
        cause = "a sample begins with {"
    return f"{error.msg.removesuffix(' at')} at column {error.colno}" + (f" ({cause})" if cause else "")

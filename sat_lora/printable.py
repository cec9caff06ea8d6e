"""Names and texts of others, shown without harm: a terminal and a shell take them for what they are."""

import os
import shlex
from collections.abc import Iterable


def printable(name: object) -> str:
    """Return `name` as text of one line that a terminal only shows.

    Control and format characters, line separators and lone surrogates (bytes that are no UTF-8 among them) are escaped
    as Python would.
    """
    text = str(name)
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def printable_lines(text: object) -> str:
    """Return `text` as `printable` gives it, its line feeds kept: for a message at the edge, whose lines are
    our own.
    """
    return "\n".join(map(printable, str(text).split("\n")))


def shell_line(arguments: Iterable[object]) -> str:
    """Return the arguments as a line for a shell.

    A name that a terminal would obey is written by escapes, which bash, zsh and ksh read as the name that it is.
    """
    return " ".join(map(_shell_word, map(str, arguments)))


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = {"\\": "\\\\", "'": "\\'"}
    text = "".join(escaped.get(c, c) if c.isprintable() else _octal(c) for c in word)
    return f"$'{text}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(character))

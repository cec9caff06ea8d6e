"""A conversation in a terminal: what is typed, commands among it, and answers as they come."""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

from sat_lora.chat.session import Chat
from sat_lora.cogvlm.inputs.picture_kinds import FILM_SUFFIXES, SUFFIXES
from sat_lora.errors import ConfigError, SatLoraError
from sat_lora.files.foreign import os_problem
from sat_lora.printable import printable, printable_lines

HELP = """\
/image FILE      begin anew, about this picture; so does its path alone, typed, pasted or dragged here
                 (CogVLM2-Video: this film, or the folder with its frames as pictures)
/adapter [NAME]  let this adapter answer; without a name, list them
/base            let the base answer
/compare TEXT    the answers of the base and of every adapter, which the conversation does not keep
/set NAME VALUE  temperature, top_p, top_k, repetition_penalty, seed or max_new_tokens; without, show them
/reset           forget the conversation, not the picture
/save FILE       write the conversation as json
/help            this list
/quit            end, as Ctrl-D does"""
NUMBERS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "seed": int,
}
MOST_NEW_TOKENS = "max_new_tokens"


class Conversation:
    """What happens with each line of a conversation, on every rank of a model alike.

    out: where answers go; nowhere, for all ranks but one. is_alone: whether Ctrl-C may stop an answer: the ranks of a
    model would stop at different tokens, and wait for each other.
    """

    def __init__(self, chat: Chat, out: TextIO | None, *, is_alone: bool = True):
        self._chat = chat
        self._out = out
        self._is_alone = is_alone
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "adapter": self._adapter,
            "base": lambda rest: self._use("base"),
            "compare": self._compare,
            "set": self._set,
            "reset": self._reset,
            "save": self._save,
            "help": lambda rest: self.say(HELP),
        }

    def greet(self) -> None:
        """Say who answers, and what this prompt format cannot."""
        self.say(f"{self._speakers()}; /help lists the commands")
        alone = "" if self._chat.keeps_history else ", which has no place for earlier turns: every question is alone"
        self.say(f"the prompt format is {self._chat.version}{alone}")

    def take(self, line: str) -> bool:
        """Act on a line and return whether the conversation goes on. What is wrong is said, and ends nothing."""
        line = line.strip()
        if not line:
            return True
        image = dropped_image(line, takes_frames=self._chat.takes_frames)
        word, _, rest = line[1:].partition(" ") if line.startswith("/") and image is None else ("", "", line)
        if word in ("quit", "exit"):
            return False
        try:
            if image is not None:
                self._image(str(image))
            elif line.startswith("/"):
                self._command(word)(rest.strip())
            else:
                with closing(self._chat.stream(line)) as pieces:
                    self._answer(pieces)
                self._tell_what_is_left_out()
        except KeyboardInterrupt:
            if not self._is_alone:
                raise
            self.say("\nstopped")
        except SatLoraError as error:
            self.say(f"error: {error}")
        return True

    def say(self, text: str) -> None:
        """Write a line of our own."""
        self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        """Write a text of whomever: a terminal is to show it, not to obey it."""
        if self._out is not None:
            print(printable_lines(text), end="", file=self._out, flush=True)

    def _command(self, word: str) -> Callable[[str], None]:
        """Return what a command does. Raises ConfigError, with the nearest ones, if there is none."""
        if word not in self._commands:
            near = difflib.get_close_matches(word, [*self._commands, "quit"], 1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise ConfigError(f"there is no command /{printable(word)}; {hint}")
        return self._commands[word]

    def _answer(self, pieces: Iterator[str]) -> None:
        """Write an answer as it comes."""
        for piece in pieces:
            self._write(piece)
        self.say("")

    def _tell_what_is_left_out(self) -> None:
        if self._chat.left_out:
            turns = "the oldest turn" if self._chat.left_out == 1 else f"the {self._chat.left_out} oldest turns"
            self.say(f"(without {turns}: question and answer may have {self._chat.max_length} tokens together)")

    def _image(self, rest: str) -> None:
        path = typed_path(rest)
        if not rest:
            raise ConfigError("/image: which? give a file")
        self._chat.show(path)
        self.say(f"about {printable(path)}")

    def _adapter(self, rest: str) -> None:
        if rest:
            self._use(rest)
        else:
            self.say(self._speakers())

    def _use(self, name: str) -> None:
        self._chat.use(name)
        self.say(self._speakers())

    def _speakers(self) -> str:
        others = [name for name in ("base", *self._chat.adapters) if name != self._chat.speaker]
        return f"{self._chat.speaker} answers" + (f" (there are also: {', '.join(others)})" if others else "")

    def _compare(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/compare: give a question")
        with closing(self._chat.compare(rest)) as comparison:
            for name, pieces in comparison:
                self._write(f"{name}: ")
                self._answer(pieces)

    def _set(self, rest: str) -> None:
        name, _, text = rest.replace("=", " ").partition(" ")
        known = {**{name: getattr(self._chat.sampling, name) for name in NUMBERS}}
        known[MOST_NEW_TOKENS] = self._chat.max_new_tokens
        if not rest:
            self.say(", ".join(f"{name} {value}" for name, value in known.items()))
            return
        if name not in known:
            raise ConfigError(f"/set: got {printable(name)!r}, wanted one of {', '.join(known)}")
        try:
            value = NUMBERS.get(name, int)(text.strip())
        except ValueError as error:
            raise ConfigError(f"/set {name}: got {printable(text.strip())!r}, wanted a number") from error
        if name != MOST_NEW_TOKENS:
            self._chat.sampling = replace(self._chat.sampling, **{name: value})
        elif value < 1:
            raise ConfigError(f"/set {name}: got {value}, wanted at least 1")
        else:
            self._chat.max_new_tokens = value
        self.say(f"{name} {value}")

    def _reset(self, rest: str) -> None:
        self._chat.reset(keeps_image=True)
        self.say("forgotten" + (", the picture stays" if self._chat.has_image else ""))

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save: give a file")
        if self._out is None:  # the first rank writes
            return
        path = typed_path(rest)
        if os.path.lexists(path):
            raise ConfigError(f"/save: {printable(path)} exists; give a new file")
        try:
            self._chat.save(path)
        except OSError as error:
            raise ConfigError(f"/save: {printable(path)}: {os_problem(error)}") from error
        self.say(f"{len(self._chat.turns)} turns in {printable(path)}")


def typed_path(text: str) -> Path:
    """Return the path that was typed, pasted or dragged: in quotes, with escaped spaces, as a file:// address, with ~.

    What names a file as it stands is that file, whatever it looks like.
    """
    if os.path.lexists(text):
        return Path(text)
    try:
        parts = shlex.split(text)
    except ValueError:  # a quotation mark without its other
        parts = []
    name = parts[0] if len(parts) == 1 else text
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    return Path(name).expanduser()


def dropped_image(line: str, *, takes_frames: bool = False) -> Path | None:
    """Return the picture or the film that a line names and that is there; None where the line is something else.

    takes_frames: whether the base takes films, of which each may be a folder, too. That is named by a path with a
    slash, as terminals paste it: a word alone is a question.
    """
    try:
        path = typed_path(line)
        if path.suffix.lower() in SUFFIXES | FILM_SUFFIXES and path.is_file():
            return path
        return path if takes_frames and "/" in line and path.is_dir() and _has_pictures(path) else None
    except (OSError, ValueError, RuntimeError):  # too long for a name, a zero byte, nobody's home
        return None


def _has_pictures(folder: Path) -> bool:
    return any(Path(name).suffix.lower() in SUFFIXES for name in os.listdir(folder))


def typed_lines(chat: Chat) -> Iterator[str]:
    """Yield what is typed: line by line, with history and completion where prompt_toolkit is installed.

    Where the input is no terminal its lines come as they are.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    read = _toolkit_reader() or input
    while True:
        try:
            yield read(f"{printable(chat.speaker)}> ")
        except EOFError:
            print()
            return


def _toolkit_reader() -> Callable[[str], str] | None:
    """Return a function that reads a line with prompt_toolkit; None where that is not installed."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
    except ImportError:
        return None
    commands = [line.split()[0] for line in HELP.splitlines()]
    session: Any = PromptSession(completer=WordCompleter(commands, sentence=True), complete_while_typing=False)
    return session.prompt


def converse(conversation: Conversation, lines: Iterable[str]) -> None:
    """Take the lines one after the other until they end, or one of them ends the conversation."""
    conversation.greet()
    for line in lines:
        if not conversation.take(line):
            return

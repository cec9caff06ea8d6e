"""A field of a section of `TrainConfig`: what it says of itself in its metadata, as an option, and what fits it."""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from sat_lora.printable import printable
from sat_lora.terminal.option_parser import PLACES

YES = ("true", "yes", "on")
NO = ("false", "no", "off")
SHOWN = 60  # characters of a value in a message


def setting(
    default: Any,
    help: str,
    *names: str,
    group: str | None = None,
    resumed: bool = True,
    left_to: str | None = None,
    accepts: Callable[[Any], bool] | None = None,
    wanted: str = "",
    **option: Any,
) -> Any:
    """Return a field of a section, for its dataclass.

    names: the spellings of its option; none where a file alone can set it. group: the heading of the option in --help
    where that is not the section's. resumed: whether a run that goes on takes it over. left_to: what decides it
    where nobody has said it, "the machine" or "the base". accepts, wanted: which values fit, where no option says so.
    option: what `add_argument` takes; `choices` may be a function that gives them.
    """
    about = dict(help=help, options=names, group=group, resumed=resumed, left_to=left_to)
    return field(default=default, metadata={**about, "accepts": accepts, "wanted": wanted, "option": option})


def flag(default: bool, help: str, *names: str, **more: Any) -> Any:
    """Return a field that is true or false, whose option has no value. more: arguments of `setting`."""
    return setting(default, help, *names, action="store_true", **more)


@dataclass(frozen=True, kw_only=True)
class Known:
    """A field of a section, as everything that reads or shows settings sees it."""

    name: str
    section: str
    """The name of the section."""
    default: Any
    """The default as JSON has it: a list where the section has a tuple."""
    help: str
    options: tuple[str, ...]
    """The spellings of its option; empty where a file alone can set it."""
    group: str
    """The heading of the option in --help."""
    resumed: bool = True
    left_to: str | None = None
    accepts: Callable[[Any], bool] | None = None
    wanted: str = ""
    option: Mapping[str, Any]
    """What `add_argument` takes; see `setting` for this and the rest."""

    @classmethod
    def of(cls, section: str, group: str, source: Field) -> "Known":
        """Return the field `source` of the section of that name; `group` is the section's heading in --help."""
        default = source.default_factory() if source.default_factory is not MISSING else source.default
        about = {**source.metadata, "group": source.metadata["group"] or group}
        return cls(name=source.name, section=section, default=plain(default), **about)

    @property
    def is_flag(self) -> bool:
        """Whether the values are true and false."""
        return isinstance(self.default, bool)

    @property
    def choices(self) -> list | None:
        """The values that it may have; None where they cannot be listed."""
        choices = self.option.get("choices")
        return list(choices()) if callable(choices) else None if choices is None else list(choices)

    def add_to(self, group: argparse._ActionsContainer, *others: str, help: str | None = None) -> None:
        """Add its option to a parser or a group of one; without a default, so that what is not given is not there.

        others: further spellings of it. help: what it says there; None takes its own, and its default.
        """
        if not self.options:
            return
        settings = {name: value for name, value in self.option.items() if name != "choices"}
        if self.choices is not None:
            settings["choices"] = self.choices
        text = self.help + self._default_text() if help is None else help
        settings.setdefault("dest", self.name)
        group.add_argument(*self.options, *others, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **settings)

    def _default_text(self) -> str:
        """Return the end of the help that names the default; empty where the help itself says it."""
        shown = " ".join(map(str, self.default)) if isinstance(self.default, list | dict) else self.default
        is_said = self.is_flag or shown in (None, "") or self.section == "compatibility"
        return "" if is_said else f" (default: {shown})"

    def checked(self, value: Any) -> Any:
        """Return a value from a file that programs write, if it fits. Raises ValueError, which says what was wanted."""
        if json.dumps(value, default=repr) == json.dumps(self.default):  # as text, since True == 1 == 1.0
            return value
        try:
            return self._fitting(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error).rpartition("wanted ")[2]) from None

    def written(self, value: Any) -> Any:
        """Return what a value from a file that people write means. Raises ValueError, which says what was wanted, where
        it does not fit.

        A text may stand for a number or for true and false, and a single text for a list of them; `~/` at the
        beginning of a path is the user's own folder.
        """
        try:
            return self._at_home(self.checked(self._meant(value)))
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error).rpartition("wanted ")[2]) from None

    def _meant(self, value: Any) -> Any:
        """Return what a person means by a value: what YAML takes for a text is a number where a number is wanted."""
        convert = self.option.get("type")
        if self.accepts is not None:
            return [_number(entry) for entry in value] if isinstance(value, list) else _number(value)
        if self.is_flag and isinstance(value, str):
            text = value.strip().lower()
            return text in YES if text in YES + NO else value
        if self.option.get("nargs") == "+":
            return [value] if isinstance(value, str) else value
        if isinstance(self.default, list) and convert is not None and type(value) in (str, int, float):
            return convert(str(value))
        if convert is not None and isinstance(value, str):
            return convert(value)
        return value

    def _at_home(self, value: Any) -> Any:
        """Return a path with the user's own folder in place of `~`, and what is no path as it is.

        Raises ValueError for a path with a variable of the shell.
        """
        if self.option.get("metavar") not in PLACES:
            return value
        if isinstance(value, list):
            return [self._at_home(entry) for entry in value]
        if not isinstance(value, str):
            return value
        if re.match(r"\$\w+(/|$)|\$\{\w+\}", value):
            raise ValueError("a path; variables of the shell are not filled in here")
        return os.path.expanduser(value) if re.match(r"~\w*(/|$)", value) else value

    def _fitting(self, value: Any) -> Any:
        """Return the value if it fits. Raises ValueError or ArgumentTypeError where it does not."""
        convert = self.option.get("type")
        if self.accepts is not None:
            if self.accepts(value):
                return value
            raise ValueError(self.wanted)
        if self.is_flag:
            return _expect(isinstance(value, bool), value, "true or false")
        if self.option.get("nargs") == "+":
            wanted = "texts" if self.choices is None else ", ".join(map(str, self.choices))
            is_fitting = _is_text if self.choices is None else self.choices.__contains__
            are_fitting = isinstance(value, list) and bool(value) and all(map(is_fitting, value))
            return _expect(are_fitting, value, f"a list of {wanted}")
        if isinstance(self.default, list) and convert is not None:  # shares
            are_numbers = isinstance(value, list) and all(type(share) in (int, float) for share in value)
            return _expect(are_numbers and convert(",".join(map(repr, value))), value, "one to three shares")
        if self.choices is not None:
            fits = any(type(value) is type(choice) and value == choice for choice in self.choices)
            return _expect(fits, value, f"one of {', '.join(map(str, self.choices))}")
        if convert is None:
            return _expect(_is_text(value), value, "a text")
        _expect(type(value) in (int, float), value, "a number")
        return convert(repr(value))


def _expect(fits: Any, value: Any, wanted: str) -> Any:
    """Return the value if it fits. Raises ValueError with what was wanted where it does not."""
    if not fits:
        raise ValueError(wanted)
    return value


def _is_text(value: Any) -> bool:
    """Return whether a value is a text that the system takes as the name of a file."""
    return isinstance(value, str) and "\0" not in value


def _number(value: Any) -> Any:
    """Return the number that a text is; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def plain(value: Any) -> Any:
    """Return a value as JSON has it: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value


def frozen(value: Any) -> Any:
    """Return a value of JSON as a section has it: a tuple for a list."""
    return tuple(value) if isinstance(value, list) else value


def shown(value: Any) -> str:
    """Return a value as text for a message, on one line and cut where it is long."""
    if isinstance(value, (list, dict)) and len(value) > SHOWN:
        return f"{'a list' if isinstance(value, list) else 'a mapping'} of {len(value)}"
    text = printable(repr(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def fields_of(section: str, group: str, cls: type) -> Iterator[Known]:
    """Yield the fields of a section's class. section: its name. group: its heading in --help."""
    for source in fields(cls):
        yield Known.of(section, group, source)

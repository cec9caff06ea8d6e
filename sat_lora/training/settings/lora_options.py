"""The LoRA section of a run's settings, made from LoraConfig: an option per field, with its name, type and default.

`seed` is left out, because it is the run's own --seed.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sat_lora.errors import ConfigError
from sat_lora.lora.config import LoraConfig
from sat_lora.terminal.option_types import count, number
from sat_lora.training.settings.fields import Known, plain

LORA_FIELDS = tuple(field.name for field in fields(LoraConfig) if field.name != "seed")
ABOUT = (
    "the fields of sat_lora.LoraConfig; --r and --target_modules matter most. Each word of --target_modules and "
    "--exclude_modules is a preset or the dotted end of a name; a word that stands alone and holds more than letters, "
    "digits, _ . and - is a regular expression for the whole name."
)
PUBLISHED_NAMES = {"r": ("--lora_rank",)}  # what CogVLM's published scripts call it
NUMBERS = {int: number(int, "a whole number"), float: number(float, "a number")}
NAMES = tuple[str, ...]


class LoraField(Known):
    """A field of LoraConfig, which knows itself what fits it."""

    def checked(self, value: Any) -> Any:
        """Return the value as it is: LoraConfig looks at all of its fields together."""
        return value

    def _meant(self, value: Any) -> Any:
        """Return what a person means by a value: a text may stand for a number, or for true and false.

        Raises ArgumentTypeError for a text that is no number where one is wanted.
        """
        if isinstance(self.default, bool | int | float) and isinstance(value, str):
            return super()._meant(value)
        if isinstance(value, dict):
            return {pattern: self._number(entry) for pattern, entry in value.items()}
        is_names = self.name in ("target_modules", "exclude_modules") and isinstance(value, str)
        return names_or_pattern([value]) if is_names and value != self.default else value

    def _number(self, value: Any) -> Any:
        """Return the number that a text of `rank_pattern` or `alpha_pattern` is; another value as it is."""
        kind = {"rank_pattern": int, "alpha_pattern": float}.get(self.name)
        return NUMBERS[kind](value) if kind is not None and isinstance(value, str) else value


def lora_fields(group: str) -> Iterator[LoraField]:
    """Yield the fields of LoraConfig that are settings of their own: all but the seed.

    group: the heading of their options in --help.
    """
    types = get_type_hints(LoraConfig)
    helps = {source.name: source.metadata["help"] for source in fields(LoraConfig)}
    for name in LORA_FIELDS:
        yield LoraField(
            name=name,
            section="lora",
            default=plain(getattr(LoraConfig(), name)),
            help=first_sentence(helps[name]),
            options=(f"--{name}", *PUBLISHED_NAMES.get(name, ())),
            group=group,
            option=_settings(name, types[name]),
        )


def add_layer_range(group: argparse._ArgumentGroup) -> None:
    """Add the published option for --layers_to_transform, as a list of numbers."""
    group.add_argument(
        "--layer_range",
        dest="layers_to_transform",
        nargs="+",
        type=count,
        metavar="N",
        default=argparse.SUPPRESS,
        help="--layers_to_transform as a list of numbers",
    )


def lora_problems(error: ConfigError) -> list[str]:
    """Return one text per problem of a ConfigError about a LoraConfig, in which its fields are called by their
    options.
    """
    field = rf"^(?=(?:{'|'.join(LORA_FIELDS)}|seed)\b)"
    return [re.sub(field, "--", problem) for problem in error.problems]


def _settings(name: str, kind) -> dict:
    """Return the arguments of `add_argument` for a field of that type."""
    forms = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if kind is bool:
        return dict(action="store_true")
    if kind in NUMBERS:
        return dict(type=NUMBERS[kind], metavar="N" if kind is int else "X")
    if get_origin(kind) is dict:
        return _several(dict, "PATTERN=VALUE", type=_pair(NUMBERS[get_args(kind)[1]]))
    if name == "qkv_slots":
        return _several("".join, "SLOT")  # `q v` and `qv` are the same
    if NAMES in forms:
        return _several(names_or_pattern if str in forms else list, "NAME")
    return dict(metavar="TEXT")


def names_or_pattern(texts: list[str]) -> str | list[str]:
    """Return texts as LoraConfig takes them: a regular expression as a text, presets and suffixes as a list."""
    is_pattern = len(texts) == 1 and not re.fullmatch(r"[\w.-]+", texts[0])
    return texts[0] if is_pattern else texts


def patterns_of(texts: Iterable[str]) -> str | tuple[str, ...]:
    """Return what `names_or_pattern` gives, as a frozen value has it: a tuple for a list."""
    patterns = names_or_pattern(list(texts))
    return patterns if isinstance(patterns, str) else tuple(patterns)


def _several(combine: Callable[[list], object], metavar: str, **settings) -> dict:
    """Return the arguments of `add_argument` for an option of several words, whose value `combine` makes of them."""

    class Combined(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            setattr(namespace, self.dest, combine(values))

    return dict(nargs="+", action=Combined, metavar=metavar, **settings)


def _pair(value_type: Callable) -> Callable[[str], tuple]:
    """Return an argparse type for PATTERN=VALUE. The last = divides, so that a pattern may hold `(?=...)`."""

    def parse(text: str) -> tuple:
        pattern, divider, value = text.rpartition("=")
        if not divider or not pattern:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted PATTERN=VALUE, for example dense=8")
        return pattern, value_type(value)

    return parse


def first_sentence(text: str) -> str:
    """Return a text up to the first full stop that ends a sentence, as a line of help: without the stop, and with a
    small letter at the start.
    """
    sentence = re.split(r"\.(?:\s|$)", " ".join(text.split()))[0]
    acronym = re.match(r"\w+[A-Z]", sentence)
    return sentence if acronym else sentence[:1].lower() + sentence[1:]

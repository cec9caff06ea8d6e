"""YAML that others wrote, read as values alone: no objects are made, and nothing small becomes large."""

import re
from typing import Any

import yaml

from sat_lora.files.foreign import without_repeats

WHOLE_DIGITS = 400
"""Digits of a whole number; more stay a text, since Python refuses to read any number of them."""


def parse_yaml(text: str) -> Any:
    """Return what `text` says as YAML, in the types of YAML 1.2: `1e-4` is a number, `no` and a date are texts.

    Raises ValueError, with line and column where they are known, if it is no YAML, a key comes twice or is no name, or
    it has aliases, by which a small file becomes a huge value, or tags, by which a file makes objects.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(_said_by(error)) from error


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # type: ignore[type-arg]  # noqa: RUF012 as in its base

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{line}: aliases (*name) are not read here; write the value again")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{line}: tags are not read here, got {event.tag}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        return without_repeats([(_key(key), self.construct_object(value, deep=True)) for key, value in node.value])


def _key(node: Any) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"line {node.start_mark.line + 1}: a key is no name")
    return str(node.value)


def _whole(text: str) -> int | str:
    return int(text) if len(text) < WHOLE_DIGITS else text


def _decimal(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _said_by(error: Exception) -> str:
    """Return what is wrong and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    hint = "; indent with spaces" if "'\\t'" in problem else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{hint}"


_PREFIX = "tag:yaml.org,2002:"
_PLAIN = (  # those of YAML 1.2, with the characters that each begins with
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
)
for _kind, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(_PREFIX + _kind, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_PREFIX}map", lambda loader, node: loader.construct_mapping(node))
_Loader.add_constructor(f"{_PREFIX}int", lambda loader, node: _whole(node.value))
_Loader.add_constructor(f"{_PREFIX}float", lambda loader, node: _decimal(node.value))

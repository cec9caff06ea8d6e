"""The --deepspeed_config file: read, made plain, and the settings of the run that it decides.

Whatever trainers, editors and people leave to others in such a file is made plain once, in `open_deepspeed_file`: an
entry that says "auto" or null is as if it were not there, and a boolean in quotes is a boolean. ENTRIES are those that
decide a setting of the run; `deepspeed_config` takes them by the same table by which they are checked here.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sat_lora.errors import ConfigError
from sat_lora.files.foreign import JSON_LIMIT, parse_json, read_bytes
from sat_lora.printable import printable
from sat_lora.terminal.option_types import LARGEST_RATE

SWITCHES = frozenset(
    """
    dataloader_drop_last disable_allgather disable_python_gc dump_state enabled managed_gradient_accumulation
    memory_breakdown prescale_gradients wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """.split()
)
_YES = ("1", "yes", "on", "y", "t")
_NO = ("0", "no", "off", "n", "f")


@dataclass(frozen=True)
class Entry:
    """An entry of the file that decides an option."""

    option: str
    """The name of the setting."""
    path: tuple[str, ...]
    """The keys that lead to the entry."""
    label: str
    """What a line about the decision calls it."""
    wanted: str
    """What fits, for messages."""
    accepts: Callable[[object], bool]
    kind: Callable = float
    """The function that makes the setting's value of the entry's."""

    def value_in(self, content: dict):
        """Return the entry's value in a file whose sections are objects; None where it has none."""
        value: Any = content
        for key in self.path:
            value = value.get(key)
            if value is None:
                return None
        return value

    def problem(self, content: dict) -> str | None:
        """Return what is wrong with the entry's value in a file whose sections are objects; None where nothing is."""
        value = self.value_in(content)
        if value is None or is_no_number(value) or self.accepts(value):
            return None
        section = f'"{self.path[0]}": ' if len(self.path) > 1 else ""
        quoted = ", without quotes" if isinstance(value, str) else ""
        return f'{section}"{self.path[-1]}" is {shown(value)}, wanted {self.wanted}{quoted}'


def is_number(
    value: object, low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf
) -> TypeGuard[float]:
    """Return whether a value is a finite number, no boolean, from `low` to `high` and above `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return False
    return low <= value <= high and value > above


def is_no_number(value) -> bool:
    """Return whether a value is NaN or an infinity, of which `_numbers_that_are_none` speaks."""
    return isinstance(value, float) and not math.isfinite(value)


def is_whole(value: object, low: int) -> TypeGuard[float]:
    """Return whether a value is a whole number from `low` on; 4.0 is one."""
    return is_number(value, low, 2**63 - 1) and value == int(value)


def shown(value) -> str:
    """Return a value as text for a message, cut where it is long."""
    text = printable(repr(value))
    return text if len(text) <= 100 else text[:100] + " ..."


def _are_betas(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(beta, 0) and beta < 1 for beta in value)


WHOLE = "a whole number above 0"
OF_OPTIMIZER = ("optimizer", "params")
ENTRIES = (
    Entry("batch_size", ("train_micro_batch_size_per_gpu",), "batch size", WHOLE, lambda v: is_whole(v, 1), int),
    Entry(
        "gradient_accumulation_steps",
        ("gradient_accumulation_steps",),
        "accumulation steps",
        WHOLE,
        lambda v: is_whole(v, 1),
        int,
    ),
    Entry("clip_grad", ("gradient_clipping",), "clipping", "a number, 0 or above", lambda v: is_number(v, 0)),
    Entry(
        "zero_stage",
        ("zero_optimization", "stage"),
        "ZeRO stage",
        "a number: 0, 1, 2 or 3",
        lambda v: is_whole(v, 0) and v <= 3,
        int,
    ),
    Entry(
        "lr",
        (*OF_OPTIMIZER, "lr"),
        "lr",
        f"a number above 0, {LARGEST_RATE:g} at most",
        lambda v: is_number(v, high=LARGEST_RATE, above=0),
    ),
    Entry(
        "eps",
        (*OF_OPTIMIZER, "eps"),
        "eps",
        "a number from 1e-38 up to, but not including, 1",
        lambda v: is_number(v, 1e-38) and v < 1,  # none in float32 divides by the moments of a gradient of 0
    ),
    Entry(
        "weight_decay",
        (*OF_OPTIMIZER, "weight_decay"),
        "weight decay",
        "a number, 0 or above",
        lambda v: is_number(v, 0, LARGEST_RATE),
    ),
    Entry(
        "betas",
        (*OF_OPTIMIZER, "betas"),
        "betas",
        "two numbers from 0 up to, but not including, 1",
        _are_betas,
        lambda betas: [float(beta) for beta in betas],
    ),
)


@dataclass(frozen=True)
class DeepSpeedFile:
    """The content of a DeepSpeed json, and the names of what it leaves to the trainer."""

    content: dict
    """The content without entries of "auto" and null; what stands for true or false in an `enabled` is a boolean."""
    auto: tuple[str, ...]
    """The dotted names of the entries that say "auto"."""


def read_deepspeed_file(path: str | Path) -> dict:
    """Return the content of a DeepSpeed json, made plain. Raises ConfigError as `open_deepspeed_file` does."""
    return open_deepspeed_file(path).content


def open_deepspeed_file(path: str | Path) -> DeepSpeedFile:
    """Return what the json says, made plain. Raises ConfigError where it is missing, is not JSON (with line and
    column), or is not an object.
    """
    path = Path(path)
    where = f"--deepspeed_config: {printable(path)}"
    try:
        text = read_bytes(path, JSON_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{where} is not a file; give DeepSpeed's json, or leave the option out") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}; give DeepSpeed's json") from error
    try:
        content = parse_json(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read as JSON: {_why_no_json(path, text, error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds a {type(content).__name__}, wanted a JSON object")
    auto: list[str] = []
    return DeepSpeedFile(_plain(content, "", auto), tuple(auto))


def values_of_file(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that plain content of a DeepSpeed file decides, by name; a wrong value decides
    nothing.
    """
    values = {}
    for entry in ENTRIES:
        if is_reached(entry.path, dict(content)):
            value = entry.value_in(dict(content))
            if value is not None and entry.accepts(value):
                values[entry.option] = entry.kind(value)
    return values


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Return the object of these pairs. Raises ValueError for a key that comes twice, of which JSON would keep the
    last.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{printable(twice)}" stands twice in one object; keep one of them')
    return content


def _why_no_json(path: Path, text: bytes, error: Exception) -> str:
    """Return why a file cannot be read as JSON, and what it probably is or what to mend."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16; save it as UTF-8"
    if not text.strip():
        return "it is empty"
    lines = [line for line in text.decode("utf-8", "replace").splitlines() if line.strip() and line.strip()[0] != "#"]
    if path.suffix.lower() in (".yaml", ".yml") or (lines and re.match(r"\s*(---|-\s|[\w.-]+\s*:(\s|$))", lines[0])):
        return (
            f'it is YAML, and DeepSpeed reads JSON: write {{"zero_optimization": {{"stage": 2}}}} for stage 2, say; '
            f"of an accelerate config give the json that its deepspeed_config_file names ({error})"
        )
    if isinstance(error, json.JSONDecodeError):
        before = error.doc[: error.pos].rstrip()
        after = error.doc[error.pos :].lstrip()
        if after.startswith(("//", "/*", "#")):
            return f"{error}; JSON has no comments, remove it"
        if before.endswith(",") and after[:1] in ("}", "]"):
            return f"{error}; remove the comma before it"
        if after.startswith("'") or re.match(r"(True|False|None)\b", after):
            return f'{error}; JSON wants "double quotes", true, false and null'
    return str(error)


def _plain(content: dict, place: str, auto: list[str]) -> dict:
    """Return the section without entries that are left to the trainer, whose dotted names are added to `auto`."""
    plain = {}
    for key, value in content.items():
        name = f"{place}{key}"
        if isinstance(value, dict):
            plain[key] = _plain(value, f"{name}.", auto)
        elif _is_auto(value):
            auto.append(name)
        elif value is not None and not (name == "steps_per_print" and _is_never(value)):
            plain[key] = _switch(key, value)
    return plain


def _is_auto(value) -> bool:
    """Return whether an entry is left to the trainer: "auto", or a list of that."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_auto, value))
    return isinstance(value, str) and value.strip().lower() == "auto"


def _is_never(value) -> bool:
    """Return whether a value is the infinity of steps that accelerate writes: nothing is printed then, as is the case
    here.
    """
    text = value.strip().lower() if isinstance(value, str) else value
    return text in ("inf", "infinity", math.inf)


def _switch(key: str, value):
    """Return the boolean that a value stands for, and another value as it is; no text of DeepSpeed's is "true"."""
    text = value.strip().lower() if isinstance(value, str) else None
    if text in ("true", "false"):
        return text == "true"
    if key in SWITCHES and (text in _YES + _NO or (type(value) is int and value in (0, 1))):
        return text in _YES if text is not None else bool(value)
    return value


def is_reached(path: tuple[str, ...], content: dict) -> bool:
    """Return whether all sections that an entry lies in are objects, or are not there."""
    for key in path[:-1]:
        content = content.get(key, {})
        if not isinstance(content, dict):
            return False
    return True


def enabled(content: dict, section: str) -> bool:
    """Return whether a section is there and says `"enabled": true`."""
    return content.get(section, {}).get("enabled") is True

"""A --config file: settings by section, or flat by their names, as YAML or JSON; --print-config writes one."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat_lora.errors import ConfigError
from sat_lora.files.foreign import is_lfs_pointer, parse_json, read_bytes, without_repeats
from sat_lora.lora.config import LoraConfig
from sat_lora.printable import printable
from sat_lora.terminal.option_parser import advice_on, meant_options
from sat_lora.training.metrics.generated import names_code
from sat_lora.training.settings.config import DEFAULTS, KNOWN, SECTIONS, Origin, TrainConfig
from sat_lora.training.settings.deepspeed_problems import TOP_LEVEL_KEYS
from sat_lora.training.settings.fields import Known, shown
from sat_lora.training.settings.lora_options import lora_problems

LIMIT = 1 << 18  # bytes of a file; all settings with their comments are 12,000
OF_A_START = "start"
UNPRINTED = (OF_A_START, "compatibility")
"""Sections that --print-config leaves out: settings of one start, and those without effect."""
ALIASES = {option.lstrip("-").replace("-", "_"): known.name for known in KNOWN.values() for option in known.options}
"""The name of a setting by every spelling of its option."""
MOST = 12  # problems that are listed


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the settings of a --config file by their names, of the types that JSON has; null is left out.

    Raises ConfigError, with all that is wrong, where it is no such file, or has keys or values that no setting has.
    """
    where = f"--config: {printable(path)}"
    content = _content(Path(path), where)
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds {_kind(content)}, wanted settings such as `lr: 2e-4`; {_what_it_is(content)}")
    foreign = _foreign(content)
    if foreign is not None:
        raise ConfigError(f"{where} {foreign}")
    problems: list[str] = []
    values = _values(content, problems)
    try:
        LoraConfig(**{name: value for name, value in values.items() if KNOWN[name].section == "lora"})
    except ConfigError as error:
        problems += [f"lora.{problem.removeprefix('--')}" for problem in lora_problems(error)]
    if not problems:
        return values
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    listed = problems[:MOST] + [f"and {len(problems) - MOST} more"] * (len(problems) > MOST)
    raise ConfigError(f"{where}: {len(problems)} problems:\n" + "\n".join(f"- {problem}" for problem in listed))


def _content(path: Path, where: str) -> Any:
    """Return the content of a file. Raises ConfigError where it cannot be read as JSON or YAML, as its name
    says it is.
    """
    try:
        content = read_bytes(path, LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{where} is not there; give a file of settings, as --print-config writes it") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{where} cannot be read: {reason}; give a file of settings") from error
    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it is UTF-16; save it as UTF-8")
        if is_lfs_pointer(content):
            return parse_json(content)  # which says so
        text = content.decode("utf-8-sig")
        if not text.strip():
            raise ValueError("it is empty")
        return parse_json(text, object_pairs_hook=without_repeats) if kind == "JSON" else _parse_yaml(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} cannot be read as {kind}: it is no text in UTF-8") from error
    except ValueError as error:
        raise ConfigError(f"{where} cannot be read as {kind}: {printable(error)}") from error


def _parse_yaml(text: str) -> Any:
    """Return `parse_yaml` of the text. Raises ValueError without PyYAML, which nothing else needs this early."""
    try:
        from sat_lora.files.yaml_text import parse_yaml
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; install PyYAML, or write the same as JSON into a file called .json") from error
    return parse_yaml(text)


def _kind(content: Any) -> str:
    """Return what messages call content that is no mapping."""
    if content is None:
        return "nothing"
    return {list: "a list", str: "a text", bool: "a boolean"}.get(type(content), "a number")


def _what_it_is(content: Any) -> str:
    """Return what to do with a file that holds no settings."""
    if isinstance(content, str) and "=" in content:
        return "write `name: value` on each line"
    if isinstance(content, str) and ":" in content:
        return "write a space behind each colon"
    return "--print-config writes such a file"


def _foreign(content: dict) -> str | None:
    """Return that a file is of another kind, and where it goes; None where it may be a file of settings."""
    if isinstance(content.get("settings"), dict) and "versions" in content:
        return "is the run.json of a run; give its folder to --resume"
    own = {key for key in content if isinstance(key, str)} - KNOWN.keys() - set(SECTIONS)
    if own & {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"} and own <= TOP_LEVEL_KEYS:
        return "holds entries of DeepSpeed; write them as JSON, and give that file to --deepspeed_config"
    return None


def _values(content: dict, problems: list[str]) -> dict[str, Any]:
    """Return the settings of the content by their names; what is wrong is added to `problems`."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, key, value in _entries(content, problems):
        name = ALIASES.get(_bare(key), _bare(key))
        problem = _problem_with_key(place, key, name)
        if problem is None and name in places:
            problem = f"{name} stands twice, as {places[name]} and as {place}{printable(key)}; keep one of them"
        if problem is not None:
            problems.append(problem)
            continue
        places[name] = f"{place}{printable(key)}"
        if value is None:
            continue
        try:
            values[name] = KNOWN[name].written(value)
        except ValueError as error:
            problems.append(f"{place}{name}: got {shown(value)}, wanted {error}{_hint(KNOWN[name], value)}")
    return values


def _entries(content: dict, problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (the section with a dot, or nothing; key; value) of every setting; what is wrong is added to `problems`."""
    for key, value in content.items():
        if key not in SECTIONS:
            yield "", key, value
        elif isinstance(value, dict):
            yield from ((f"{key}.", inner, own) for inner, own in value.items())
        elif value is not None:
            names = [name for name, known in KNOWN.items() if known.section == key]
            problems.append(f"{key}: got {shown(value)}, wanted its settings below it: {', '.join(names[:4])}, ...")


def _bare(key: str) -> str:
    """Return a key as settings are spelled: without dashes before it, and with _ for each other."""
    return key.strip().lstrip("-").replace("-", "_")


def _problem_with_key(place: str, key: str, name: str) -> str | None:
    """Return why a key is no setting where it stands, and what was most likely meant; None where it is one."""
    known = KNOWN.get(name)
    if known is None:
        return f"there is no setting {place}{printable(key)}{_meant(place, key)}"
    if known.section == OF_A_START:
        return f"{place}{printable(key)} belongs to one start; give {known.options[0]} as an option"
    if place not in ("", f"{known.section}."):
        return f"{place}{printable(key)} is no setting of that section; it is {known.section}.{name}"
    return None


def _meant(place: str, key: str) -> str:
    """Return what was most likely meant by the name of a setting that does not exist, as the end of a sentence."""
    spellings = {option.replace("-", "_"): option for known in KNOWN.values() for option in known.options}
    elsewhere = meant_options(key, spellings)
    advice = advice_on(key)
    if elsewhere:
        name = ALIASES[_bare(elsewhere[0])]
        return f"; did you mean {KNOWN[name].section}.{name}?"
    if advice is not None:
        return f"; {advice}"
    names = [name for name, known in KNOWN.items() if place in ("", f"{known.section}.")]
    candidates = names + (list(SECTIONS) if not place else [])
    near = difflib.get_close_matches(_bare(key).lower(), candidates, 1) or difflib.get_close_matches(
        _bare(key).lower(), list(KNOWN), 1
    )
    if not near:
        return f"; --print-config shows {'those of ' + place[:-1] if place else 'all of them'}"
    section = f"{KNOWN[near[0]].section}." if near[0] in KNOWN else ""
    return f"; did you mean {section}{near[0]}?"


def _hint(known: Known, value: Any) -> str:
    """Return what is most likely wrong with a value, as the end of a sentence; empty where nothing is known."""
    is_text = known.choices is None and "type" not in known.option and not known.is_flag and not known.accepts
    if is_text and isinstance(value, (bool, int, float)):
        return "; put it in quotes"
    near = difflib.get_close_matches(str(value), map(str, known.choices or ()), 1)
    return f"; did you mean {near[0]}?" if near else ""


def as_yaml(config: TrainConfig, *, file: str | None = None) -> str:
    """Return the config as the text of a --config file, with its help and its origin above each setting.

    The same config comes from reading it. file: the --config file that the config is of, to be named as an origin.
    """
    lines = ["# Settings of a run: give this file to --config. An option given beats what stands here."]
    sources = {Origin.FILE: f"from {printable(file)}"} if file is not None else {}
    for section in (section for section in SECTIONS if section not in UNPRINTED):
        lines += ["", f"{section}:"]
        for known in (known for known in KNOWN.values() if known.section == section):
            origin = config.origin(known.name)
            is_of_run = known.left_to == "the base" and config.value(known.name) != known.default
            open_origins = (Origin.DEFAULT,) if is_of_run else (Origin.DEFAULT, Origin.RUN_DEFAULT)
            is_open = known.left_to is not None and origin in open_origins
            value = None if is_open else config.value(known.name)
            source = f"left to {known.left_to}" if is_open else sources.get(origin, origin.value)
            if names_code(known.name, value):  # which is refused in a file
                source += f"; {shown(value)} names code: give it by {known.options[0]}"
                value = None
            lines += [f"  # {known.help} [{source}]", f"  {known.name}: {_scalar(value)}"]
    started = [
        known.options[0] if known.is_flag else f"{known.options[0]} {printable(config.value(name))}"
        for name, known in KNOWN.items()
        if known.section == OF_A_START and config.value(name) != DEFAULTS[name] and name != "local_rank"
    ]
    if started:
        lines += ["", f"# Of one start, and so in no file: {', '.join(started)}"]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line, which YAML 1.1 and 1.2 read alike."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(key)}: {_scalar(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return json.dumps(value)


def _quoted(text: str) -> str:
    """Return a text in double quotes, with characters that no terminal shows written as their numbers."""
    escaped = (
        c if c.isprintable() and c not in '"\\' else f"\\{c}" if c in '"\\' else f"\\U{ord(c):08x}" for c in text
    )
    return f'"{"".join(escaped)}"'

"""The way of a setting, from the command line to where it is used: how many files it goes through."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sat_lora.training.settings.config import KNOWN
from tests.support.paths import DEMO, ROOT

SCRIPT = DEMO / "finetune_cogvlm.py"
SETTINGS = ROOT / "sat_lora" / "training" / "settings"
MADE_IN = {SETTINGS / f"{name}.py" for name in ("options", "fields", "config", "resolve")}
"""Where a config is made of a command line."""
MOST = 12


@cache
def code_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports_of(file: Path) -> dict[Path, set[str]]:
    """The names that a file takes from each other file of the package."""
    taken: dict[Path, set[str]] = {}
    for node in ast.walk(code_of(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sat_lora"):
            other = ROOT / f"{node.module.replace('.', '/')}.py"
            if other.is_file():
                taken.setdefault(other, set()).update(alias.name for alias in node.names)
    return taken


@cache
def paths_from(start: Path) -> dict[Path, tuple[Path, ...]]:
    """The shortest way by imports from a file to each that it reaches."""
    paths, waiting = {start: (start,)}, [start]
    for file in waiting:
        for other in imports_of(file):
            if other not in paths:
                paths[other] = (*paths[file], other)
                waiting.append(other)
    return paths


@cache
def read_in(file: Path) -> set[tuple[str, str]]:
    """(owner, name) of what is taken out of something there, as `config.optimizer.lr` and `optimizer.lr` are."""
    places = [node for node in ast.walk(code_of(file)) if isinstance(node, ast.Attribute)]
    return {(getattr(place.value, "attr", getattr(place.value, "id", "")), place.attr) for place in places}


@cache
def parameters_in(file: Path) -> dict[str, set[str]]:
    """The names of the parameters of each function of a file, and of all functions of each class."""
    parameters = {}
    for node in code_of(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            functions = [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef)]
            parameters[node.name] = {one.arg for f in functions for one in (*f.args.args, *f.args.kwonlyargs)}
    return parameters


def handed_on(file: Path, name: str, seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files to whose functions the value goes from there under its own name, and from these to others."""
    for other, taken in imports_of(file).items():
        if other in seen or other in MADE_IN:
            continue
        if any(name in parameters_in(other).get(definition, ()) for definition in taken):
            yield other
            yield from handed_on(other, name, seen | {file, other})


def ways(name: str) -> dict[Path, set[Path]]:
    """For each file that reads a setting, all files on the setting's way there and on from there."""
    to = paths_from(SCRIPT)
    section = KNOWN[name].section
    readers = [file for file in to if file not in MADE_IN and (section, name) in read_in(file)]
    return {reader: {*MADE_IN, *to[reader], *handed_on(reader, name)} for reader in readers}


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.section != "lora"])
def test_a_setting_goes_through_few_files(name):
    long = {reader.name: len(files) for reader, files in ways(name).items() if len(files) > MOST}
    assert not long


@pytest.mark.parametrize("name", ["lr", "batch_size", "keep", "zero_stage", "prompt", "warmup"])
def test_settings_are_found_where_they_are_used(name):
    assert ways(name)

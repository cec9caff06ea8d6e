"""The folders of the package: who may import whom, and how many modules live in one."""

import ast
from functools import cache
from pathlib import Path

import pytest

import sat_lora

ROOT = Path(sat_lora.__file__).parent
# From the lowest to the highest: a module imports its own folder and lower ones, inside functions as well.
LAYERS = [
    "printable",
    "errors",
    "_sat",
    "_moved",
    "files",
    "terminal",
    "findings",
    "parallel",
    "lora.deltas",
    "lora",
    "cogvlm",
    "cogvlm.inputs",
    "cogvlm.network",
    "cogvlm.decoding",
    "cogvlm.checkpoints",
    "adapters",
    "interop",
    "data",
    "data.shards",
    "data.batches",
    "watchdog",
    "training.settings",
    "training.steps",
    "training.runs",
    "training",
    "memory",
    "doctor.model_checks",
    "doctor.run_checks",
    "doctor",
    "commands",
    "cli",
]
MOST_MODULES = 12


@cache
def modules() -> dict[str, Path]:
    """The file of each module of the package, by its name below `sat_lora`; a package's is its `__init__.py`."""
    files = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip("."): path for name, path in files.items()}


def layer_of(module: str) -> str:
    """The layer that a module belongs to: itself at the top of the package, its folder elsewhere."""
    if modules()[module].name == "__init__.py":
        return module
    return module.rpartition(".")[0] or module


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    below = {name.removeprefix("sat_lora.") for name in names if name and name.startswith("sat_lora.")}
    return below & modules().keys()


def upward(module: str) -> list[str]:
    """The imports of a module that are not of a lower layer."""
    own = LAYERS.index(layer_of(module))
    return [name for name in sorted(imported(modules()[module])) if LAYERS.index(layer_of(name)) > own]


def test_every_folder_has_its_layer():
    assert {layer_of(module) for module in modules()} - {""} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_downwards(layer):
    bad = {module: upward(module) for module in modules() if module and layer_of(module) == layer}
    assert not {module: names for module, names in bad.items() if names}


def test_relative_imports_hide_nothing():
    hidden = [
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not hidden


def test_no_folder_is_larger_than_a_dozen():
    sizes = {}
    for path in modules().values():
        if path.name != "__init__.py":
            sizes[path.parent] = sizes.get(path.parent, 0) + 1
    assert {folder.name: size for folder, size in sizes.items() if size > MOST_MODULES} == {}

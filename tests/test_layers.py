"""The folders of the package: who may import whom, and how many modules live in one; and those of its tests."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

import sat_lora
from sat_lora._moved import MOVED
from tests.support.paths import ROOT

PACKAGE, TESTS = Path(sat_lora.__file__).parent, ROOT / "tests"
# From the lowest to the highest: a module imports its own folder and lower ones, inside functions as well.
LAYERS = [
    "printable",
    "errors",
    "_deepspeed",
    "_sat",
    "_sat_on_cpu",
    "_triton",
    "_moved",
    "files",
    "terminal",
    "findings",
    "parallel",
    "quantized",
    "lora.deltas",
    "lora",
    "quantization",
    "cogvlm",
    "cogvlm.inputs",
    "cogvlm.network",
    "cogvlm.decoding",
    "cogvlm.checkpoints",
    "adapters",
    "interop",
    "data.records",
    "data",
    "data.readers",
    "data.shards",
    "data.overview",
    "data.batches",
    "watchdog",
    "training.metrics",
    "training.settings",
    "training.steps",
    "training.answers",
    "training.runs.logs",
    "training.runs",
    "training",
    "memory",
    "doctor.model_checks",
    "doctor.run_checks",
    "doctor",
    "chat",
    "serve",
    "any_loop",
    "commands",
    "commands.adapters",
    "cli",
]
MOST_MODULES = 12
# Folders of tests that are no folder of the package: what tests share, kinds of mistakes, whole runs and layouts, and
# what lies beside the package.
MIRROR_NOTHING = {"support", "cases", "cuda", "distributed", "faults", "benchmarks", "docs", "finetune_demo"}
# Beside tests/support, for the docs name them as commands.
SHARED = {"tests.cases.mistakes", "tests.cases.mutated_pictures", "tests.distributed.matrix"}
A_TEST_MODULE = re.compile(r"\btests(?:\.\w+)*\.test_\w+")


@cache
def modules() -> dict[str, Path]:
    """The file of each module of the package, by its name below `sat_lora`; a package's is its `__init__.py`."""
    files = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
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


# Who watches a run listens to the loop, and the loop does not know who that is.
DEAF = ["training.loop", "training.steps.step", "training.steps.observers"]


@pytest.mark.parametrize("module", DEAF)
def test_the_loop_does_not_know_who_watches_it(module):
    watchers = {name for name in imported(modules()[module]) if name.partition(".")[0] in ("doctor", "watchdog")}
    assert not watchers


def test_no_room_is_both_below_and_above_another():
    """A folder at the top is one stretch of the layers with its folders, so that no two of them import each other."""
    rooms = [layer.partition(".")[0] for layer in LAYERS]
    stretches = [room for room, _ in groupby(rooms)]
    assert sorted(stretches) == sorted(set(rooms))


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


def dotted(path: Path) -> str:
    """The name by which a file below the checkout is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules_of_tests() -> dict[str, ast.Module]:
    """What is written in each module of tests/, by its name."""
    files = sorted(TESTS.rglob("*.py"))
    return {dotted(path): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def imports_in(tree: ast.AST, own: str) -> Iterator[str]:
    """The names that the module `own` imports: modules, what is taken from them, and those in strings of code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = own.split(".")[: -node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "tests" in node.value:
            yield from A_TEST_MODULE.findall(node.value)
            if "import" in node.value:
                yield from imports_in(code_of(node.value), own)


def code_of(text: str) -> ast.Module:
    """The code that a string holds; an empty one if it is none."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.Module([], [])


def imports_of_tests(tree: ast.AST, own: str) -> set[str]:
    """The other modules of tests/ that the module `own` imports. It may name itself: to run in a process of its own."""
    return (set(imports_in(tree, own)) & modules_of_tests().keys()) - {own}


def is_a_test(name: str) -> bool:
    return name.rpartition(".")[2].startswith(("test_", "conftest"))


def test_no_test_imports_a_test():
    bad = {name: sorted(filter(is_a_test, imports_of_tests(tree, name))) for name, tree in modules_of_tests().items()}
    assert not {name: tests for name, tests in bad.items() if tests}


@pytest.mark.parametrize(
    "code",
    [
        "import tests.lora.{}",
        "from tests.lora import {}",
        "from tests.lora.{} import x",
        "def f():\n    from .{} import x",
        "from . import {} as other",
        "from ..lora.{} import x",
        "run('import torch; from tests.lora import {}')",
        "run(f'from {{name}} import x', name='tests.lora.{}')",
    ],
)
def test_an_import_of_a_test_is_seen_wherever_it_is(code):
    name = "test_mixin"
    imports = imports_of_tests(ast.parse(code.format(name)), "tests.lora.other")
    assert [*filter(is_a_test, imports)] == [f"tests.lora.{name}"]


def test_what_tests_of_several_folders_share_is_in_support():
    bad = {}
    for own, tree in modules_of_tests().items():
        helpers = imports_of_tests(tree, own) - SHARED
        outside = {name for name in helpers if not (name + ".").startswith("tests.support.")}
        packages = {name for name in outside if any(other.startswith(f"{name}.") for other in modules_of_tests())}
        foreign = {name for name in outside - packages if name.rpartition(".")[0] != own.rpartition(".")[0]}
        bad |= {own: sorted(foreign)} if foreign else {}
    assert not bad


def test_folders_of_tests_are_those_of_the_package():
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")} - {"."}
    packages = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")} - {"."}
    assert {folder for folder in folders if folder.split("/")[0] not in MIRROR_NOTHING} == packages
    assert {folder.split("/")[0] for folder in folders} >= MIRROR_NOTHING


def test_names_of_before_lead_to_modules_of_today():
    assert len(MOVED) > 140 and not {name.removeprefix("sat_lora.") for name in MOVED} & modules().keys()
    assert {name.removeprefix("sat_lora.") for name in MOVED.values()} <= modules().keys()


def test_a_name_of_before_is_the_same_module():
    with pytest.deprecated_call(match="sat_lora.step_folders is sat_lora.files.step_folders now"):
        old = importlib.import_module("sat_lora.step_folders")
    assert old is importlib.import_module("sat_lora.files.step_folders")

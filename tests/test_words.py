"""What a reader meets in the package and its scripts: docstrings that are sentences and say what comes back, and nouns
for variables.

A machine sees only the beginning of a docstring and the spelling of a name; what they mean is for people.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sat_lora

PACKAGE = Path(sat_lora.__file__).parent
SCRIPTS = PACKAGE.parent / "finetune_demo"
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
# Words that stand for a noun and do not say which, and names that the field calls otherwise.
NO_NAMES = {
    *("one", "those", "found", "words", "told", "mine", "theirs", "has"),
    *("looks_up", "strength", "take_over", "lost_share"),
}
# With these a fragment begins that leaves its subject to the name of the function, or its verb.
ARTICLES = """
    a an the this that these those its their it what whether how why which where when every each all no none any some
    both several one two
"""
PREPOSITIONS = "of for in by from at on as after before with without while until since to if or and see"
NO_VERBS = {*ARTICLES.split(), *PREPOSITIONS.split()}
NO_BEGINNINGS = {*PREPOSITIONS.split(), "none"}
# `_` and names of one letter are taken by what they hold: indices, axes, factors.
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def trees() -> dict[str, ast.Module]:
    """What is written in each module of the package, by its name below `sat_lora`, in each script, and in the examples
    of CONTRIBUTING.md, which people begin with."""
    files = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    files |= {f"finetune_demo.{path.stem}": path for path in SCRIPTS.glob("*.py")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    examples = re.findall(r"^```python\n(.*?)^```$", CONTRIBUTING.read_text(encoding="utf-8"), re.M | re.S)
    texts |= {f"CONTRIBUTING.{number}": code for number, code in enumerate(examples, 1)}
    return {name: ast.parse(text) for name, text in texts.items()}


def definitions(tree: ast.AST, parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Definition]]:
    """Yield (names from the module down, definition) of each function and class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield (*parents, node.name), node
        inner = (*parents, node.name) if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else parents
        yield from definitions(node, inner)


def decorators(node: Definition) -> set[str]:
    """The last names of what decorates a definition: property, setter, cached_property."""
    return {re.split(r"[.(]", ast.unparse(decorator))[-1] for decorator in node.decorator_list} | {
        ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list
    }


@cache
def documented_methods() -> dict[str, set[str]]:
    """The methods with a docstring of each class and of those of the package that it is made of, by its name."""
    classes: dict[str, list[ast.ClassDef]] = {}
    for tree in trees().values():
        for _, node in definitions(tree):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)

    def methods(name: str, below: frozenset[str] = frozenset()) -> set[str]:
        documented: set[str] = set()
        for node in classes.get(name, ()) if name not in below else ():
            documented |= {
                child.name for child in node.body if isinstance(child, FUNCTIONS) and ast.get_docstring(child)
            }
            bases = (ast.unparse(base).rpartition(".")[2] for base in node.bases)
            documented = documented.union(*(methods(base, below | {name}) for base in bases))
        return documented

    return {name: methods(name) for name in classes}


def undocumented(tree: ast.Module) -> list[str]:
    """The public functions, classes and methods of a module without a docstring, by name."""
    nodes = dict(definitions(tree))
    names = []
    for path, node in nodes.items():
        owners = [nodes[path[:length]] for length in range(1, len(path))]
        is_public = not any(name.startswith("_") for name in path)
        if not is_public or any(isinstance(owner, FUNCTIONS) for owner in owners) or "setter" in decorators(node):
            continue
        inherited = documented_methods().get(path[-2], set()) if owners else set()
        if ast.get_docstring(node) is None and path[-1] not in inherited:
            names.append(".".join(path))
    return names


def first_word(docstring: str) -> str:
    """The first word of a docstring, with what is joined to it."""
    return docstring.split()[0]


def is_sentence_of_function(docstring: str) -> bool:
    """Whether a function's docstring begins with a verb, as far as that can be seen."""
    word = first_word(docstring)
    return re.fullmatch(r"[A-Z][a-z]+,?", word) is not None and word.strip(",").lower() not in NO_VERBS


def is_no_fragment(docstring: str) -> bool:
    """Whether the docstring of a class or an attribute begins with more than a preposition, and with a word."""
    word = first_word(docstring)
    return re.match(r"[A-Z\"]", word) is not None and word.strip(",:").lower() not in NO_BEGINNINGS and word[-1] != ":"


def fragments(tree: ast.Module) -> list[str]:
    """The names of a module whose docstrings are no sentences."""
    names = []
    for path, node in definitions(tree):
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        is_value = isinstance(node, ast.ClassDef) or decorators(node) & {"property", "cached_property"}
        if not (is_no_fragment(docstring) if is_value else is_sentence_of_function(docstring)):
            names.append(f"{'.'.join(path)}: {docstring.splitlines()[0]}")
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for before, after in itertools.pairwise(body) if isinstance(body, list) else ():
            if not isinstance(before, ast.Assign | ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            text = after.value.value if isinstance(after.value, ast.Constant) else None
            if isinstance(text, str) and not is_no_fragment(text):
                names.append(f"{ast.unparse(before).split('=')[0].strip()}: {text.splitlines()[0]}")
    return names


def no_nouns(tree: ast.Module) -> list[str]:
    """The names in NO_NAMES that a module gives to variables and parameters, with their lines."""
    names = [
        (node.lineno, node.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    names += [(node.lineno, node.arg) for node in ast.walk(tree) if isinstance(node, ast.arg)]
    return [f"line {line}: {name}" for line, name in sorted(names) if name in NO_NAMES]


def crowded_lines(tree: ast.Module) -> list[str]:
    """The statements of a module that assign several values at once, or call something within and/or for its effect.

    An exchange of two values is one step and stays.
    """
    crowded = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            targets = {ast.unparse(target) for target in node.targets[0].elts}
            if targets != {ast.unparse(value) for value in node.value.elts}:
                crowded.append(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.BoolOp | ast.IfExp):
            crowded.append(node)
    return [f"line {node.lineno}: {ast.unparse(node)[:100]}" for node in crowded]


CHECKS = (undocumented, fragments, no_nouns, crowded_lines)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_speaks_in_sentences_and_nouns(check):
    problems = {name: check(tree) for name, tree in trees().items()}
    assert {name: listed for name, listed in problems.items() if listed} == {}


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (undocumented, "def public(): pass"),
        (undocumented, "class Public:\n    '''A thing.'''\n    def method(self): pass"),
        (fragments, "def f():\n    '''The rank of this process.'''"),
        (fragments, "def f():\n    '''Of a rank that trains.'''"),
        (fragments, "def f():\n    '''None: there is none.'''"),
        (fragments, "def f():\n    '''(rank, size) of this process.'''"),
        (fragments, "class Public:\n    '''Of one layer.'''"),
        (fragments, "class Public:\n    @property\n    def p(self):\n        '''In an epoch.'''"),
        (fragments, "class Public:\n    x = 1\n    '''Of the batch.'''"),
        (no_nouns, "for one in rows: pass"),
        (no_nouns, "def f(words): pass"),
        (no_nouns, "sizes = [len(those) for those in rows]"),
        (crowded_lines, "a, b = 1, 2"),
        (crowded_lines, "ready and start()"),
    ],
)
def test_a_slip_is_seen(check, code):
    assert check(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "def public():\n    '''Return the rank of this process.'''",
        "def _private(): pass",
        "class Public:\n    '''A thing.'''\n    @property\n    def p(self):\n        '''The rank of this process.'''",
        "x, y = divmod(7, 2)\na, b = b, a",
        "def public():\n    '''Give it.'''\n    def inner(): pass",
    ],
)
def test_what_is_said_well_passes(code):
    assert not [problem for check in CHECKS for problem in check(ast.parse(code))]

"""What `make mutants` changes: each change compiles, is another program, and fits the function it is put into."""

import ast
import random
import textwrap

import pytest

from tests.support.mutants import CORE
from tests.support.mutators import mutated, mutations
from tests.support.paths import ROOT

MODULES = sorted(str(path.relative_to(ROOT)) for folder in CORE for path in (ROOT / folder).rglob("*.py"))


def changes(body: str) -> set[str]:
    """The bodies that mutations make of that one, on one line."""
    source = "def f(a, b):\n" + textwrap.indent(body, "    ")
    functions = (mutated(source, number).body[0] for number in range(len(mutations(source))))
    return {"; ".join(ast.unparse(function).splitlines()[1:]).strip() for function in functions}


def left_out(statement: str) -> str:
    return f"if 0:;         {statement};     else:;         pass"


@pytest.mark.parametrize(
    "body, expected",
    [
        ("b = a < 1", {"b = a <= 1", "b = a < 2"}),
        ("b = a is not None", {"b = a is None"}),
        ("b = a and not b", {"b = a or not b", "b = a and b"}),
        ("b = a * -b", {"b = a / -b", "b = a * b"}),
        ("b = [c for c in a if c]", {"b = [c for c in a if not c]"}),
        ("b = a(k=True)", {"b = a(k=False)"}),
        ("b = a['key']", {"b = a['XXkeyXX']"}),
        ("a.x = b", {left_out("a.x = b")}),
        ("a()", {left_out("a()")}),
        ("raise a('no')", {left_out("raise a('no')")}),
        ("return a", {"if 0:;         return a;     else:;         return None"}),
        ("return None", set()),
        ("'''A docstring.'''", set()),
        ("b = 'a text for people'", set()),
        ("b = f'{a}: as it is'", set()),
        ("b = f'{a:g}'", set()),
        ("b: 'int' = a", set()),
    ],
)
def test_a_body_becomes_each_other_body_once(body, expected):
    assert changes(body) == expected


def test_cached_functions_and_what_stands_outside_of_functions_are_left_alone():
    assert mutations("LIMIT = 1\nclass C:\n    x = True\n    def f(self, a=1) -> 'C':\n        pass\n") == []
    assert mutations("@lru_cache(maxsize=2)\ndef f(a):\n    return a + 1\n") == []


def test_a_function_takes_the_code_of_each_of_its_mutations():
    """Which Python allows only where they use as many variables of what is around them, `__class__` here."""
    source = "class C(list):\n    def f(self):\n        super().append(1)\n        return super().pop()\n"
    original, results = {}, []
    exec(source, original)
    for number, mutation in enumerate(mutations(source)):
        changed = {}
        exec(compile(mutated(source, number), "changed", "exec"), changed)
        original["C"].f.__code__ = changed["C"].f.__code__
        results.append((mutation.kind, mutation.line, original["C"]([5]).f()))
    assert results == [("statement", 3, 5), ("constant", 3, 2), ("return", 4, None)]


@pytest.mark.parametrize("module", MODULES)
def test_each_mutation_of_the_core_files_is_another_program_that_compiles(module):
    source = (ROOT / module).read_text(encoding="utf-8")
    original = ast.dump(ast.parse(source))
    numbers = range(len(mutations(source)))
    for number in random.Random(module).sample(numbers, min(3, len(numbers))):
        tree = mutated(source, number)
        assert ast.dump(tree) != original
        compile(tree, module, "exec")

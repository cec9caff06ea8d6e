"""What `make mutants` changes: each change compiles, is another program, and fits the function it is put into."""

import ast
import os
import random
import textwrap
import time

import pytest

from tests.support import mutants
from tests.support.mutants import CAUGHT, CORE, GIVEN_UP, SURVIVED, TIMED_OUT, Baseline, Mutant, Mutants, Worker
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


MODULE = "sat_lora/files/step_folders.py"


class Plugin(Mutants):
    """Runs functions in place of collected tests."""

    def __init__(self, **tests):
        super().__init__([MODULE], 0, 1, 1)
        self.tests = tests
        self.functions = mutants._functions_of([MODULE])

    def become_worker(self, folder):
        os.setpgid(0, 0)

    def run_tests(self, names):
        return next((name for name in names if not self.tests[name]()), None)


def results_of(workers):
    """By the names of the workers, all of which are looked at again and again: one that is not seems to wait."""
    results = {}
    while len(results) < len(workers):
        for name in workers.keys() - results.keys():
            if (result := workers[name].ended()) is not None:
                assert not os.path.exists(workers[name]._folder)
                results[name] = result
        time.sleep(0.01)
    return results


def result_of(plugin, mutant, *names):
    return results_of({"": Worker(mutant, names, 0.0, plugin)})[""]


def mutant_of_steps_in():
    """`steps_in` gives None."""
    found = mutations((ROOT / MODULE).read_text())
    (number,) = (n for n, mutation in enumerate(found) if (mutation.function, mutation.kind) == ("steps_in", "return"))
    return Mutant(MODULE, number, found[number])


def test_a_worker_has_the_mutation_and_nobody_else(tmp_path):
    from sat_lora.files import step_folders

    steps_in = step_folders.steps_in  # as others have imported it
    plugin = Plugin(notices=lambda: steps_in(tmp_path) == [], ends=lambda: os._exit(1))
    plugin.tests["is blind"] = lambda: steps_in(tmp_path) is None
    mutant = mutant_of_steps_in()
    assert result_of(plugin, mutant, "is blind", "notices") == (CAUGHT, "notices")
    assert result_of(plugin, mutant, "is blind") == (SURVIVED, None)
    assert result_of(plugin, None, "notices") == (SURVIVED, None)
    assert result_of(plugin, mutant, "ends") == (CAUGHT, None)
    assert steps_in(tmp_path) == []


def loop():
    while True:
        pass


def loop_in_a_child():
    if (pid := os.fork()) == 0:
        loop()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_only_the_time_of_the_processor_makes_a_mutant_one_that_loops_or_hangs(monkeypatch):
    """A second is the least that the system allows."""
    monkeypatch.setattr(mutants, "SPARE", 1)
    monkeypatch.setattr(mutants, "IDLE", 1.5)
    plugin = Plugin(loops=loop, sleeps=lambda: time.sleep(30), **{"loops in a child": loop_in_a_child})
    workers = {name: Worker(None, [name], 0.0, plugin) for name in plugin.tests}
    assert results_of(workers) == {
        "loops": (TIMED_OUT, None),
        "loops in a child": (CAUGHT, "loops in a child"),
        "sleeps": (TIMED_OUT, None),
    }
    monkeypatch.setattr(mutants, "SPARE", 20)
    monkeypatch.setattr(mutants, "WAIT", 0.1)
    assert result_of(plugin, None, "sleeps") == result_of(plugin, None, "loops") == (GIVEN_UP, None)


def test_a_mutation_that_cannot_be_made_is_not_taken_for_caught():
    plugin = Plugin()
    plugin.functions = {}
    with pytest.raises(RuntimeError, match="could not be made"):
        result_of(plugin, mutant_of_steps_in())


def test_tests_run_in_the_order_of_what_they_promise(monkeypatch):
    monkeypatch.setattr(mutants, "BUDGET", 3.0)
    mutant = mutant_of_steps_in()
    mirrored = "tests/files/test_step_folders.py::test"
    seconds = {
        mirrored: 0.9,
        "a[1]": 0.1,
        "a[2]": 0.1,
        "a[3]": 0.1,
        "b": 0.2,
        "catcher": 1.0,
        "slow": 2.5,
        "c": 0.1,
        "d": 0.9,
    }
    baseline = Baseline(seconds, {(MODULE, mutant.mutation.line): [name for name in seconds if name != "c"]})
    first, second, third, fourth, *others = mutants._tests_for(mutant, baseline, ["catcher"])
    assert (first, second, third[0], fourth) == ("catcher", mirrored, "a", "b") and others == []
    monkeypatch.setattr(mutants, "BUDGET", 9.0)
    chosen = mutants._tests_for(mutant, baseline, [])
    assert chosen[0] == mirrored and {*chosen[2:5]} == {"b", "d", "catcher"}
    assert {name[0] for name in chosen[5:]} == {"a"}
    assert mutants._tests_for(mutant, Baseline(), []) == []


def test_of_a_file_as_many_are_drawn_as_are_wanted_and_always_the_same():
    drawn = [*mutants._drawn([MODULE], 5, 1)]
    assert drawn == [*mutants._drawn([MODULE], 5, 1)] != [*mutants._drawn([MODULE], 5, 2)]
    assert len(drawn) == 5 and [m.number for m in drawn] == sorted({m.number for m in drawn})
    every = [*mutants._drawn([MODULE], 0, 1)]
    assert [mutant.number for mutant in every] == [*range(len(every))] and {*map(str, drawn)} <= {*map(str, every)}


def test_the_report_counts_what_was_caught_and_shows_what_was_not(capsys):
    mutation = mutant_of_steps_in().mutation
    results = (CAUGHT, CAUGHT, TIMED_OUT, SURVIVED, mutants.NOT_RUN, GIVEN_UP)
    share = mutants.report([Mutant(MODULE, number, mutation, result) for number, result in enumerate(results)])
    text = capsys.readouterr().out
    assert share == 50.0 and text.count(f"{MODULE}:{mutation.line} in steps_in, return") == 3
    assert [line.split() for line in text.splitlines() if line.startswith("all")] == [
        ["all", "6", "2", "1", "1", "2", "50.0"]
    ]

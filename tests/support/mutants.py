"""Mutation testing: changes the core files in one place at a time, and tells which changes no test notices.

python -m tests.support.mutants tests/lora tests/files ...    (`make mutants` gives the fast tests)

A copy of the tree is tested. One process imports torch and all the tests; a fork of it runs them once, and notes the
lines that each executes and its time. Then a fork for each mutant exchanges the code of the mutated function and runs
the tests that execute its line, as long as none fails: those that have caught a mutant of the same function, those of
the mirrored file, then one variant of each other test, then the next variants, up to BUDGET seconds.

Seconds are those of the processor, so that a busy machine changes nothing: a mutant that uses up its own loops, and one
that does not even ask for the processor, for half a minute of the clock, waits without end; both are caught. What is
neither after minutes is given up, shown, and not counted as caught.

mutmut 3.8.1 was tried first. It needs as little time for a mutant, but leaves out 44 of the 240 functions of the core
files, those with a decorator (`replaced_folder` and `merged_weight` among them), removes no statements, and its
trampolines break generators that are called in other contexts, as `find_parameters` is: its first run of the tests is
red. cosmic-ray starts a process for each mutant, which spends five seconds on importing torch.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import NoReturn

import pytest

from tests.support import ranks
from tests.support.mutators import EXCLUDED, Mutation, mutated, mutations
from tests.support.paths import ROOT
from tests.support.patience import patient

CORE = ("sat_lora/files", "sat_lora/lora")
LEFT_OUT = {"delta_kernels.py": "Triton's kernels are compiled from their source, for a GPU"}
LEAST = 85.0  # percent of the mutants that have to be caught
PER_FILE = 25  # mutants at most, of more of them a draw by the seed: five minutes of the processor for all files
SLOW = 2.0  # seconds; a test that takes longer is not run
BUDGET = 6.0  # seconds of tests for a mutant that nothing has caught so far
SPARE, TIMES = 5, 5  # seconds of the processor, and what the tests took so many times: then it is taken for a loop
IDLE, USED = 30.0, 0.3  # seconds of the clock, and of the processor that it uses or waits for in them: then it waits
WAIT, SLOWER = 20.0, 30  # seconds of the clock, and what the tests took so many times: then it is given up
PATIENCE = "10"  # of the tests' own limits, which are of the clock (see `patience`)
MEMORY = 8 << 30  # bytes that a mutant may take beyond what the process has
PR_SET_PDEATHSIG = 1  # linux/prctl.h
CAUGHT, SURVIVED, TIMED_OUT, NOT_RUN = "caught", "survived", "timed out", "no fast test executes it"
GIVEN_UP = "given up, for it takes too long"
NOTICED = (CAUGHT, TIMED_OUT)
UNRELIABLE = "only a test has noticed it that fails without it too"
NOTHING = "-"  # has caught a mutant


@dataclass
class Baseline:
    """What the tests do without a mutation."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By the tests' names, of the processor."""
    tests: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    """By file and line: the tests that execute it."""
    failed: list[str] = field(default_factory=list)


@dataclass
class Mutant:
    path: str
    number: int
    mutation: Mutation
    result: str = NOT_RUN
    test: str | None = None
    """That has caught it."""

    @property
    def place(self) -> tuple[str, str]:
        return self.path, self.mutation.function


class Mutants:
    """A plugin of pytest: in place of one run of the collected tests it makes one for each mutant."""

    def __init__(self, paths: Sequence[str], per_file: int, seed: int, workers: int):
        self.paths, self.per_file, self.seed, self.workers = paths, per_file, seed, workers
        self.has_failed = False
        self.mutants: list[Mutant] = []
        self.functions: Functions = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.has_failed |= report.failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            self.failed = ["the tests cannot be collected"]
            return True
        for path in self.paths:
            importlib.import_module(path.removesuffix(".py").replace("/", "."))
        ranks.process_context = _no_ranks
        self.functions = _functions_of(self.paths)
        gc.collect()
        gc.freeze()  # a mutant's own collections need not look at all that was imported
        self._manager = session.config.pluginmanager
        self._items = {item.nodeid: item for item in session.items}
        started = time.monotonic()
        baseline = self._baseline()
        self.failed = baseline.failed
        print(f"\n{len(self._items)} tests in {time.monotonic() - started:.0f} s", flush=True)
        if not baseline.failed:
            self.mutants = list(_drawn(self.paths, self.per_file, self.seed))
            self._run(baseline)
        return True

    def _baseline(self) -> Baseline:
        """Made in a fork, so that this process keeps nothing of what the tests leave behind."""
        with tempfile.TemporaryDirectory() as folder:
            pid = os.fork()
            if pid == 0:
                with _ending_here():
                    self.become_worker(folder)
                    Path(folder, "baseline").write_bytes(pickle.dumps(self._measured()))
            os.waitpid(pid, 0)
            baseline: Baseline = pickle.loads(Path(folder, "baseline").read_bytes())
        return baseline

    def _measured(self) -> Baseline:
        import coverage  # of the extra `mutants`

        baseline = Baseline()
        collector = coverage.Coverage(data_file=None, include=[str(ROOT / path) for path in self.paths])
        collector.start()
        for name, item in self._items.items():
            collector.switch_context(name)
            started = _processor_time()
            self.has_failed = False
            # After each test all fixtures end: what they execute counts for every test that asks for them.
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            baseline.seconds[name] = _processor_time() - started
            if self.has_failed:
                baseline.failed.append(name)
        collector.stop()
        data = collector.get_data()
        for path in self.paths:
            for line, names in data.contexts_by_lineno(str(ROOT / path)).items():
                baseline.tests[path, line] = [name for name in names if name]
        return baseline

    def _run(self, baseline: Baseline) -> None:
        catchers: dict[tuple[str, str], list[str]] = {}
        waiting = [*reversed(self.mutants)]
        running: list[Worker] = []
        done, started = 0, time.monotonic()
        while waiting or running:
            while waiting and len(running) < self.workers:
                mutant = waiting.pop()
                names = _tests_for(mutant, baseline, catchers.get(mutant.place, []))
                if names:
                    running.append(Worker(mutant, names, _seconds(names, baseline), self))
            time.sleep(0.005)
            for worker in [*running]:
                result = worker.ended()
                if result is None:
                    continue
                running.remove(worker)
                mutant, done = worker.mutant, done + 1
                mutant.result, mutant.test = result
                if mutant.test is not None:
                    known = catchers.setdefault(mutant.place, [])
                    catchers[mutant.place] = [mutant.test, *(name for name in known if name != mutant.test)]
                if mutant.result not in NOTICED:
                    print(f"\n{mutant.path}:{mutant.mutation.line}: {mutant.result}", flush=True)
                if done % 100 == 0:
                    print(f"\n{done} of {len(self.mutants)} mutants in {time.monotonic() - started:.0f} s", flush=True)
        self._control(baseline)

    def _control(self, baseline: Baseline) -> None:
        """The tests that have caught mutants run in forks without one: what a test that fails there has caught counts
        for nothing.
        """
        names = sorted({mutant.test for mutant in self.mutants if mutant.test is not None})
        unreliable: list[str] = []
        while names:
            worker = Worker(None, names, _seconds(names, baseline), self)
            while (result := worker.ended()) is None:
                time.sleep(0.01)
            if result[0] != SURVIVED and result[1] is None:
                self.failed = [f"{result[0]}, in the way in which mutants are tested"]
                return
            if result[1] is not None:
                unreliable.append(result[1])
            names = names[names.index(result[1]) + 1 :] if result[1] is not None else []
        for mutant in self.mutants:
            if mutant.test in unreliable:
                mutant.result = UNRELIABLE

    def become_worker(self, folder: str) -> None:
        """A group of processes of its own, with files in `folder` and nothing to say, that ends with who started it."""
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silence, descriptor)
        self._manager.unregister(name="terminalreporter")
        os.environ["TMPDIR"] = os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = folder

    def run_tests(self, names: Sequence[str]) -> str | None:
        """The name of the first test that fails."""
        self.has_failed = False
        items = [self._items[name] for name in names]
        for item, following in zip(items, [*items[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.has_failed:
                return item.nodeid
        return None


class Worker:
    """A fork in which a mutant, or the program as it is, meets tests that take `seconds` of the processor without it.

    The limit on the processor's time holds for the fork, and once more for each process that its tests start.
    """

    def __init__(self, mutant: Mutant | None, names: Sequence[str], seconds: float, plugin: Mutants):
        self.mutant, self._folder = mutant, tempfile.mkdtemp(prefix="mutant-")
        self._result = Path(self._folder, "caught by")
        self._began = self._looked = self._active = time.monotonic()
        self._used = 0.0
        self._end = self._began + patient(WAIT) + SLOWER * seconds
        self.pid = os.fork()
        if self.pid == 0:
            with _ending_here():
                plugin.become_worker(self._folder)
                resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
                allowed = math.ceil(SPARE + TIMES * seconds)
                resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed + 1))
                if mutant is not None:
                    _exchange(mutant, plugin.functions)
                self._result.touch()
                caught_by = plugin.run_tests(names)
                self._result.write_text(caught_by or NOTHING)

    def ended(self) -> tuple[str, str | None] | None:
        """(CAUGHT, SURVIVED, TIMED_OUT or GIVEN_UP, the name of the test that has caught it); None while it runs. What
        takes too long is ended. RuntimeError: the mutant cannot be made.
        """
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        waits = pid == 0 and self._waits()
        if pid == 0 and not waits and time.monotonic() < self._end:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # with it what its tests have started
        if pid == 0:
            os.kill(self.pid, signal.SIGKILL)  # if it has no group yet
            os.waitpid(self.pid, 0)
        text = self._result.read_text() if self._result.exists() else None
        shutil.rmtree(self._folder, ignore_errors=True)
        if pid == 0:
            return TIMED_OUT if waits else GIVEN_UP, None
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return TIMED_OUT, None
        if text is None:
            raise RuntimeError(f"{self.mutant} could not be made")
        return (SURVIVED, None) if text == NOTHING else (CAUGHT, text or None)  # empty: it has ended the process

    def _waits(self) -> bool:
        """Whether nothing of it has used the processor, or waited for it, for IDLE seconds; it looks once a second."""
        now = time.monotonic()
        if now - self._looked >= 1:
            self._looked = now
            used = _used_by_group(self.pid)
            if used is None or abs(used - self._used) > USED:
                self._active = now
                self._used = used or 0.0
        return now - self._active >= IDLE


class _ending_here:
    """A context for the fork of a test run, which goes on nowhere."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        os._exit(0 if error[0] is None else 1)


def _no_ranks() -> NoReturn:
    pytest.skip("ranks are other processes, which do not have the mutation")


def _processor_time() -> float:
    """Of this process and those that it has waited for: what else the machine does counts for nothing."""
    return sum(os.times()[:4])


def _used_by_group(group: int) -> float | None:
    """Seconds for which the processes of a group have had the processor or stood in its queue; None where the system
    does not tell, or one of them waits for a disk.
    """
    nanoseconds = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, process_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group:
                if state == "D":
                    return None
                nanoseconds += sum(map(int, (folder / "schedstat").read_text().split()[:2]))
        except ProcessLookupError:  # it has ended
            continue
        except FileNotFoundError:
            if folder.exists():
                return None
    return nanoseconds / 1e9


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


# The mutants and their tests


def _seconds(names: Sequence[str], baseline: Baseline) -> float:
    """Those of the processor that these tests take without a mutation."""
    return sum(baseline.seconds[name] for name in names)


def _drawn(paths: Sequence[str], per_file: int, seed: int) -> Iterator[Mutant]:
    """Of each file all mutants, or as many as are wanted, in the order of their places."""
    for path in paths:
        found = mutations(Path(path).read_text(encoding="utf-8"))
        numbers = range(len(found))
        if 0 < per_file < len(found):
            numbers = sorted(random.Random(f"{seed} {path}").sample(numbers, per_file))
        for number in numbers:
            yield Mutant(path, number, found[number])


def _tests_for(mutant: Mutant, baseline: Baseline, catchers: Sequence[str]) -> list[str]:
    """In the order in which they shall run."""
    folder, _, file = mutant.path.replace("sat_lora/", "tests/").rpartition("/")
    mirrored = f"{folder}/test_{file}::"
    lines = (mutant.mutation.line, mutant.mutation.statement)  # not every line of a statement is noted
    executing = next(filter(None, (baseline.tests.get((mutant.path, line)) for line in lines)), [])
    first = {name: number for number, name in enumerate(catchers)}
    rounds: dict[str, int] = {}  # variants of one test come in turn with the other tests, and not all at once
    order = []
    for name in sorted(executing, key=lambda name: zlib.crc32(name.encode())):
        seconds = baseline.seconds[name]
        if seconds <= SLOW:
            test = name.partition("[")[0]
            rounds[test] = rounds.get(test, 0) + 1
            turn = 0 if name.startswith(mirrored) else rounds[test]
            order.append((first.get(name, len(first)), turn, seconds, name))
    chosen, spent = [], 0.0
    for *_, seconds, name in sorted(order):
        spent += seconds
        if spent > BUDGET and chosen:
            break
        chosen.append(name)
    return chosen


# The exchange of a function's code

Functions = dict[tuple[str, str], list[tuple[FunctionType, int]]]
"""By file and qualified name: the functions that there are, with the lines at which they begin."""


def _functions_of(paths: Sequence[str]) -> Functions:
    files = {str(ROOT / path): path for path in paths}
    functions: Functions = {}
    for value in gc.get_objects():  # but for those that are frozen
        if type(value) is FunctionType and value.__code__.co_filename in files:
            code = value.__code__
            key = (files[code.co_filename], code.co_qualname)
            functions.setdefault(key, []).append((value, code.co_firstlineno))
    return functions


def _exchange(mutant: Mutant, functions: Functions) -> None:
    """Put the mutated code into the function, wherever it is referred to."""
    source = Path(mutant.path).read_text(encoding="utf-8")
    tree = mutated(source, mutant.number)
    codes = {(c.co_qualname, c.co_firstlineno): c for c in _codes(compile(tree, str(ROOT / mutant.path), "exec"))}
    for function, line in functions[mutant.place]:
        function.__code__ = codes[mutant.mutation.function, line]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


# What is said


def report(mutants: Sequence[Mutant]) -> float:
    """Tells the mutants that no test has caught, and the figures of each file; the percentage that is caught."""
    for mutant in mutants:
        if mutant.result not in NOTICED:
            words = mutant.result if mutant.result != UNRELIABLE else f"{mutant.result}: {mutant.test}"
            print(
                f"{mutant.path}:{mutant.mutation.line} in {mutant.mutation.function}, {mutant.mutation.kind}: {words}"
            )
            print(f"  - {mutant.mutation.before}\n  + {mutant.mutation.after}")
    print(f"\n{'':46}mutants  caught  timed out  given up  survived      %")
    for path in [*dict.fromkeys(mutant.path for mutant in mutants), ""]:
        own = [mutant for mutant in mutants if mutant.path == path or not path]
        timed_out = sum(mutant.result == TIMED_OUT for mutant in own)
        caught = sum(mutant.result == CAUGHT for mutant in own)
        given_up = sum(mutant.result == GIVEN_UP for mutant in own)
        survived = len(own) - caught - timed_out - given_up
        share = 100 * (caught + timed_out) / max(1, len(own))
        print(f"{path or 'all':46}{len(own):7}{caught:8}{timed_out:11}{given_up:10}{survived:10}{share:7.1f}")
    return share


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.mutants",
        description="Mutation testing of the core files: exit status 1 if too few mutants are caught.",
        epilog="Left as they are: " + "; ".join(f"{kind} ({reason})" for kind, reason in EXCLUDED.items()),
    )
    parser.add_argument("tests", nargs="+", help="files and folders of tests, and more arguments of pytest")
    parser.add_argument("--file", action="append", help=f"a file to mutate; else those of {' and '.join(CORE)}")
    parser.add_argument("--per-file", type=int, default=PER_FILE, help="mutants of a file at most, drawn; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--least", type=float, default=LEAST, help="percentage that has to be caught")
    return parser


def in_a_copy(arguments: Sequence[str]) -> int:
    """Run it in a copy of the tree: what a mutated program writes and removes is not this one."""
    with tempfile.TemporaryDirectory(prefix="sat_lora-mutants-") as folder:
        copy = Path(folder, "sat_lora")
        shutil.copytree(ROOT, copy, ignore=_not_copied)
        environment = {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment["SAT_LORA_MUTANTS"] = str(copy)
        environment.setdefault("SAT_LORA_TEST_PATIENCE", PATIENCE)
        command = [sys.executable, "-m", "tests.support.mutants", *arguments]
        return subprocess.run(command, cwd=copy, env=environment).returncode


def _not_copied(folder: str, names: Sequence[str]) -> list[str]:
    made = (".git", ".venv", "runs", "site", "build", "dist") if Path(folder) == ROOT else ()
    return [name for name in names if name in made or name == "__pycache__" or name.endswith("_cache")]


def main(arguments: Sequence[str]) -> int:
    options, more = parser().parse_known_args(arguments)
    if os.environ.get("SAT_LORA_MUTANTS") != str(ROOT):
        return in_a_copy(arguments)
    started = time.monotonic()
    paths = options.file or sorted(
        str(path.relative_to(ROOT))
        for folder in CORE
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in LEFT_OUT
    )
    plugin = Mutants(paths, options.per_file, options.seed, options.workers)
    pytest.main([*options.tests, *more, "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[plugin])
    if plugin.failed or not plugin.mutants:
        print("without a mutation:", *(plugin.failed or ["there is nothing to mutate"]), sep="\n  ")
        return 2
    share = report(plugin.mutants)
    drawn = (
        f"at most {options.per_file} of a file, drawn by seed {options.seed}"
        if options.per_file
        else "all of each file"
    )
    print(f"{time.monotonic() - started:.0f} s, {_processor_time():.0f} s of the processor; {drawn}")
    return 0 if share >= options.least else 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # libraries that look at their ends would report what is frozen

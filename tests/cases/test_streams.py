"""Kind 11, starting: stdin, stdout and stderr that are closed, full, or of another alphabet end no command."""

import io
import os
import shlex
import subprocess
import sys

import pytest

from sat_lora.terminal.edge import LastingStream, run_command
from tests.support.paths import ROOT


class Failing(io.StringIO):
    """A stream whose disk is full from the third write on."""

    def __init__(self, number, file):
        super().__init__()
        self.number, self.file, self.writes = number, file, 0

    def write(self, text):
        self.writes += 1
        if self.writes > 2:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("number", [32, 28, 5, 122])  # EPIPE, ENOSPC, EIO, EDQUOT
def test_what_cannot_be_written_goes_nowhere_and_is_remembered(number, tmp_path):
    with open(tmp_path / "out", "w") as file:
        stream = LastingStream(Failing(number, file))
        for line in ("one", "two", "three", "four"):
            assert stream.write(line) == len(line)
        stream.flush()
        assert stream.error.errno == number and stream.getvalue() == "onetwo"
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(os.devnull))
    assert stream.closed is False


def test_a_process_without_a_stdout_has_a_status(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run_command("x", lambda: 3) == 3


CODE = """
import contextlib, os, sys
from sat_lora.terminal.edge import run_script
def main():
    file = open("first", "w")                      # not on a number that a library prints to
    with contextlib.suppress(OSError):
        os.write(1, b"from C")
    print("Höhe 猫 \\udcff"); print("e 猫", file=sys.stderr)
    file.write("mine"); file.close()
    return 7
run_script("x", main)
"""
CASES = {
    "all closed": ("<&- >&- 2>&-", 7),
    "stdout closed": (">&-", 7),
    "a reader that is gone": ("2>&1 | true; exit ${PIPESTATUS[0]}", 7),
    "a full disk": (">/dev/full", 7),
    "another alphabet": (">out", 7),
}


@pytest.mark.parametrize("case", CASES)
def test_a_command_ends_with_its_own_status_whatever_it_prints_to(case, tmp_path):
    redirection, status = CASES[case]
    (tmp_path / "x.py").write_text(CODE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} x.py {redirection}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "first").read_text() == "mine"
    if case == "a full disk":
        assert "x: what it printed could not all be written: No space left" in done.stderr
    if case == "another alphabet":
        assert (tmp_path / "out").read_text() == "from CH\\xf6he \\u732b \\udcff\n" and done.stderr == "e \\u732b\n"


def test_a_result_that_was_not_printed_is_a_mistake(tmp_path):
    code = "from sat_lora.terminal import edge\nedge.run_script('x', lambda: print('result'), prints_its_result=True)"
    done = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -c \"$0\" > /dev/full", code],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "x: what it printed could not all be written: No space left on device\n",
    )

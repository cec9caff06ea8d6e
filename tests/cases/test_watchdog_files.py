"""What `doctor --run` reads of a run folder that somebody else gave: one error or a verdict, within limits."""

import json
import os
import pickle
import struct
import time

import pytest
import torch

from sat_lora.cli import main
from sat_lora.errors import ConfigError
from sat_lora.watchdog.flight_record import FLIGHT
from sat_lora.watchdog.places import source_line
from sat_lora.watchdog.rank_files import ALIVE, FATAL, NUMBERS_AT, file_of, folder_of
from sat_lora.watchdog.testimony import STACKS
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.verdict import verdict

WRONG = [
    None,
    [],
    {},
    "x",
    -1,
    True,
    1.5,
    10**30,
    [[]],
    {"a": {"b": []}},
    [None],
    "\x1b[2J",
    float("nan"),
    float("inf"),
]
FRAME = ["/home/me/mine.py", 7, "hook", "wait()"]
ENTRY = dict(process_group=["0", "pg"], frames=[{"filename": "/a.py", "line": 3, "name": "f"}], collective_seq_id=1,
             profiling_name="gloo:all_reduce", input_sizes=[[4]], state="completed")  # fmt: skip


@pytest.fixture
def left(tmp_path):
    """The watchdog's folder of a run of two ranks that hung."""
    for rank in range(2):
        trace = Trace(tmp_path, torch.nn.Linear(2, 2), rank=rank, world_size=2)
        trace.at("backward", step=5)
        trace.arrival(0)(None)
        folder = folder_of(tmp_path)
        file_of(folder, rank, STACKS).write_text(json.dumps([dict(name="MainThread", main=True, frames=[FRAME])]))
        file_of(folder, rank, FLIGHT).write_bytes(pickle.dumps({"entries": [ENTRY]}))
    file_of(folder, 1, ".end.json").write_text(json.dumps(dict(error="OSError: x", frames=[FRAME], time=5.0)))
    (folder / ALIVE).write_text('{"0": true, "1": false}')
    return folder


def answer(folder):
    """The verdict's text, or the error's; whatever else is raised is a fault."""
    begun = time.process_time()
    try:
        text = verdict(folder.parent).text
    except ConfigError as error:
        text = str(error)
        assert f"the files in {folder} cannot be read: " in text and len(text) < 2000
    assert time.process_time() - begun < 1
    return text


def test_a_run_that_is_well_written_gets_its_verdict(left):
    assert answer(left).startswith("Rank 1 was ended by OSError: x in hook (/home/me/mine.py:7): wait().")


def spoiled(content, path, value):
    """A copy of what a file holds, with another value at a path of keys; an empty path: the value itself."""
    if not path:
        return value
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


STATIC = ("rank", "world_size", "pid", "process_started", "host", "argv", "cwd", "package", "modules", "parameters")


@pytest.mark.parametrize(
    "ending, paths",
    [
        (".json", [(), *((name,) for name in STATIC)]),
        (".end.json", [(), ("error",), ("frames",), ("frames", 0), *(("frames", 0, at) for at in range(4)), ("time",)]),
        (STACKS, [(), (0,), (0, "name"), (0, "main"), (0, "frames"), *((0, "frames", 0, at) for at in range(4))]),
    ],
)
def test_a_value_of_any_type_is_one_error_or_has_no_effect(ending, paths, left):
    file = file_of(left, 1, ending)
    content = json.loads(file.read_text())
    for path in paths:
        for value in WRONG:
            file.write_text(json.dumps(spoiled(content, path, value)))
            answer(left)


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"0": []}', "x", "", '{"1": {"a": 1}}', "NaN"])
def test_so_is_the_note_of_who_lives(content, left):
    (left / ALIVE).write_text(content)
    answer(left)


@pytest.mark.parametrize("name", list(ENTRY))
def test_so_is_a_record_of_collectives(name, left):
    for value in WRONG:
        file_of(left, 1, FLIGHT).write_bytes(pickle.dumps({"entries": [{**ENTRY, name: value}]}))
        answer(left)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"(((((", b"I9\n.", b"]q\x00h\x01.", b"\x8a\xff" + b"9" * 300, b"cos\nsystem\n."]
)
def test_bytes_that_are_no_record_are_one_error(content, left):
    file_of(left, 1, FLIGHT).write_bytes(content)
    assert "is no dump of torch's flight recorder" in answer(left)


@pytest.mark.parametrize("number", range(7))
def test_numbers_of_a_mapped_file_may_be_anything(number, left):
    file = file_of(left, 1, ".state")
    data = bytearray(file.read_bytes())
    for value in (2**32 - 1, 99, 1 << 24):
        if number < 5:
            struct.pack_into("<I", data, NUMBERS_AT + 4 * number, value)
        else:
            struct.pack_into("<d", data, 8 * (number - 5), float("nan") if value == 99 else value * 1e9)
        file.write_bytes(data)
        answer(left)
    file.write_bytes(data[:7])
    answer(left)


@pytest.mark.parametrize("ending", [".json", ".state", ".end.json", STACKS, FLIGHT, FATAL])
def test_a_pipe_or_five_gigabytes_of_nothing_are_neither_waited_for_nor_read(ending, left):
    file = file_of(left, 1, ending)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    answer(left)
    file.unlink()
    with open(file, "wb") as sparse:
        sparse.truncate(5 << 30)
    assert "larger than" in answer(left)


def test_a_signals_stack_names_no_file_that_is_read_for_it(left, tmp_path):
    (tmp_path / "secret.txt").write_text("mine alone\n")
    os.mkfifo(tmp_path / "pipe.py")
    file_of(left, 1, ".end.json").unlink()
    for place in ("/dev/zero", tmp_path / "secret.txt", tmp_path / "pipe.py"):
        text = f'Fatal Python error: Bus error\n\nCurrent thread 0x1:\n  File "{place}", line 1 in f\n'
        file_of(left, 1, FATAL).write_text(text)
        assert "mine alone" not in answer(left)
    (tmp_path / "own.py").write_text("first\nsecond\n")
    assert source_line(str(tmp_path / "own.py"), 2) == "second" and source_line(str(tmp_path / "own.py"), 9) == ""


def test_the_command_ends_with_one_line(left, capsys):
    (left / ALIVE).write_text("[" * 100_000)
    assert main(["doctor", "--run", str(left.parent)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

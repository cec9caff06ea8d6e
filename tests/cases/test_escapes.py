"""Names that files bring into messages: a terminal shows them and obeys none of them, and none begins a line."""

import logging
import os
import subprocess

import pytest

from sat_lora.cli import main
from sat_lora.errors import AdapterError, DataError
from sat_lora.printable import shell_line
from sat_lora.terminal.notice import warn
from sat_lora.training.runs.run_folder import RunFolder
from tests.support.run_logs import logs_of

NAMES = {
    "a title of the terminal": "a\x1b]0;owned\x07b.png",
    "a clearing of the screen in C1": "a\x9b2Jb.png",
    "a carriage return": "fine\rerror: gone.png",
    "text that runs backwards": "\u202egnp.exe",
    "bytes that are no UTF-8": "caf\udce9.png",
    "a line separator": "a\u2028error: b.png",
    "a bell and a backspace": "a\x07\x08b",
}


def shown(error) -> list[str]:
    text = str(error)
    assert all(line.isprintable() for line in text.split("\n"))
    text.encode("utf-8")
    return text.split("\n")


@pytest.mark.parametrize("case", NAMES)
def test_what_an_error_says_is_only_shown(case):
    (line,) = shown(AdapterError(f"folder: the model has no layer {NAMES[case]}"))
    assert line.startswith("folder: the model has no layer ")


def test_a_name_with_a_line_feed_forges_no_message():
    _, forged = shown(DataError("data/b\nfinetune_cogvlm.py: error: forged.png: cannot be read"))
    assert forged == "  finetune_cogvlm.py: error: forged.png: cannot be read"


def test_lines_of_a_list_stay_as_they_are():
    assert str(DataError("2 problems:\n  one\n- two")) == "2 problems:\n  one\n- two"


def test_a_broken_sample_is_named_on_one_line(tmp_path, capsys):
    run = RunFolder(tmp_path, is_writer=True)
    logs_of(run).on_broken([("b\nx", "b\nerror: forged\x1b[31m: cannot be read")], 0)
    assert capsys.readouterr().out == "skipped: b\\nerror: forged\\x1b[31m: cannot be read\n"


def test_a_warning_is_only_shown(caplog):
    with caplog.at_level(logging.WARNING, logger="sat_lora"):
        warn('"bf16\x1b[31m" is not known', {})
    assert "\\x1b[31m" in caplog.text and "\x1b" not in caplog.text


WORDS = [
    "a b",
    "it's",
    "$HOME",
    "a\x1b[31mb",
    "x\n'y\\\\z",
    "caf\u00e9\u202e",
    b"caf\xe9.png".decode("utf-8", "surrogateescape"),
    "",
]


@pytest.mark.parametrize("name", WORDS)
def test_a_line_to_paste_names_what_it_names_and_is_only_shown(name):
    line = shell_line(["printf", "%s", name])
    assert line.isprintable()
    assert subprocess.run(["bash", "-c", line], stdout=subprocess.PIPE, check=True).stdout == os.fsencode(name)


def test_what_a_command_has_made_is_only_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sat_lora.adapters.combine.combine_adapters", lambda *args, **settings: None)
    out = str(tmp_path / "x\x1b[2Jy")
    assert main(["combine", "a", "b", "--method", "cat", "--out", out]) == 0
    assert capsys.readouterr().out == f"combined adapter in {tmp_path}/x\\x1b[2Jy\n"

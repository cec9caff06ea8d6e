"""The examples under `sat-lora COMMAND --help`."""

import itertools
import re
import shlex

import pytest

from sat_lora.cli import build_parser, main
from sat_lora.commands.evaluate import build_parser as evaluation_parser
from sat_lora.commands.pack import build_parser as packing_parser
from sat_lora.training.settings.options import build_parser as finetune_parser

COMMANDS = (
    "chat combine data doctor estimate evaluate export import inspect merge pack quantize runs serve train".split()
)


def examples_of(name: str, capsys) -> list[list[str]]:
    """Return the arguments of every line of `sat-lora NAME --help` that starts `sat-lora` or its module."""
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out.replace("\\\n", " ")
    lines = re.findall(r"^  (?:sat-lora|deepspeed .*--module sat_lora\.cli) (.+)", shown, re.M)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_help_text_are_taken(name, capsys, monkeypatch, tmp_path):
    """By the parsers alone: what an example does is a test of its command's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("lora: {r: 8}\n")
    own = {"train": finetune_parser, "evaluate": evaluation_parser, "pack": packing_parser}
    lines = examples_of(name, capsys)
    assert lines or name in ("evaluate", "pack")
    for command, *arguments in lines:
        assert command == name
        if name in own:
            own[name]().parse_args(arguments)
            continue
        options, more = build_parser().parse_known_args([command, *arguments])
        assert not more or options.takes_more
        options_of_a_run = itertools.dropwhile(lambda word: name == "data" and not word.startswith("-"), more)
        finetune_parser().parse_args([*options_of_a_run])

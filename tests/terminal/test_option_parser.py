"""Options in either spelling, and what is said of one that does not exist."""

import pytest

from sat_lora.terminal.option_parser import OptionParser, advice_on, meant_options


@pytest.fixture
def parser():
    parser = OptionParser(prog="program")
    for option in ("--lr", "--train-data", "--save-interval", "--target_modules"):
        parser.add_argument(option)
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3])
    return parser


def refusal(parser, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["--train-data", "--train_data", "--train_data="])
def test_dashes_and_underscores_are_the_same(spelling, parser):
    given = [spelling + "a-b"] if spelling[-1] == "=" else [spelling, "a-b"]
    assert parser.parse_args(given).train_data == "a-b"


def test_none_is_read_as_the_abbreviation_of_another(parser, capsys):
    assert "unknown: --train x; " in refusal(parser, capsys, "--train", "x")


HINTS = {
    "--train-dtaa": "did you mean --train-data?",
    "--targetmodules": "did you mean --target_modules?",
    "--learning_rate": "did you mean --lr?",
    "--Learning-Rate": "did you mean --lr?",
    "--larning-rate": "did you mean --lr?",
    "--save_steps=3": "did you mean --save-interval?",
    "--load_in_4bit": "--quantize nf4 holds the base in 4.25 bits",
    "--optim": "the optimizer is AdamW",
    "--nproc_per_node": "an option of the launcher",
    "--frobnicate": "--help lists the options",
}


@pytest.mark.parametrize("option", HINTS)
def test_what_was_most_likely_meant_is_said(option, parser, capsys):
    said = refusal(parser, capsys, option)
    assert said.startswith(f"program: error: unknown: {option}; ") and HINTS[option] in said
    assert said.count("\n") == 1


def test_an_option_of_others_is_proposed_where_it_exists_alone():
    assert meant_options("--gradient_clipping", {}) == []
    assert meant_options("--gradient_clipping", {"__clip_grad": "--clip-grad"}) == ["--clip-grad"]
    assert advice_on("--lr") is None


def test_a_value_that_is_none_of_the_choices_is_told_with_them(parser, capsys):
    assert "invalid choice: 4, wanted one of 0, 1, 2, 3" in refusal(parser, capsys, "--zero-stage", "4")


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_rank_0_alone_speaks(rank, lines, parser, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert refusal(parser, capsys, "--no-such-option").count("\n") == lines


def test_what_belongs_to_another_parser_is_left_over():
    parser = OptionParser(prog="program", takes_more=True)
    parser.add_argument("--json", action="store_true")
    options, left = parser.parse_known_args(["--lr", "3", "--json", "path"])
    assert options.json and left == ["--lr", "3", "path"]

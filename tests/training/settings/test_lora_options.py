"""The LoRA options: LoraConfig's fields under their own names, and the names of CogVLM's published scripts."""

import dataclasses
import json

import pytest

from sat_lora.lora.config import LoraConfig
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.settings.lora_options import LORA_FIELDS, first_sentence
from sat_lora.training.settings.options import build_parser
from tests.support.configs import parse_options
from tests.support.option_errors import failure

# For every field, words of a command line and the value that LoraConfig has after them.
GIVEN = {
    "r": (["8"], 8),
    "lora_alpha": (["12.5"], 12.5),
    "lora_dropout": (["0.1"], 0.1),
    "use_rslora": ([], True),
    "use_dora": ([], True),
    "init_lora_weights": (["pissa_niter_4"], "pissa_niter_4"),
    "loftq_iter": (["5"], 5),
    "freeze_a": ([], True),
    "target_modules": (["language-mlp", "attention.dense"], ("language-mlp", "attention.dense")),
    "exclude_modules": (["projector"], ("projector",)),
    "layers_to_transform": (["language:0-15,vit:40-62"], "language:0-15,vit:40-62"),
    "modules_to_save": (["linear_proj", "boi"], ("linear_proj", "boi")),
    "bias": (["lora_only"], "lora_only"),
    "rank_pattern": (["vit.*dense=4", "(?=a)a|dense=2"], {"vit.*dense": 4, "(?=a)a|dense": 2}),
    "alpha_pattern": (["dense=8", "a=0.5"], {"dense": 8.0, "a": 0.5}),
    "qkv_slots": (["q", "v"], "qv"),
    "adapter_dtype": (["float32"], "float32"),
    "lr_ratio": (["16"], 16.0),
}


def test_every_field_but_the_seed_has_an_option_of_its_name_type_and_default():
    actions = {string: action for action in build_parser()._actions for string in action.option_strings}
    default = parse_options([]).lora
    assert default == LoraConfig(), "the options' defaults are LoraConfig's"
    for field in dataclasses.fields(LoraConfig):
        if field.name == "seed":
            continue
        action = actions[f"--{field.name}"]
        assert action.dest == field.name and action.help
        words, value = GIVEN[field.name]
        config = parse_options([f"--{field.name}", *words]).lora
        assert getattr(config, field.name) == value
        assert type(getattr(config, field.name)) is type(value)
        assert dataclasses.replace(config, **{field.name: getattr(default, field.name)}) == default


def test_the_seed_of_the_adapters_is_the_runs():
    assert parse_options(["--seed", "7"]).lora.seed == 7


def test_the_published_names_mean_rank_and_layers():
    options = parse_options(["--lora_rank", "10", "--layer_range", "0", "3", "5"])
    assert (options.lora.r, options.lora.layers_to_transform) == (10, (0, 3, 5))
    assert options.given == {"r", "layers_to_transform"}
    assert options.lora.layers() == {None: {0, 3, 5}}


def test_the_help_lists_every_name_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--r N, --lora_rank N rank of A (r x in) and B (out x r) (default: 16)" in text
    assert "--layer_range N [N ...] --layers_to_transform as a list of numbers" in text
    assert all(f"--{name}" in text for name in LORA_FIELDS)
    assert "(default: q k v)" in text and "(default: )" not in text


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["projector"], ("projector",)),
        (["attention.dense"], ("attention.dense",)),
        ([r".*layers\.\d+\.mlp\..*"], r".*layers\.\d+\.mlp\..*"),
        (["dense|query_key_value"], "dense|query_key_value"),
        (["dense", "vit-mlp"], ("dense", "vit-mlp")),
    ],
)
def test_a_word_alone_that_is_no_plain_name_is_a_regular_expression(option, words, value):
    config = parse_options([f"--{option}", *words]).lora
    assert getattr(config, option) == value


@pytest.mark.parametrize("words", [["qv"], ["q", "v"]])
def test_slots_are_written_together_or_apart(words):
    assert parse_options(["--qkv_slots", *words]).lora.qkv_slots == "qv"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--r", "four"], ["--r", "got 'four'", "a whole number"]),
        (["--r", "4.5"], ["--r", "got '4.5'", "a whole number"]),
        (["--lora_alpha", "inf"], ["--lora_alpha", "got 'inf'", "a number"]),
        (["--rank_pattern", "dense"], ["--rank_pattern", "got 'dense'", "wanted PATTERN=VALUE"]),
        (["--rank_pattern", "dense=x"], ["--rank_pattern", "got 'x'", "a whole number"]),
        (["--alpha_pattern", "=3"], ["--alpha_pattern", "got '=3'", "wanted PATTERN=VALUE"]),
        (["--target_modules"], ["--target_modules", "at least one"]),
        (["--use_dora=yes"], ["--use_dora", "'yes'"]),
        (["--lora_targets", "projector"], ["unknown: --lora_targets"]),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_with_its_option(capsys, argv, words):
    message = failure(capsys, argv)
    assert all(word in message for word in words), message
    assert message.count("\n") == 1


def test_every_wrong_value_is_reported_with_its_option():
    problems = parse_options(
        ["--r", "0", "--init_lora_weights", "zeros", "--layers_to_transform", "5-2,a", "--rank_pattern", "(=3"]
    ).problems
    assert "--r has to be a whole number of at least 1, got 0" in problems
    assert any(p.startswith("--init_lora_weights has to be one of kaiming, ") for p in problems)
    assert any(p.startswith("--layers_to_transform: '5-2' runs backwards") for p in problems)
    assert any(p.startswith("--rank_pattern: '(' is not a regular expression") for p in problems)
    assert len(problems) == 4


def test_a_resumed_run_has_every_value_of_the_first(tmp_path):
    options = parse_options([word for name, (words, _) in GIVEN.items() for word in (f"--{name}", *words)])
    RunFolder(tmp_path, is_writer=True).write_settings(options, world={})
    resumed = parse_options(["--resume", str(tmp_path)])
    assert resumed.lora == options.lora
    assert resumed.given == {*LORA_FIELDS, "resume"}
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["rank_pattern"] == GIVEN["rank_pattern"][1]


def test_every_field_says_what_it_is():
    assert all(len(field.metadata["help"]) > 20 for field in dataclasses.fields(LoraConfig))


def test_a_line_of_help_is_the_first_sentence():
    assert first_sentence("Scale by arXiv 2312.03732 on\ntwo lines. More.") == "scale by arXiv 2312.03732 on two lines"
    assert first_sentence("LoRA it is.") == "LoRA it is"
    assert first_sentence("") == ""

"""Mistakes with quantised bases: one message that says what was meant, before a weight is read."""

import json

import pytest
import torch

from sat_lora import ConfigError, quantize_model
from sat_lora.cli import build_parser, main
from sat_lora.cogvlm.checkpoints import load as loading
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.commands import chat, evaluate
from sat_lora.quantization.config import Quantization
from sat_lora.quantized import kernels
from sat_lora.training.evaluation import evaluated, evaluation_file
from sat_lora.training.finetune import finetune
from sat_lora.training.prepare import _check_targets
from sat_lora.training.settings.config import NONE, Origin, Quantizing, TrainConfig
from sat_lora.training.settings.config_file import as_yaml, read_config_file
from sat_lora.training.settings.options import parse_options
from tests.support.paths import TINY_BASE
from tests.support.tiny import WIDE, tiny_model

LONG = "a" * 5000


def said_by(capsys, *arguments):
    try:
        status = main([*map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return status, said.err


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("NF4", "invalid choice: 'NF4', wanted one of nf4, int8; did you mean nf4?"),
        ("INT8", "did you mean int8?"),
        ("Int-8", "did you mean int8?"),
        (" nf4", "did you mean nf4?"),
        ("fp4", "invalid choice: 'fp4', wanted one of nf4, int8"),
        ("4", "invalid choice: '4', wanted one of nf4, int8"),
        ("", "invalid choice: '', wanted one of nf4, int8"),
    ],
)
def test_a_scheme_is_written_in_many_ways(value, words, capsys, tmp_path):
    status, said = said_by(capsys, "quantize", "--base", TINY_BASE, "--out", tmp_path / "o", "--quantize", value)
    assert status == 2 and words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fit", "24GB"], "--fit: got '24GB', wanted a number above 0"),
        (["--fit", "24,5"], "did you mean 24.5?"),
        (["--fit", "0"], "wanted a number above 0"),
        (["--fit", "nan"], "wanted a number above 0"),
        (["--fit", "24", "--device-memory", "22"], "--device-memory: --fit says how much a card has"),
        (["--total-batch", "32"], "--total-batch: it is for --fit GB"),
        (["--fit", "24", "--total-batch", "0"], "--total-batch: got '0', wanted a whole number above 0"),
        (["--fit", "24", "--total-batch", "8", "--gradient-accumulation-steps", "2"], "is given as well; leave one"),
        (["--fit", "24", "--gpus", "3", "--model-parallel-size", "2"], "3 ranks do not divide into groups of 2"),
        (["--fit", "24", "--deepspeed_config", "no.json"], "--deepspeed_config: no.json is not a file"),
        (
            ["--fit", "24", "--total-batch", "7", "--gpus", "2", "--model-parallel-size", "1"],
            "a multiple of 2 data-par",
        ),
    ],
)
def test_what_cannot_be_fitted_is_one_message(arguments, words, capsys):
    status, said = said_by(capsys, "estimate", "--from_pretrained", TINY_BASE, "--max_length", "64", *arguments)
    assert status == 2 and words in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(modules=[LONG]), "'" + "a" * 99 + " ... matches no layer"),
        (dict(modules=["x\x1b[2J"]), r"\\x1b\[2J' matches no layer"),
        (dict(keep_modules="[z-a]"), "is not a regular expression: bad character range z-a"),
        (dict(modules=["all-linear"], keep_modules=".*"), "nothing is left after keep_modules"),
        (dict(modules=[".*gate_proj.*", ".*norm.*"]), "quantize_modules: '.*norm.*' matches no layer"),
    ],
)
def test_a_pattern_of_a_person_is_answered_in_bounds(fields, words, single_process_group):
    with pytest.raises(ConfigError, match=words) as raised:
        quantize_model(tiny_model(config=WIDE), **fields)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("scheme", [None, 4, True, "NF4", ["nf4"], ""])
def test_a_scheme_of_another_kind_is_refused_in_python(scheme):
    with pytest.raises(ConfigError, match="quantize: there is no scheme .*, only nf4 and int8"):
        Quantization(scheme=scheme)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--load_in_4bit"], "--quantize nf4 holds the base in 4.25 bits"),
        (["--load-in-8bit", "True"], "--quantize int8 holds the base in 8.25 bits"),
        (["--bnb_4bit_compute_dtype", "bfloat16"], "--quantize nf4 has no further settings"),
        (["--double-quant"], "--quantize nf4 has no further settings"),
        (["--quantise", "nf4"], "did you mean --quantize?"),
        (["--quantize-module", "x"], "did you mean --quantize_modules?"),
    ],
)
def test_what_others_call_it_is_known(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(options, environ={})
    assert stop.value.code == 2 and words in capsys.readouterr().err


class Broken:
    """bitsandbytes that imports, and fails where it is used."""

    __version__ = "9.9"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (AttributeError("module has no attribute 'dequantize_4bit'"), "fails on CUDA: AttributeError: module has no"),
        (OSError("libbitsandbytes_cuda131.so: cannot open\nlong story"), "OSError: libbitsandbytes_cuda131.so: cannot"),
        (RuntimeError("\x1b[31mno kernel image"), r"RuntimeError: \x1b[31mno kernel image"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_broken_bitsandbytes_is_told_with_its_cause_and_torch_decodes(error, cause, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", Broken)
    monkeypatch.setattr(kernels, "decode_nf4", fails)
    monkeypatch.setattr(torch, "full", lambda *_, **settings: torch.empty(1, kernels.BLOCK // 2, dtype=torch.uint8))
    monkeypatch.setattr(torch, "ones", lambda *_, **settings: torch.empty(1, 1, dtype=torch.bfloat16))
    warnings = []
    monkeypatch.setattr(kernels, "warn", warnings.append)
    kernels.is_usable.cache_clear()
    try:
        assert not kernels.is_usable() and not kernels.is_usable()
    finally:
        kernels.is_usable.cache_clear()
    (warning,) = warnings
    assert cause in warning and "decoded by torch" in warning and "\n" not in warning and "\x1b" not in warning


@pytest.fixture(scope="module")
def folders(tmp_path_factory, single_process_group):
    """The tiny base in fewer bits, by the scheme."""
    home = tmp_path_factory.mktemp("quantised")
    for scheme in ("nf4", "int8"):
        quantize_base(TINY_BASE, home / scheme, Quantization(scheme=scheme))
    return {scheme: str(home / scheme) for scheme in ("nf4", "int8")}


@pytest.fixture
def run(tmp_path):
    """A run on the tiny base in nf4, as far as its settings."""
    said = {"from_pretrained": str(TINY_BASE), "quantize": "nf4", "keep_modules": ["vit-mlp"], "given": ["quantize"]}
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {**said, "test_data": ["images"]}}))
    return str(tmp_path / "run")


SAID_OF_A_FOLDER = {
    "none": (["--quantize", "none"], "--quantize: got none, and"),
    "another scheme": (["--quantize", "int8"], "--quantize: got int8, and"),
    "linears to keep": (["--keep_modules", "vit-mlp"], "--keep_modules:"),
    "linears": (["--quantize_modules", "language-mlp"], "--quantize_modules:"),
}
COMMANDS = {
    "evaluate": ["--test-data", str(TINY_BASE)],
    "chat": ["--prompt", "?"],
    "serve": ["--port", "0"],
    "estimate": [],
    "estimate --fit 24": [],
}


@pytest.mark.parametrize(("options", "beginning"), SAID_OF_A_FOLDER.values(), ids=SAID_OF_A_FOLDER)
@pytest.mark.parametrize("command", COMMANDS)
def test_how_a_quantised_folder_is_held_is_not_said_otherwise(
    command, options, beginning, folders, capsys, monkeypatch
):
    monkeypatch.setattr(loading._OwnWeights, "__init__", None)  # nothing is loaded
    line = [*command.split(), "--from_pretrained", folders["nf4"], *COMMANDS[command], *options]
    status, said = said_by(capsys, *line)
    why = (
        f"{folders['nf4']} is quantised already, to nf4: all-linear, and holds no other weights; leave the option out, "
    )
    assert status == 2
    assert f"error: {beginning} {why}or give the base that it was made of, {TINY_BASE.name} (CogVLM, " in said


@pytest.mark.parametrize(("options", "beginning"), SAID_OF_A_FOLDER.values(), ids=SAID_OF_A_FOLDER)
def test_nor_where_a_run_begins(options, beginning, folders, image_folder, tmp_path, capsys):
    given = ["--train-data", str(image_folder), "--save", str(tmp_path), "--experiment-name", "run", *options]
    with pytest.raises(ConfigError, match=f"^{beginning} .*nf4 is quantised already, to nf4: .*made of, tiny_cogvlm"):
        finetune(parse_options(["--from_pretrained", folders["nf4"], "--version", "base", *given], environ={}))
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_file_says_none_as_an_option_does_and_what_is_printed_leaves_it_to_the_base(folders, tmp_path, run):
    file = tmp_path / "settings.yaml"
    given = ["--from_pretrained", folders["nf4"], "--test-data", "images"]

    def config_of(*options):
        return evaluate.read_settings(evaluate.build_parser().parse_args([*options])).config

    file.write_text("quantize: none\n")
    with pytest.raises(ConfigError, match="^--quantize: got none, and .* is quantised already"):
        config_of(*given, "--config", str(file))
    for options, value in ((given, None), (["--run", run], "nf4"), (["--run", run, "--quantize", "none"], NONE)):
        config = config_of(*options)
        file.write_text(as_yaml(config))
        assert read_config_file(file).get("quantize") == value
        assert config_of("--config", str(file)).quantization == config.quantization


def settings_by(command, *options):
    """The config of a command that answers."""
    if command == "evaluate":
        return evaluate.read_settings(evaluate.build_parser().parse_args([*options])).config
    return chat.read_settings(build_parser().parse_args([command, *options]))[0]


@pytest.mark.parametrize("command", ["evaluate", "chat", "serve"])
def test_a_quantised_folder_in_the_place_of_a_runs_base_is_taken_as_it_is(command, folders, run):
    on_run = Quantizing(quantize="nf4", keep_modules=("vit-mlp",))
    for base in folders.values():
        assert settings_by(command, "--run", run, "--from_pretrained", base).quantization == Quantizing()
        for options, beginning in SAID_OF_A_FOLDER.values():
            if options[-1] not in base:
                with pytest.raises(ConfigError, match=f"^{beginning} {base} is quantised already, to "):
                    settings_by(command, "--run", run, "--from_pretrained", base, *options)
    assert settings_by(command, "--run", run).quantization == on_run
    assert settings_by(command, "--run", run, "--from_pretrained", str(TINY_BASE)).quantization == on_run
    own = settings_by(command, "--run", run, "--from_pretrained", folders["nf4"], "--quantize", "nf4")
    assert own.quantization == on_run  # which is compared with what the folder holds, when that is read


@pytest.mark.usefixtures("single_process_group")
def test_a_run_goes_on_on_a_base_that_is_held_as_before(folders):
    values = {"from_pretrained": folders["int8"], "quantize": "nf4"}
    for origin in (Origin.RUN, Origin.RUN_DEFAULT):
        with pytest.raises(
            ConfigError, match="^--from_pretrained: .* is quantised to int8: .*, and the run to resume ho"
        ):
            _check_targets(TrainConfig.of(values, {"from_pretrained": Origin.OPTION, "quantize": origin}))


def test_an_evaluation_says_how_the_folder_of_its_base_is_held(folders, tmp_path, monkeypatch):
    """As one with the options does; the file of a version that did not say it is known again."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.of({"from_pretrained": folders["nf4"], "test_data": ["images"]})
    whole = TrainConfig.of({"from_pretrained": str(TINY_BASE), "test_data": ["images"], "quantize": "nf4"})
    of = evaluated(config, None)
    assert of == {**evaluated(whole, None), "base": of["base"]} and of["quantize"]["quantize"] == "nf4"
    place = dict(adapter=None, run=None, out=None)
    first, _ = evaluation_file(config, **place)
    second = first.with_name(f"{first.stem}-2.json")
    before = {name: value for name, value in of.items() if name != "quantize"}
    for known, wanted in ((of, first), (before, first), ({**before, "prompt": "another"}, second)):
        first.write_text(json.dumps({"images": 1, "of": known}))
        assert evaluation_file(config, **place)[0] == wanted

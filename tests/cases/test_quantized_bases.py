"""Mistakes with quantised bases: one message that says what was meant, before a weight is read."""

import pytest
import torch

from sat_lora import ConfigError, quantize_model
from sat_lora.cli import main
from sat_lora.quantization.config import Quantization
from sat_lora.quantized import kernels
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

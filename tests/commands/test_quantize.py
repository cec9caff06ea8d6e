"""`sat-lora quantize`, in this process."""

import pytest

from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights
from sat_lora.quantized.layers import quantized_weights
from tests.support.tiny import CONFIG, WIDE, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture
def base(tmp_path):
    save_weights(tmp_path / "base", WIDE, tiny_model(config=WIDE).state_dict())
    return tmp_path / "base"


def test_it_writes_a_base_and_says_how_to_use_it(base, tmp_path, capsys):
    out = tmp_path / "int8"
    assert (
        main(["quantize", "--base", str(base), "--out", str(out), "--quantize", "int8", "--keep_modules", "projector"])
        == 0
    )
    said = capsys.readouterr().out
    assert f"quantised base in {out}, " in said and f"--from_pretrained {out}, at any --model-parallel-size" in said
    names = [name for name, weight in quantized_weights(load_cogvlm(out)[0]) if weight.scheme.name == "int8"]
    assert len(names) > 20 and not any("linear_proj" in name for name in names)


def uneven(tmp_path):
    """A base of whose rows blocks divide none: hidden sizes of 48 and 72."""
    sizes = dict(hidden_size=48, inner_hidden_size=72)
    config = {**CONFIG, **sizes}
    save_weights(tmp_path / "uneven", config, tiny_model(config=config).state_dict())
    return str(tmp_path / "uneven")


MISTAKES = {
    "no base": (["--base", "nowhere"], "--base: nowhere is not a SAT model folder: it does not exist"),
    "a folder that is there": (["--out", "."], "--out: . exists; give a new folder"),
    "an unknown scheme": (["--quantize", "fp4"], "fp4"),
    "an unknown module": (["--quantize_modules", "gate"], "quantize_modules: 'gate' matches no layer; nearest: "),
    "a convolution": (["--quantize_modules", "patch_embedding.proj"], "is a Conv2d, and only linears are quantised"),
    "nothing": (["--keep_modules", "all-linear"], "quantize_modules: nothing is left after keep_modules; keep fewer"),
    "the head alone": (
        ["--quantize_modules", "lm-head"],
        "quantize_modules: nothing that it selects can be quantised: mixins.lm.lm_head is the output head, which stays "
        "whole; select other linears",
    ),
    "the head, and no keeping of it": (
        ["--quantize_modules", "lm-head", "--keep_modules", "vit-mlp"],
        "nothing that it selects can be quantised: mixins.lm.lm_head is the output head, which stays whole; select",
    ),
    "the head, and all else kept": (
        ["--quantize_modules", "lm-head", "projector", "--keep_modules", "projector"],
        "nothing is left after keep_modules; mixins.lm.lm_head is the output head, which stays whole; keep fewer",
    ),
    "no GPU": (["--device", "cuda"], "--device: got cuda, and there is no CUDA device; leave it out"),
}


@pytest.mark.parametrize(("options", "problem"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message_and_leaves_nothing(base, tmp_path, capsys, monkeypatch, options, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    defaults = ["--base", str(base), "--out", "new"]
    try:
        status = main(["quantize", *defaults, *options])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and problem in said.err + said.out and "Traceback" not in said.err
    assert not (tmp_path / "new").exists()


def test_rows_that_no_block_divides_are_named(tmp_path, capsys):
    assert main(["quantize", "--base", uneven(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "has rows of 48 elements on each rank, which blocks of 64 or 32 do not divide" in capsys.readouterr().err

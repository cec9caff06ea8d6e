"""The options that say how many bits a base is held in, up to what they make."""

import json

import pytest
import torch

from sat_lora import ConfigError
from sat_lora.cogvlm.checkpoints import load as loading
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.quantization.config import NAMES, Quantization
from sat_lora.quantized import kernels
from sat_lora.quantized.kernels import look_for_kernels
from sat_lora.training.evaluation import evaluated
from sat_lora.training.finetune import finetune
from sat_lora.training.prepare import _check_targets, scheme_of_base
from sat_lora.training.resume import SETTLED, settled_problems
from sat_lora.training.settings.config import NONE, TrainConfig
from sat_lora.training.settings.config_file import as_yaml, read_config_file
from tests.support.configs import parse_options
from tests.support.option_errors import failure
from tests.support.paths import TINY_BASE
from tests.support.tiny import WIDE, tiny_model


def quantization(*argv) -> Quantization | None:
    config = parse_options(["--from_pretrained", "base", *argv])
    return config.quantization.of(config.lora)


def test_a_base_stays_whole_unless_it_is_said():
    assert quantization() is None and quantization("--quantize", NONE) is None
    assert [quantization("--quantize", name).scheme for name in NAMES] == [*NAMES]


def test_patterns_are_those_of_target_modules():
    asked = quantization("--quantize", "nf4", "--quantize_modules", "vit-mlp", "dense", "--keep_modules", r".*\.0\..*")
    assert asked == Quantization(scheme="nf4", modules=("vit-mlp", "dense"), keep_modules=r".*\.0\..*")


def test_what_trains_whole_is_handed_on():
    assert quantization("--quantize", "nf4", "--modules_to_save", "linear_proj", "boi").trained == (
        "linear_proj",
        "boi",
    )


def test_an_unknown_scheme_is_answered_with_those_that_there_are(capsys):
    said = failure(capsys, ["--from_pretrained", "base", "--quantize", "nf3"])
    assert "--quantize" in said and "nf3" in said and "nf4" in said and "int8" in said


def test_a_file_says_the_same(tmp_path):
    config = parse_options(["--from_pretrained", "base", "--quantize", "int8", "--keep_modules", "vit-mlp"])
    (tmp_path / "run.yaml").write_text(as_yaml(config))
    again = parse_options(["--config", str(tmp_path / "run.yaml")])
    assert again.quantization == config.quantization
    assert read_config_file(tmp_path / "run.yaml")["quantize"] == "int8"
    assert TrainConfig.of(json.loads(json.dumps(config.flat()))).quantization == config.quantization


@pytest.mark.parametrize("name", ["quantize", "quantize_modules", "keep_modules"])
def test_a_run_keeps_it_for_good(name, tmp_path):
    assert name in SETTLED
    before = TrainConfig.of({"from_pretrained": "base", "save": str(tmp_path), "experiment_name": "run"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": before.flat()}))
    other = before.replaced(**{name: "nf4" if name == "quantize" else ["vit-mlp"]})
    state = {"run": {"settings": {key: before.value(key) for key in SETTLED}}}
    (problem,) = settled_problems(other, state)
    assert problem.startswith(f"--{name}: got ") and "leave it out, or start a new run" in problem
    older = {"run": {"settings": {key: before.value(key) for key in SETTLED if "modules" not in key}}}
    assert not [*settled_problems(before, older)]


def test_an_evaluation_on_fewer_bits_is_another_evaluation():
    config = TrainConfig.of({"from_pretrained": "base", "test_data": ["images"]})
    whole = evaluated(config, None)
    assert "quantize" not in whole  # as in files of before
    assert evaluated(config.replaced(quantize="nf4"), None) == {
        **whole,
        "quantize": {"quantize": "nf4", "quantize_modules": ["all-linear"], "keep_modules": []},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_weights(folder, WIDE, tiny_model(config=WIDE).state_dict())
    return str(folder)


@pytest.fixture(scope="module")
def quantized_base(base, tmp_path_factory, single_process_group):
    folder = tmp_path_factory.mktemp("quantized") / "nf4"
    quantize_base(base, folder, Quantization(keep_modules=("vit-mlp",)))
    return str(folder)


MISTAKES = {
    "an unknown module": (
        dict(quantize_modules=["q_proj"]),
        "^--quantize_modules: 'q_proj' matches no layer; nearest: ",
    ),
    "an unknown one to keep": (
        dict(keep_modules=["vit_mlp"]),
        "^--keep_modules: 'vit_mlp' matches no layer; nearest: vit",
    ),
    "an embedding": (dict(quantize_modules=["word_embeddings"]), "^--quantize_modules: .*only linears are quantised"),
    "the head": (dict(quantize_modules=["lm_head"]), "^--quantize_modules: mixins.lm.lm_head is the output head"),
    "what trains whole": (
        dict(quantize_modules=["linear_proj.linear_proj"], modules_to_save=["linear_proj"]),
        "linear_proj.linear_proj trains whole, by modules_to_save; leave it out",
    ),
    "two mistakes": (
        dict(quantize_modules=["q_proj"], keep_modules=["vit_mlp"]),
        "^--quantize_modules: 'q_proj' .*; --keep_modules: 'vit_mlp' ",
    ),
}


@pytest.mark.parametrize(("values", "problem"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.usefixtures("single_process_group")
def test_a_mistake_is_told_before_the_base_is_read(base, values, problem):
    with pytest.raises(ConfigError, match=problem):
        _check_targets(TrainConfig.of({"from_pretrained": base, "quantize": "nf4", **values}))


@pytest.mark.usefixtures("single_process_group")
def test_what_a_quantised_folder_holds_does_not_train_whole(base, tmp_path):
    quantize_base(base, tmp_path / "nf4", Quantization(keep_modules="lm_head|.*vit_model.*"))
    config = TrainConfig.of({"from_pretrained": str(tmp_path / "nf4"), "modules_to_save": ["linear_proj"]})
    with pytest.raises(
        ConfigError, match="--modules_to_save: mixins.eva.linear_proj.* is quantised in .*--keep_modules"
    ):
        _check_targets(config)
    _check_targets(config.replaced(modules_to_save=["boi", "vit_model"]))
    _check_targets(TrainConfig.of({"from_pretrained": base, "quantize": "nf4", "modules_to_save": ["linear_proj"]}))


FOLDERS = {
    "another scheme": (
        dict(quantize="int8", keep_modules=["vit-mlp"]),
        "^--quantize: .*nf4 is quantised already, to nf4; leave the option",
    ),
    "the other layers": (
        dict(quantize="nf4", quantize_modules=["language-attention"]),
        "quantised already, to nf4, and .* is one of [0-9]+ layers that differ",
    ),
    "more layers": (dict(quantize="nf4", keep_modules=[]), "and mixins.eva.* is one of 4 layers that differ; leave"),
    "what trains whole": (
        dict(quantize="nf4", keep_modules=["vit-mlp"], modules_to_save=["linear_proj"]),
        "--modules_to_save: mixins.eva.linear_proj.* is quantised in .*",
    ),
}


@pytest.mark.parametrize(("values", "problem"), FOLDERS.values(), ids=FOLDERS)
@pytest.mark.usefixtures("single_process_group")
def test_a_quantised_folder_is_compared_with_the_options_before_the_header(quantized_base, values, problem):
    with pytest.raises(ConfigError, match=problem):
        _check_targets(TrainConfig.of({"from_pretrained": quantized_base, **values}))


@pytest.mark.usefixtures("single_process_group")
def test_the_options_that_a_folder_was_made_with_may_be_given_again(quantized_base):
    for values in (
        {},
        dict(quantize="nf4", keep_modules=["vit-mlp"]),
        dict(quantize="nf4", keep_modules=[".*vit_model.*mlp.*"]),
    ):
        _check_targets(TrainConfig.of({"from_pretrained": quantized_base, **values}))


LOFTQ_MISTAKES = {
    "adapted layers are kept": (["--keep_modules", "vit-mlp", "--target_modules", "vit-mlp"], "none of the 4 adapted"),
    "others are quantised": (
        ["--quantize_modules", "language-mlp", "--target_modules", "vit-attention", "linear_proj"],
        "none of the 5 adapted layers, such as mixins.eva.",
    ),
    "the head": (["--target_modules", "lm-head"], "none of the 1 adapted layers, such as mixins.lm.lm_head"),
}


@pytest.mark.parametrize(("options", "problem"), LOFTQ_MISTAKES.values(), ids=LOFTQ_MISTAKES)
@pytest.mark.usefixtures("single_process_group")
def test_loftq_on_layers_that_stay_whole_is_told_what_selects_them(base, options, problem):
    given = ["--from_pretrained", base, "--quantize", "nf4", "--init_lora_weights", "loftq", *options]
    with pytest.raises(ConfigError, match="^--init_lora_weights loftq: --quantize_modules and .*" + problem):
        _check_targets(parse_options(given))
    _check_targets(parse_options([*given, "--target_modules", "all-linear"]))


@pytest.mark.usefixtures("single_process_group")
def test_neither_leaves_a_run_folder_or_speaks_of_the_run(tmp_path, image_folder, capsys):
    quantize_base(TINY_BASE, tmp_path / "nf4", Quantization())
    given = [
        "--version",
        "base",
        "--train-data",
        str(image_folder),
        "--save",
        str(tmp_path),
        "--experiment-name",
        "run",
    ]
    given += ["--max_length", "64", "--train-iters", "1", "--num-workers", "0", "--watchdog-limit", "0"]
    loftq = ["--quantize", "nf4", "--init_lora_weights", "loftq", "--target_modules", "lm-head"]
    for options in ([str(tmp_path / "nf4"), "--quantize", "int8"], [str(TINY_BASE), *loftq]):
        with pytest.raises(ConfigError, match="^--quantize: .* quantised already|^--init_lora_weights loftq: "):
            finetune(parse_options(["--from_pretrained", *options, *given]))
        assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


SCHEMES = {
    "nf4, by an option": (False, "nf4", True),
    "by the folder": (True, NONE, True),
    "int8": (False, "int8", False),
}


@pytest.mark.parametrize(("is_folder", "scheme", "is_wanted"), [*SCHEMES.values(), (False, NONE, False)])
@pytest.mark.usefixtures("single_process_group")
def test_kernels_that_are_not_there_are_named_before_the_model_loads(
    base, quantized_base, monkeypatch, is_folder, scheme, is_wanted
):
    """By a run's preparation, and by whoever loads a base without one: chat, serve, a script."""
    asked = []
    monkeypatch.setattr(kernels, "is_usable", lambda: asked.append("asked"))
    monkeypatch.setattr(loading._OwnWeights, "__init__", lambda *_: asked.append("reads"))
    monkeypatch.setattr(loading._OwnWeights, "copy", stop)
    config = TrainConfig.of({"from_pretrained": quantized_base if is_folder else base, "quantize": scheme})
    for device in ("cpu", "cuda"):
        look_for_kernels(scheme_of_base(config), torch.device(device))
        assert asked == ["asked"] * (is_wanted and device == "cuda")
    asked.clear()
    monkeypatch.setattr(loading, "_memory_for", lambda layers, device: None)
    quantize = config.quantization.of(config.lora)
    with pytest.raises((Stop, RuntimeError, AssertionError, AttributeError)):  # there is no CUDA here
        loading.load_cogvlm(config.model.base, device="cuda", quantize=quantize)
    assert asked[0] == ("asked" if is_wanted else "reads")
    assert asked.count("asked") == is_wanted


class Stop(Exception):
    pass


def stop(*_, **__):
    raise Stop

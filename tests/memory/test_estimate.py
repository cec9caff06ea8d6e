"""`sat-lora estimate`: a run's memory for any size, without weights and without a GPU."""

import json

import pytest

from sat_lora.cli import main
from sat_lora.errors import ConfigError
from tests.support.paths import TINY_BASE
from tests.support.ranks import run_ranks

# CogVLM-17B's own sizes.
LARGE = dict(num_layers=32, hidden_size=4096, num_attention_heads=32, inner_hidden_size=11008, vocab_size=32000)
LARGE_VIT = dict(num_layers=63, hidden_size=1792, num_attention_heads=16, inner_hidden_size=15360)
WEIGHTS = 17_639_685_376  # as benchmarks/scaling counts them


def run(arguments):
    import contextlib
    import io

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(["estimate", *map(str, arguments)])
    return status, output.getvalue(), errors.getvalue()


def run_all(lines):
    return [run(line) for line in lines]


def estimates(*lines):
    """(status, output, errors) of every line, in one process."""
    return run_ranks(run_all, 1, lines)[0]


def estimate(*arguments):
    (result,) = estimates(arguments)
    return result


@pytest.fixture(scope="module")
def cogvlm_17b(tmp_path_factory):
    config = json.loads((TINY_BASE / "model_config.json").read_text())
    vit = {**config["eva_args"], **LARGE_VIT, "image_size": [490, 490], "patch_size": 14}
    path = tmp_path_factory.mktemp("large") / "model_config.json"
    path.write_text(json.dumps({**config, **LARGE, "image_length": 1225, "eva_args": vit}))
    return path


@pytest.mark.matrix
def test_seventeen_billion_weights_are_estimated_from_a_config_alone(cogvlm_17b):
    options = ["--from_pretrained", cogvlm_17b, "--gpus", "8", "--checkpoint-activations"]
    options += ["--vit_checkpoint_activations", "--batch-size", "4", "--json"]
    status, output, _ = estimate(*options, "--device-memory", "40")
    found = json.loads(output)
    assert status == 0 and found["fits"]
    assert found["weights"] == pytest.approx(2 * WEIGHTS, rel=1e-3)
    assert 35e9 < found["total"] < 43e9


def test_what_does_not_fit_has_status_1_and_advice():
    options = ["--from_pretrained", TINY_BASE, "--max_length", "64", "--device-memory", "0.01"]
    status, output, _ = estimate(*options)
    assert status == 1 and "it does not fit: in this order: --checkpoint-activations" in output


def test_checkpointing_and_sharing_take_less():
    two = ("--from_pretrained", TINY_BASE, "--max_length", "64", "--json", "--gpus", "2")
    more = ((), ("--checkpoint-activations",), ("--model-parallel-size", "2"), ("--zero-stage", "3"), ("--gpus", "4"))
    results = [json.loads(output) for _, output, _ in estimates(*(two + options for options in more))]
    plain, checkpointed, parts, partitioned, four = results
    assert checkpointed["activations"] < plain["activations"]
    assert parts["weights"] < 0.7 * plain["weights"]
    assert partitioned["weights"] == pytest.approx(plain["weights"] / 2, rel=1e-3)
    assert four["optimizer"] == plain["optimizer"] / 2


def test_a_batch_of_all_ranks_in_a_deepspeed_file_is_divided_by_them(tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"train_batch_size": 8}))
    common = ("--from_pretrained", TINY_BASE, "--max_length", "64", "--gpus", "4", "--json")
    (_, divided, _), (_, given, _) = estimates((*common, "--deepspeed_config", file), (*common, "--batch-size", "2"))
    assert json.loads(divided) == json.loads(given)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--from_pretrained", "nowhere.json"],
            "--from_pretrained: nowhere.json is not a SAT model folder: it does not exist",
        ),
        (
            ["--from_pretrained", TINY_BASE, "--gpus", "3", "--model-parallel-size", "2"],
            "--gpus: got 3, wanted a multiple",
        ),
        (
            ["--from_pretrained", TINY_BASE, "--max_length", "9"],
            "--max_length: 9 is too short, an image and two tokens",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
    status, _, errors = estimate(*arguments)
    assert status == 2 and errors.count("\n") == 1 and errors.startswith(f"sat-lora estimate: error: {message}")


@pytest.mark.parametrize("arguments", [["--device-memory", "80"], ["--gpus", "8"], ["--zero-stage", "3", "--json"]])
def test_a_run_without_a_base_is_not_taken_for_the_demo(arguments, capsys):
    assert main(["estimate", *arguments]) == 2
    said = capsys.readouterr()
    speaks = next(name for name in arguments if name != "--json")
    assert said.out == "" and f"--from_pretrained: missing, and {speaks} speaks of a run; give" in said.err


def test_without_any_option_the_demo_is_named(capsys, monkeypatch):
    def stop(settings, **_):
        raise ConfigError(f"came to {settings.model.base}")

    monkeypatch.setattr("sat_lora.memory.estimate_run.estimate_run", stop)
    assert main(["estimate"]) == 2
    said = capsys.readouterr().err
    assert f"of the demo's tiny CogVLM, {TINY_BASE}\n" in said and f"came to {TINY_BASE}" in said

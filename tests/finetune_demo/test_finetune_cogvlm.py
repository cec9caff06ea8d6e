"""finetune_cogvlm.py as users start it: DeepSpeed's launcher, torchrun, wrong options, an interrupted run."""

import dataclasses
import hashlib
import json
import os

import pytest
import safetensors

from sat_lora.adapters.read import read_adapter
from sat_lora.lora.config import LoraConfig
from tests.support.configs import parse_options
from tests.support.demo_runs import launch, losses_of, options_for
from tests.support.paths import TINY_BASE
from tests.support.picture_files import write_images
from tests.support.ranks import run_ranks
from tests.support.scripts import run_script

LORA = (
    *("--r", "8", "--lora_alpha", "12", "--lora_dropout", "0.2", "--use_rslora", "--lr_ratio", "4"),
    *("--target_modules", "vision-expert-attention", "language-mlp", "vit-attention", "--exclude_modules", ".*gate.*"),
    *("--layers_to_transform", "language:0-1,vit:0", "--rank_pattern", "dense=4", "--alpha_pattern", "dense=6"),
    *(
        "--qkv_slots",
        "qv",
        "--adapter_dtype",
        "float32",
        "--use_dora",
        "--bias",
        "lora_only",
        "--modules_to_save",
        "boi",
    ),
)


def fingerprint(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "kind, stage",
    [
        ("deepspeed", 0),
        *(
            pytest.param(*one, marks=pytest.mark.matrix)
            for one in (("deepspeed", 1), ("torchrun", 2), ("deepspeed", 3))
        ),
    ],
)
def test_two_launched_ranks_learn_and_leave_the_base_alone(kind, stage, captchas, tmp_path):
    before = fingerprint(TINY_BASE)
    extra = ("--train-iters", "12", "--zero-stage", str(stage), "--test-data", str(captchas / "test"))
    extra += ("--bf16", "--checkpoint-activations", "--vit_checkpoint_activations") if kind == "torchrun" else ()
    done = launch(kind, options_for(captchas, tmp_path, *extra))
    assert done.returncode == 0, done.stderr[-3000:]
    assert fingerprint(TINY_BASE) == before
    run = tmp_path / "run"
    losses = losses_of(run)
    assert len(losses) == 12 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    for name in ("run.json", "loss.png", "evaluation.json", "tensorboard", "adapter", "checkpoints"):
        assert (run / name).exists(), name
    assert json.loads((run / "evaluation.json").read_text())["images"] == 12
    check_adapter(run / "adapter" / "12")
    check_checkpoint(run / "checkpoints" / "12")
    for words in ("base + adapter", "-m sat_lora.cli merge --base", "--resume"):
        assert words in done.stdout


def check_adapter(folder):
    """No tensor of the base, and no more bytes than A and B take, plus 64 KiB."""
    config = json.loads((folder / "adapter_config.json").read_text())
    allowed = 0
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():
            assert key.endswith(("lora_A", "lora_B")), key
            tensor = file.get_tensor(key)
            assert config["r"] in tensor.shape
            allowed += tensor.numel() * tensor.element_size()
    assert (folder / "adapter_model.safetensors").stat().st_size <= allowed + 64 * 1024
    card = (folder / "README.md").read_text(encoding="utf-8")
    for words in ("## Data", "| Training samples |", "| Steps | 12 |", "## Evaluation", "| Images | 12 |"):
        assert words in card, words


def check_checkpoint(folder):
    """Of the base, nothing: three tensors of every A and B."""
    assert {file.name for file in folder.iterdir()} == {"optimizer.safetensors", "state.json"}
    with safetensors.safe_open(folder / "optimizer.safetensors", "pt") as file:
        names = set(file.keys())
    assert names and all(name.endswith((".A", ".B")) for name in names)
    assert {name.partition(".")[0] for name in names} == {"master", "exp_avg", "exp_avg_sq"}


def wrong_options(captchas, tmp_path):
    empty, unreadable = tmp_path / "empty", tmp_path / "unreadable"
    empty.mkdir()
    unreadable.mkdir()
    (unreadable / "123.png").write_text("this is no image")
    good = options_for(captchas, tmp_path)
    return {
        "a missing data folder": ([*good, "--train-data", "nowhere"], "--train-data: nowhere does not exist"),
        "an empty data folder": ([*good, "--train-data", str(empty)], "--train-data: .*empty has no images"),
        "no readable image": ([*good, "--train-data", str(unreadable)], "none of the first 1 images"),
        "an unknown version": ([*good, "--version", "v9"], "--version: invalid choice: 'v9'"),
        "a target that matches nothing": (
            [*good, "--target_modules", "qkv", "--exclude_modules", "a(b"],
            "error: --target_modules: 'qkv' matches no layer; nearest: .*quer.*; "
            r"--exclude_modules: 'a\(b' is not a regular expression",
        ),
        "a length too short": ([*good, "--max_length", "20"], "--max_length: 20 is too short"),
        "a missing tokenizer": ([*good, "--local_tokenizer", "no/where"], "--local_tokenizer: no/where is neither"),
        "a base that is a file": (
            [*good, "--from_pretrained", str(TINY_BASE / "latest")],
            "--from_pretrained: .*latest is a file; give the model folder",
        ),
        "a rank of zero": ([*good, "--lora_rank", "0"], "error: --r has to be a whole number of at least 1, got 0"),
    }


CASES = ["a missing data folder", "an empty data folder", "no readable image", "an unknown version",
         "a target that matches nothing", "a length too short", "a missing tokenizer", "a base that is a file",
         "a rank of zero"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_before_the_model_loads(case, captchas, tmp_path):
    import re

    options, message = wrong_options(captchas, tmp_path)[case]
    ((status, errors),) = run_ranks(run_script, 1, options, refuse_to_load=True)
    assert status == 2
    assert re.search(message, errors), errors
    assert "Traceback" not in errors


@pytest.mark.matrix
def test_ranks_that_do_not_divide_are_told_once(captchas, tmp_path):
    options = options_for(captchas, tmp_path, "--model-parallel-size", "4")
    done = launch("torchrun", options)
    assert done.returncode != 0
    assert done.stderr.count("--model-parallel-size: 2 ranks do not divide into groups of 4") == 1
    assert 'finetune_cogvlm.py", line' not in done.stderr


@pytest.mark.matrix
def test_a_resumed_run_continues_bit_for_bit(captchas, tmp_path):
    """Eight steps at once, or four, saved, and four more: the same losses, with dropout on and B at its own rate."""
    steady = ("--lr-decay-style", "constant", "--save-interval", "4", "--warmup", "0", "--zero-stage", "2", *LORA)
    whole = options_for(captchas, tmp_path / "whole", *steady, "--train-iters", "8")
    assert run_ranks(run_script, 1, whole)[0][0] == 0
    half = options_for(captchas, tmp_path / "half", *steady, "--train-iters", "4")
    assert run_ranks(run_script, 1, half)[0][0] == 0
    rest = ["--resume", str(tmp_path / "half" / "run"), "--train-iters", "8"]
    assert run_ranks(run_script, 1, rest)[0][0] == 0
    assert losses_of(tmp_path / "half" / "run") == losses_of(tmp_path / "whole" / "run")
    files = [
        (tmp_path / n / "run" / "adapter" / "8" / "adapter_model.safetensors").read_bytes() for n in ("half", "whole")
    ]
    assert files[0] == files[1]
    check_lora_settings(tmp_path / "half" / "run")


@pytest.mark.matrix
@pytest.mark.parametrize("stage", ["0", "3"])
def test_a_run_that_goes_on_ends_early_where_it_would_have(stage, captchas, tmp_path):
    """Of two ranks, by a metric of answers; the second start comes after the first of three validations."""
    options = ["--eval-interval", "2", "--save-interval", "2", "--eval-samples", "3", "--metric", "exact-match"]
    options += ["--early-stopping", "2", "--lr", "1e-6", "--zero-stage", stage, "--keep", "0", "--warmup", "0"]
    for name, iterations in (("whole", "20"), ("cut", "2")):
        extra = ["--lr-decay-style", "constant", "--train-iters", iterations]
        done = launch("torchrun", options_for(captchas, tmp_path / name, *options, *extra))
        assert done.returncode == 0, done.stderr[-3000:]
    cut, whole = tmp_path / "cut" / "run", tmp_path / "whole" / "run"
    done = launch("torchrun", ["--resume", str(cut), "--train-iters", "20"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ended early at step 6 of 20, after 2 validations without a better exact-match" in done.stdout
    assert f"--resume {cut} --early-stopping 0" in done.stdout
    for folder in ("adapter/6", "answers"):
        assert fingerprint(cut / folder) == fingerprint(whole / folder)
    assert sorted(path.name for path in (whole / "answers").iterdir()) == ["2.jsonl", "4.jsonl", "6.jsonl"]


@pytest.mark.matrix
def test_a_run_of_two_ranks_goes_on_with_one_at_the_same_samples_per_step(captchas, tmp_path):
    """Without dropout the losses are those of the two; `best` names the adapter of the lowest validation loss."""
    steady = ("--lr-decay-style", "constant", "--warmup", "0", "--zero-stage", "3", "--eval-interval", "2")
    whole = options_for(captchas, tmp_path / "whole", *steady, "--train-iters", "6")
    half = options_for(captchas, tmp_path / "half", *steady, "--train-iters", "4")
    assert [status for status, _ in run_ranks(run_script, 2, whole)] == [0, 0]
    assert [status for status, _ in run_ranks(run_script, 2, half)] == [0, 0]
    rest = ["--resume", str(tmp_path / "half" / "run"), "--train-iters", "6"]
    ((status, errors),) = run_ranks(run_script, 1, rest)
    assert status == 2 and "the run took 16 samples a step, now it would be 8" in errors
    assert "give --batch-size 8 --gradient-accumulation-steps 2" in errors
    more = ["--batch-size", "8", "--gradient-accumulation-steps", "2", "--zero-stage", "0"]
    assert run_ranks(run_script, 1, [*rest, *more])[0][0] == 0
    runs = [tmp_path / name / "run" for name in ("half", "whole")]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), rel=1e-5)
    records = [json.loads(line) for line in (runs[0] / "train.jsonl").read_text().splitlines()]
    best = min((record["valid_loss"], record["step"]) for record in records if "valid_loss" in record)[1]
    assert read_adapter(runs[0] / "adapter" / "best").tensors.keys()
    assert (runs[0] / "adapter" / "best").read_text() == f"{best}\n"


def check_lora_settings(run):
    """The options, run.json and the adapter file have the same values under the same names."""
    stored = json.loads((run / "adapter" / "8" / "adapter_config.json").read_text())
    in_file = LoraConfig(**{field.name: stored[field.name] for field in dataclasses.fields(LoraConfig)})
    assert in_file == parse_options(["--resume", str(run)]).lora == parse_options([*LORA]).lora


def test_steps_that_are_not_finite_are_skipped_up_to_a_number_and_then_end_the_run(captchas, tmp_path):
    """A rate that throws the adapters out of float32's range after two steps."""
    wild = ("--lr", "1e30", "--warmup", "0", "--clip-grad", "0", "--save-interval", "1", "--train-iters", "8")
    results = run_ranks(run_script, 2, options_for(captchas, tmp_path, *wild, "--skip-nonfinite", "2"))
    assert [status for status, _ in results] == [2, 2]
    run, (_, errors) = tmp_path / "run", results[0]
    skipped = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines() if "skipped" in line]
    first = skipped[0]["step"]
    assert [one["step"] for one in skipped] == [first, first + 1]
    assert "is not finite, first in" in skipped[0]["skipped"] and " on rank " in skipped[0]["skipped"]
    assert f"error: step {first + 2}: the " in errors and "--skip-nonfinite 3" in errors
    saved = {
        name: (run / "adapter" / name / "adapter_model.safetensors").read_bytes()
        for name in os.listdir(run / "adapter")
        if name.isdecimal()
    }
    assert sorted(map(int, saved)) == [first - 1, first, first + 1]
    assert len(set(saved.values())) == 1  # nothing moved since the last good step


def test_a_broken_image_is_skipped_and_named_once(captchas, tmp_path):
    """Two ranks: one of them meets the file first, both make every step."""
    data = write_images(tmp_path / "data", ["111.png", "222.png", "333.png"])
    (data / "444.png").write_bytes(b"not an image")
    options = options_for(captchas, tmp_path, "--train-data", str(data), "--train-iters", "6", "--batch-size", "2")
    options += ["--max-broken-share", "0.5"]
    statuses = [status for status, _ in run_ranks(run_script, 2, options)]
    lines = (tmp_path / "run" / "train.jsonl").read_text().splitlines()
    assert statuses == [0, 0]
    assert len(losses_of(tmp_path / "run")) == 6
    assert sum("444.png" in line for line in lines) == 1


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_two_runs_from_the_same_seed_write_the_same_bytes(ranks, captchas, tmp_path):
    more = ("--train-iters", "4", "--zero-stage", "2", "--lora_dropout", "0.2", "--seed", "7")
    for name in ("one", "two"):
        assert (
            run_ranks(run_script, ranks, options_for(captchas, tmp_path, *more, "--experiment-name", name))[0][0] == 0
        )
    one, two = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("4/*")}
        for name in ("one", "two")
    )
    assert one == two and "adapter/4/adapter_model.safetensors" in one and "checkpoints/4/state.json" in one

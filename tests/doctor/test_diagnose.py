"""The doctor before a run: faults in files, options and data of a real run, found through its own options."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sat_lora.cogvlm.network import experts
from sat_lora.doctor import diagnose as before_run
from sat_lora.doctor.diagnose import diagnose
from sat_lora.findings.finding import as_text
from tests.support.branching_cogvlm import branch_on_data
from tests.support.configs import parse_options
from tests.support.demo_runs import options_for
from tests.support.paths import TINY_BASE
from tests.support.picture_files import write_images
from tests.support.ranks import run_ranks


def told_by(arguments, plant=None):
    """What the doctor tells of a run with these options; plant: a function that breaks something first."""
    if plant is not None:
        plant()
    findings = diagnose(parse_options(["--doctor", *arguments]))
    return [(one.code, one.ranks, one.seen, one.where) for one in findings]


def codes_of(found):
    return [code for code, *_ in found]


@pytest.mark.parametrize(
    "ranks, more",
    [
        (1, ("--zero-stage", "0", "--save-interval", "0")),
        (2, ("--zero-stage", "2", "--bf16", "--checkpoint-activations", "--vit_checkpoint_activations")),
        *(
            pytest.param(2, more, marks=pytest.mark.matrix)
            for more in (
                ("--zero-stage", "3", "--lora_dropout", "0.1"),
                ("--zero-stage", "1", "--model-parallel-size", "2", "--use_dora", "--shrink", "1"),
            )
        ),
        (2, ("--zero-stage", "2", "--layers_to_transform", "0", "--target_modules", "vit-mlp", "language-attention")),
    ],
)
def test_a_healthy_setup_gives_no_finding_and_writes_nothing(ranks, more, captchas, tmp_path):
    for found in run_ranks(told_by, ranks, options_for(captchas, tmp_path / "runs", *more)):
        assert found == []
    assert not (tmp_path / "runs").exists()


def test_published_branching_is_found_before_a_step_could_hang(captchas, tmp_path):
    for found in run_ranks(told_by, 2, options_for(captchas, tmp_path, "--zero-stage", "2"), branch_on_data):
        assert {*codes_of(found)} == {"gradient-missing"}
        assert any("with text alone" in seen for *_, seen, _ in found)


def spoil_one_rank():
    """An expert of rank 1 makes a NaN."""
    if torch.distributed.is_initialized():
        return
    route = experts.route

    def spoiled(routing, vision, language, x):
        bad = torch.distributed.get_rank() == 1 and not torch.is_inference_mode_enabled()
        return route(routing, vision, language, x) * (float("nan") if bad else 1.0)

    experts.route = spoiled


@pytest.mark.parametrize("stage", ["2", pytest.param("3", marks=pytest.mark.matrix)])
def test_a_nan_on_one_rank_is_found(stage, captchas, tmp_path):
    for found in run_ranks(told_by, 2, options_for(captchas, tmp_path, "--zero-stage", stage), spoil_one_rank):
        _, ranks, seen, where = next(one for one in found if one[0] == "not-finite")
        assert ranks == (1,) and "transformer.layers.0.attention" in where and "first in the output of" in seen


def write_json(folder, content):
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_an_offload_at_the_top_level_is_found_and_does_not_end_the_examination(captchas, tmp_path):
    content = {"offload_optimizer": {"device": "cpu"}, "zero_optimization": {"stage": 2}, "train_batch_size": 99}
    arguments = options_for(captchas, tmp_path, "--deepspeed_config", write_json(tmp_path, content))
    (found,) = run_ranks(told_by, 1, arguments)
    assert codes_of(found) == ["misplaced-key", "batch-arithmetic"]
    assert '"offload_optimizer"' in found[0][2] and '"zero_optimization"' in found[0][2]
    assert "deepspeed.json" in found[0][3]


def test_every_wrong_option_is_a_finding(captchas, tmp_path):
    arguments = options_for(captchas, tmp_path, "--r", "0", "--from_pretrained", str(tmp_path / "nowhere"))
    (found,) = run_ranks(told_by, 1, arguments)
    assert {*codes_of(found)} == {"options"}
    assert {where for *_, where in found} == {"rank 0, --from_pretrained", "rank 0, --r"}


def test_a_rate_of_full_fine_tuning_is_found(captchas, tmp_path):
    arguments = [*options_for(captchas, tmp_path), "--lr", "1e-7"]
    (found,) = run_ranks(told_by, 1, arguments)
    assert codes_of(found) == ["learning-rate"] and "1e-07" in found[0][2]


def test_broken_files_and_cut_answers_are_found(tmp_path):
    images = write_images(tmp_path / "images", ["123.png", "4567890123456789012345.png", "5.png"])
    (images / "7.png").write_bytes(b"")
    arguments = ["--train-data", str(images), "--max_length", "45", "--prompt", "A:", "--batch-size", "2"]
    (found,) = run_ranks(told_by, 1, [*arguments, "--num-workers", "0", "--save", str(tmp_path / "runs")])
    assert {*codes_of(found)} >= {"broken-files", "too-long"}
    assert "7.png" in next(seen for code, _, seen, _ in found if code == "broken-files")


def test_an_image_length_that_its_image_size_does_not_give_is_found(captchas, tmp_path):
    base = shutil.copytree(TINY_BASE, tmp_path / "base")
    config = json.loads((base / "model_config.json").read_text())
    (base / "model_config.json").write_text(json.dumps({**config, "image_length": config["image_length"] - 1}))
    arguments = options_for(captchas, tmp_path, "--from_pretrained", str(base))
    (found,) = run_ranks(told_by, 1, arguments)
    assert codes_of(found)[0] == "image-tokens"


def keep_the_adapter_still():
    before_run.train_step = lambda *args, **kwargs: type("Result", (), {"nonfinite": None})


def test_a_step_that_changes_nothing_is_found(captchas, tmp_path):
    (found,) = run_ranks(told_by, 1, options_for(captchas, tmp_path), keep_the_adapter_still)
    assert codes_of(found) == ["step-without-effect"]


def test_the_text_names_code_place_reason_and_remedy():
    from sat_lora.findings.finding import Finding

    text = as_text([Finding(code="gradient-order", seen="first A, then B", ranks=(0, 1), parameter="x.A")])
    assert text.splitlines()[0] == "error: gradient-order"
    for words in ("seen  first A, then B", "where ranks 0, 1, parameter x.A", "why   ZeRO", "docs/doctor.md#gradient"):
        assert words in text
    assert text.splitlines()[-1] == "doctor: 1 error"
    assert as_text([]) == "doctor: no problem found"
    assert as_text([], 37) == "doctor: no problem found, 37 checks"


def told_on_a_small_gpu(arguments):
    """As on a GPU of 1 MiB, up to where the base would be loaded."""
    from sat_lora.memory import memory_report

    memory_report.device_memory = lambda device, ranks: 2**20
    before_run.build_run = None
    prepared = before_run.prepare

    def on_cuda(options):
        run = prepared(options)
        return replace(run, world=replace(run.world, device=torch.device("cuda", 0)))

    before_run.prepare = on_cuda
    return told_by(arguments)


@pytest.mark.parametrize(
    "ranks, more",
    [
        (1, ("--quantize", "nf4")),  # else what that would take is estimated as well
        pytest.param(2, (), marks=pytest.mark.matrix),
    ],
)
def test_a_gpu_that_is_too_small_is_found_before_the_base_is_loaded(ranks, more, captchas, tmp_path):
    for found in run_ranks(told_on_a_small_gpu, ranks, options_for(captchas, tmp_path, *more)):
        assert codes_of(found) == ["memory"] and found[0][1] == tuple(range(ranks))
        assert "the device has 0.00 GiB" in found[0][2]

"""`sat-lora inspect`."""

import json
import shutil

import pytest
import torch
from PIL import Image

from sat_lora import LoraConfig, add_lora, quantize_model, save_adapter
from sat_lora.adapters.format import write_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from tests.support.combining import deltas_of
from tests.support.tiny import fill_adapters, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
VIT_MLP = "mixins.eva.vit_model.transformer.layers.0.mlp.dense_h_to_4h"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, single_process_group):
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model()
    add_lora(model, LoraConfig(r=4, lora_alpha=8, modules_to_save=["boi"], rank_pattern={"dense": 2}))
    fill_adapters(model)
    save_adapter(model, folder / "adapter")
    return folder


def printed(capsys, *arguments):
    status = main(["inspect", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_json_tells_norms_ranks_and_sizes(run_folder, capsys):
    status, out, _ = printed(capsys, run_folder, "--json")
    report, saved = json.loads(out), read_adapter(run_folder / "adapter")
    assert status == 0 and report["base_fingerprint"] == saved.base_fingerprint
    assert report["bytes"] == (run_folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert report["parameters"] == sum(tensor.numel() for tensor in saved.tensors.values())
    assert report["trained"] == {"mixins.eva.boi": [1, 1, 64]} and not report["zero_b"] and not report["not_finite"]
    squares = dict.fromkeys(saved.layers, 0.0)
    for (name, _), delta in deltas_of(run_folder / "adapter").items():
        squares[name] += delta.square().sum().item()
    for layer in report["layers"]:
        assert layer["delta_norm"] == pytest.approx(squares[layer["name"]] ** 0.5, rel=1e-10)
        assert (layer["r"], layer["alpha"]) == (saved.layers[layer["name"]].r, 8)


def test_text_names_zero_b_and_values_that_are_not_finite(run_folder, tmp_path, capsys):
    saved = read_adapter(run_folder / "adapter")
    saved.tensors[f"{VIT_MLP}.lora_B"].zero_()
    saved.tensors["mixins.mlp.gate_proj.1.lora_A"][0, 0] = torch.nan
    write_adapter(tmp_path / "broken", saved)
    status, out, _ = printed(capsys, tmp_path / "broken")
    assert status == 0 and f"B is zero, no effect: 1\n  {VIT_MLP}" in out
    assert "values that are not finite: 1\n  mixins.mlp.gate_proj.1.lora_A" in out
    assert json.loads(printed(capsys, tmp_path / "broken", "--json")[1])["parts"]["language-mlp"]["delta_norm"] is None


def test_a_plot_is_written(run_folder, tmp_path, capsys):
    assert printed(capsys, run_folder, "--plot", tmp_path / "norms.png")[0] == 0
    assert Image.open(tmp_path / "norms.png").size[0] > 800


def test_a_wrong_folder_is_one_line_and_status_2(tmp_path, capsys):
    status, out, err = printed(capsys, tmp_path / "nowhere")
    assert (status, out) == (2, "") and err.startswith("sat-lora inspect: error:") and err.count("\n") == 1


@pytest.mark.parametrize("path", [".", "adapter", "adapter/latest", "adapter/best", "adapter/400"])
def test_every_name_of_a_runs_adapter_is_taken(run_folder, tmp_path, capsys, path):
    """As a run leaves them: a folder per step, and pointers."""
    shutil.copytree(run_folder / "adapter", tmp_path / "adapter" / "400")
    for pointer in ("latest", "best"):
        (tmp_path / "adapter" / pointer).write_text("400\n")
    status, out, _ = printed(capsys, tmp_path / path, "--json")
    report = json.loads(out)
    assert status == 0 and report["path"] == str(tmp_path / "adapter" / "400")
    assert report["parameters"] == json.loads(printed(capsys, run_folder, "--json")[1])["parameters"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (dict(scheme="nf4"), "nf4: all-linear"),
        (dict(scheme="int8", keep_modules=["vit-mlp", "projector"]), "int8: all-linear without vit-mlp projector"),
        (dict(modules=["language-mlp"]), "nf4: language-mlp"),
    ],
)
def test_how_the_base_was_held_is_told(tmp_path, capsys, fields, line):
    model = tiny_model()
    quantize_model(model, **fields)
    add_lora(model, r=2)
    save_adapter(model, tmp_path / "adapter")
    out = printed(capsys, tmp_path / "adapter")[1]
    assert f"trained on    the base quantised to {line}\n" in out and "\nbase         " in out
    held = json.loads(printed(capsys, tmp_path / "adapter", "--json")[1])["base_quantization"]
    assert held["scheme"] == line.partition(":")[0]
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["sat_lora"]["base_quantization"] = {"scheme": "nf9\x1b[2J", "quantize_modules": 3}
    path.write_text(json.dumps(content))
    assert "the base quantised to nf9\\x1b[2J\n" in printed(capsys, tmp_path / "adapter")[1]

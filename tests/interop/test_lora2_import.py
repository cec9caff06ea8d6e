"""`sat-lora import --from lora2`: what SAT's own merge_lora gives, as an adapter."""

import pytest
import torch

from sat_lora.adapters.merge import merge_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints.load import map_weights, save_weights, shardings_of, weight_files
from tests.support.sat_oracle import COGVLM, sats_layers, with_sats
from tests.support.tiny import CONFIG

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def trained(single_process_group):
    """A CogVLM with SAT's lora2 on the language model and the ViT."""
    return with_sats(COGVLM, r=4, lora_alpha=6)


def base_of(model, folder):
    state = {k.replace(".original.", "."): v for k, v in model.state_dict().items() if ".matrix_" not in k}
    save_weights(folder, CONFIG, state)
    return state


def merged_by_us(trained, checkpoint, tmp_path):
    base_of(trained, tmp_path / "base")
    arguments = ["import", "--from", "lora2", str(checkpoint), "--lora-alpha", "6", "--out", str(tmp_path / "ours")]
    assert main(arguments) == 0
    merge_adapter(tmp_path / "base", tmp_path / "ours", tmp_path / "merged")
    return map_weights(weight_files(tmp_path / "merged")[0])


def test_one_file_gives_what_sat_merges(trained, tmp_path):
    save_weights(tmp_path / "lora2", CONFIG, trained.state_dict())
    merged = merged_by_us(trained, tmp_path / "lora2", tmp_path)
    assert sats_layers(trained)
    for name, layer in sats_layers(trained).items():
        delta = torch.cat([b @ a for a, b in zip(layer.matrix_A, layer.matrix_B)]) * layer.scaling
        torch.testing.assert_close(merged[f"{name}.weight"], layer.original.weight + delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("replicas", ["equal", "different"])
def test_two_model_parallel_files_give_what_each_rank_merges(trained, replicas, tmp_path):
    states = cut(trained, 2, differ=replicas == "different")
    save_weights(tmp_path / "lora2", CONFIG, states[0])
    torch.save({"module": states[1]}, tmp_path / "lora2" / "release" / "mp_rank_01_model_states.pt")
    merged = merged_by_us(trained, tmp_path / "lora2", tmp_path)
    for name, layer in sats_layers(trained).items():
        parts = []
        for state in states:
            a, b = ([state[f"{name}.matrix_{f}.{n}"] for n in range(len(layer.matrix_A))] for f in "AB")
            delta = torch.cat([y @ x for x, y in zip(a, b)]) * layer.scaling
            parts.append(state[f"{name}.original.weight"] + delta)
        if "dense" in name:
            expected = torch.cat(parts, 1)
        else:
            expected = torch.cat([part for slot in zip(*(p.chunk(3) for p in parts)) for part in slot])
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)


def cut(model, size, differ):
    """The states of `size` ranks; with `differ` each has factors of its own, as SAT trains them."""
    shardings, states = shardings_of(model), []
    for rank in range(size):
        state = {}
        for name, tensor in model.state_dict().items():
            owner, _, _ = name.partition(".matrix_")
            if ".matrix_" not in name:
                state[name] = shardings[name].shard(tensor, rank, size).clone()
                continue
            is_a = ".matrix_A." in name
            if "dense" in owner:
                part = tensor.chunk(size, 1)[rank] if is_a else tensor
            else:
                part = tensor if is_a else tensor.chunk(size)[rank]
            state[name] = part.clone() * (1 + rank * differ)
        states.append(state)
    return states


def test_a_checkpoint_without_lora2_is_refused(trained, tmp_path, capsys):
    base_of(trained, tmp_path / "base")
    assert main(["import", "--from", "lora2", str(tmp_path / "base"), "--out", str(tmp_path / "ours")]) == 2
    assert "no matrix_A, matrix_B of SAT's lora2" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2])
def test_what_was_trained_whole_comes_along(trained, size, tmp_path):
    base = base_of(trained, tmp_path / "base")
    name = "mixins.eva.vit_model.transformer.layers.1.mlp.dense_h_to_4h"
    states = cut(trained, size, differ=False)
    for state in states:
        for leaf in ("weight", "bias"):
            state[f"{name}.{leaf}"] += 1
    save_weights(tmp_path / "lora2", CONFIG, states[0])
    for rank in range(1, size):
        torch.save({"module": states[rank]}, tmp_path / "lora2" / "release" / f"mp_rank_{rank:02d}_model_states.pt")
    arguments = ["import", "--from", "lora2", str(tmp_path / "lora2"), "--base", str(tmp_path / "base")]
    assert main([*arguments, "--out", str(tmp_path / "ours")]) == 0
    saved = read_adapter(tmp_path / "ours")
    assert set(saved.trained) == {f"{name}.weight", f"{name}.bias"}
    assert all(torch.equal(saved.tensors[key], base[key] + 1) for key in saved.trained)

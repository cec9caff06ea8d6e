"""`merge --verify` tells the truth: wrong is what is not base plus adapter rounded once, however weak that is."""

import json

import pytest
import torch

from sat_lora import MergeError, add_lora, save_adapter
from sat_lora.adapters import merge as merge_checkpoint
from sat_lora.adapters.merge import merge_adapter
from sat_lora.adapters.verify import verify_merge
from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints.load import map_weights, save_weights
from tests.support.tiny import CONFIG, fill_adapters, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
WEIGHTS = "release/mp_rank_00_model_states.pt"
ONE = "transformer.layers.0.attention.dense.weight"
STRONG, WEAK, NEXT_TO_NOTHING = 0.2, 0.03, 0.004  # standard deviations of A and of B, beside weights of 0.125


@pytest.fixture
def folders(tmp_path):
    """Writes a base of that dtype and an adapter of that strength; gives (base, adapter, where to merge)."""

    def make(dtype=torch.bfloat16, std=WEAK, **fields):
        model = tiny_model(dtype)
        save_weights(tmp_path / "base", CONFIG, model.state_dict())
        add_lora(model, **{"r": 4, "lora_alpha": 4, "target_modules": ["language-attention", "vit-mlp"], **fields})
        fill_adapters(model, std=std)
        save_adapter(model, tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", tmp_path / "out"

    return make


@pytest.mark.parametrize(
    ("dtype", "std", "fields", "least", "most"),
    [
        (torch.bfloat16, NEXT_TO_NOTHING, {}, 0.5, 1.5),  # what a few steps give: the weights hardly take it up
        (torch.bfloat16, WEAK, {}, 0.05, 0.6),
        (torch.bfloat16, STRONG, {}, 1e-4, 0.05),
        (torch.float16, NEXT_TO_NOTHING, {}, 0.1, 1.2),
        (torch.float32, NEXT_TO_NOTHING, {}, 0, 0.05),
        (torch.bfloat16, WEAK, {"use_dora": True}, 0.01, 0.9),
        (torch.bfloat16, WEAK, {"modules_to_save": ["boi"], "bias": "lora_only"}, 0.01, 0.9),
    ],
)
def test_a_right_merge_is_verified_whatever_its_precision_costs(folders, dtype, std, fields, least, most):
    base, adapter, out = folders(dtype, std, **fields)
    merge_adapter(base, adapter, out)
    found = verify_merge(base, adapter, out)
    assert found.problems == () and found.dtype == dtype
    assert least <= found.merge_error <= most


def test_float32_keeps_what_bfloat16_rounds_away(folders):
    base, adapter, out = folders(std=NEXT_TO_NOTHING)
    merge_adapter(base, adapter, out, dtype=torch.float32)
    found = verify_merge(base, adapter, out)
    assert found.problems == () and found.dtype == torch.float32 and found.merge_error < 0.05
    frequencies = "mixins.rotary.rotary_emb.inv_freq"
    tensors, before = map_weights(out / WEIGHTS), map_weights(base / WEIGHTS)
    assert {t.dtype for name, t in tensors.items() if name != frequencies} == {torch.float32}
    assert torch.equal(tensors[frequencies], before[frequencies])


@pytest.mark.parametrize("std", [NEXT_TO_NOTHING, WEAK, STRONG])
def test_a_merge_that_does_nothing_is_wrong_however_little_there_was_to_do(folders, std, monkeypatch):
    """Beside a weak adapter, what rounding costs is as large as what is missing: the logits alone would not tell."""
    monkeypatch.setattr(merge_checkpoint, "merged_weight", lambda weight, *rest: weight.float())
    base, adapter, out = folders(std=std)
    merge_adapter(base, adapter, out)
    found = verify_merge(base, adapter, out)
    assert found.merge_error == pytest.approx(1)
    assert "not base plus adapter, rounded once: " in found.problems[0]


def rewrite(out, change):
    content = torch.load(out / WEIGHTS)
    change(content["module"])
    torch.save(content, out / WEIGHTS)


def by_one_place(state):
    bits = state[ONE].view(torch.int16)
    bits[3, 5] += 1


def exchanged(state):
    other = "transformer.layers.1.attention.dense.weight"
    state[ONE], state[other] = state[other], state[ONE]


def not_adapted(state):
    state["transformer.final_layernorm.weight"][0] += 0.1


@pytest.mark.parametrize(
    ("change", "named"),
    [(by_one_place, ONE), (exchanged, f"{ONE}, transformer.layers.1"), (not_adapted, "transformer.final_layernorm")],
)
def test_one_value_that_is_not_the_nearest_is_named(folders, change, named):
    base, adapter, out = folders()
    merge_adapter(base, adapter, out)
    rewrite(out, change)
    assert f"rounded once: {named}" in verify_merge(base, adapter, out).problems[0]


def test_a_folder_that_computes_something_else_with_right_weights_is_wrong(folders):
    base, adapter, out = folders()
    merge_adapter(base, adapter, out)
    config = json.loads((out / "model_config.json").read_text())
    (out / "model_config.json").write_text(json.dumps({**config, "layernorm_epsilon": 0.5}))
    assert verify_merge(base, adapter, out).problems == (
        "the folder computes something else with its weights, by its config",
    )


def test_an_overflow_in_float16_is_refused_by_name(folders):
    base, adapter, out = folders(torch.float32)
    state = torch.load(base / WEIGHTS)
    state["module"]["transformer.final_layernorm.weight"][2] = 7e4
    torch.save(state, base / WEIGHTS)
    with pytest.raises(MergeError, match=r"final_layernorm.weight: 1 merged .* torch.float16.*--dtype bfloat16"):
        merge_adapter(base, adapter, out, dtype=torch.float16, any_base=True)
    assert not out.exists()


def run(capsys, base, adapter, out, *more):
    status = main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), *more])
    return status, capsys.readouterr().out


def test_the_verdict_says_what_the_precision_costs_and_the_way_out(folders, capsys, tmp_path):
    base, adapter, out = folders(std=NEXT_TO_NOTHING)
    status, said = run(capsys, base, adapter, out, "--verify")
    assert status == 0 and "effect on the logits, which bfloat16 rounds away; --dtype float32 keeps it" in said
    status, said = run(capsys, base, adapter, tmp_path / "wide", "--verify", "--dtype", "float32", "--to", "hf")
    assert status == 0 and "effect on the logits, which float32 rounds away\n" in said


def test_an_adapter_that_does_nothing_loses_nothing(folders, capsys):
    status, said = run(capsys, *folders(std=0), "--verify")
    assert status == 0 and "verified: the weights are base plus adapter; what the adapter does" in said


def test_it_says_what_it_does_and_how_far_that_is(folders, capsys, monkeypatch):
    from sat_lora.terminal import progress

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    base, adapter, out = folders()
    assert main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), "--verify"]) == 0
    said = capsys.readouterr().err
    steps = ("1 of 3", "loading the base: 1 of", "2 of 3", "comparing weights: 1 of", "3 of 3", "merged model: 1 of")
    places = [said.index(words) for words in steps]
    assert places == sorted(places)

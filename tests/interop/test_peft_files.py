"""`sat-lora export --to peft` and `import --from peft`, proved with the real `peft` package."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from sat_lora import LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.errors import AdapterError
from sat_lora.interop.peft_export import export_to_peft
from sat_lora.interop.peft_import import import_from_peft
from tests.support.hf_tree import HuggingFaceTree
from tests.support.tiny import CONFIG, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
EVERYWHERE = (
    ".*query_key_value.*|.*dense.*|.*gate_proj.*|.*lm_head|.*patch_embedding.proj|.*linear_proj"
    "|transformer.word_embeddings"
)
CASES = {
    "default": {},
    "every kind of layer": {"target_modules": EVERYWHERE},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa", "r": 4},
    "patterns": {"rank_pattern": {"dense": 2, r"1\.mlp.*": 3}, "alpha_pattern": {r"query_key_value": 7}},
    "q and v": {"qkv_slots": "qv"},
    "modules to save": {"target_modules": "vit-mlp", "modules_to_save": ["norm1", "lm_head", "final_layernorm"]},
}  # fmt: skip
NEEDS_BASE = {
    "dora on q and v": {"use_dora": True, "qkv_slots": "qv"},
    "half of a module": {"target_modules": "language-mlp", "modules_to_save": ["norm1.bias"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, single_process_group):
    folder = tmp_path_factory.mktemp("base")
    save_weights(folder, CONFIG, tiny_model(torch.float64).state_dict())
    return folder


def trained(fields, folder):
    """A model with an adapter that has an effect, saved in the folder."""
    model = tiny_model(torch.float64).eval()
    add_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    if "init_lora_weights" not in fields:
        fill_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (name.endswith("magnitude") or ".adapters." not in name):
                parameter.mul_(1.2)
            elif parameter.requires_grad and "init_lora_weights" in fields:
                parameter.add_(0.05)
    save_adapter(model, folder)
    return model


def assert_logits_agree(model, exported):
    plain = HuggingFaceTree(tiny_model(torch.float64).state_dict(), CONFIG).eval()
    batch = tiny_batch()
    batch["images"] = batch["images"].double()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = plain(batch)
        adapted = PeftModel.from_pretrained(plain, exported, autocast_adapter_dtype=False).eval()
        expected = logits_of(model, batch)
        # RMSNorm computes in float32 in SAT.
        torch.testing.assert_close(adapted(batch), expected, atol=1e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize("case", [*CASES, *NEEDS_BASE])
def test_peft_gives_our_logits_and_the_way_back_the_same_bytes(case, base, tmp_path):
    model = trained({**CASES, **NEEDS_BASE}[case], tmp_path / "ours")
    export_to_peft(tmp_path / "ours", tmp_path / "peft", base=base if case in NEEDS_BASE else None)
    assert_logits_agree(model, tmp_path / "peft")
    import_from_peft(tmp_path / "peft", tmp_path / "back", base=base)
    if case in CASES:
        assert_same_adapter(tmp_path / "ours", tmp_path / "back")


def assert_same_adapter(one, other):
    before, after = (folder / "adapter_model.safetensors" for folder in (one, other))
    assert before.read_bytes() == after.read_bytes()
    ours, back = read_adapter(one), read_adapter(other)
    assert ours.base_fingerprint == back.base_fingerprint and ours.layers.keys() == back.layers.keys()
    for name, entry in ours.layers.items():
        assert entry.scale == pytest.approx(back.layers[name].scale, rel=1e-15)
        assert replace(entry, scale=1) == replace(back.layers[name], scale=1), name


def test_a_pair_that_peft_trained_for_q_k_and_v_at_once_comes_in(base, tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    tree = HuggingFaceTree(tiny_model(torch.float64).state_dict(), CONFIG).eval()
    config = PeftConfig(r=3, lora_alpha=5, target_modules=r".*(query_key_value|fc1|down_proj)", use_rslora=True)
    theirs = get_peft_model(tree, config, autocast_adapter_dtype=False).eval()
    randomise_lora(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    import_from_peft(tmp_path / "peft", tmp_path / "ours", base=base)
    model = tiny_model(torch.float64).eval()
    load_adapter(model, tmp_path / "ours")
    assert_logits_agree(model.eval(), tmp_path / "peft")


@torch.no_grad()
def randomise_lora(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "vit-mlp", "modules_to_save": ["boi"]}, "a parameter outside of a module"),
        ({"target_modules": "vit-mlp", "bias": "lora_only"}, "a parameter of a layer that has a LoRA"),
        ({"target_modules": ".*position_embeddings"}, "reads its weight without calling it"),
        (NEEDS_BASE["dora on q and v"], "needs the row norms of q, k and v"),
        (NEEDS_BASE["half of a module"], "its other parameter was not trained; give --base"),
    ],
)
def test_what_peft_cannot_hold_is_refused(fields, message, tmp_path):
    trained(fields, tmp_path / "ours")
    with pytest.raises(AdapterError, match=message):
        export_to_peft(tmp_path / "ours", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_everything_unsupported_in_a_peft_file_is_in_one_error(base, tmp_path):
    trained({"target_modules": "vit-mlp"}, tmp_path / "ours")
    export_to_peft(tmp_path / "ours", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_bias": True, "use_qalora": True, "bias": "all"}))
    with pytest.raises(AdapterError) as error:
        import_from_peft(tmp_path / "peft", tmp_path / "back", base=base)
    assert all(name in str(error.value) for name in ("lora_bias=True", "use_qalora=True", "bias='all'"))


def test_the_commands_say_where_and_a_mistake_is_status_2(base, tmp_path, capsys):
    ours, peft, back = (str(tmp_path / name) for name in ("ours", "peft", "back"))
    trained({"target_modules": "vit-mlp"}, ours)
    assert main(["export", "--to", "peft", "--adapter", ours, "--out", peft]) == 0
    assert main(["import", "--from", "peft", peft, "--base", str(base), "--out", back]) == 0
    assert capsys.readouterr().out == f"PEFT adapter in {peft}\nadapter in {back}\n"
    for arguments, message in (
        (["export", "--to", "peft", "--adapter", ours, "--out", peft], "exists; give a new folder"),
        (["import", "--from", "peft", peft, "--out", back + "2"], "needs --base"),
        (["import", "--from", "peft", ours, "--base", str(base), "--out", back + "2"], "already an adapter"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


FC1 = "base_model.model.model.vision.transformer.layers.0.mlp.fc1.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FC1: torch.ones(4, 5)}, r"A \(4, 5\) and B \(72, 4\), the base's weight is \(72, 48\)"),
        ({FC1: torch.ones(48)}, "are no matrices"),
        ({FC1: torch.ones(0, 48)}, "are no matrices"),
        ({FC1: torch.full((4, 48), torch.nan)}, "not finite"),
        ({FC1: torch.ones(4, 48, dtype=torch.long)}, "a floating-point dtype is wanted"),
        ({FC1: None}, r"has \['B'\], wanted \['A', 'B'\]"),
        ({FC1.replace("fc1", "fc3"): torch.ones(4, 48)}, "fc3.*: CogVLM has no such module"),
        ({FC1.replace("0.mlp", "9.mlp"): torch.ones(4, 48)}, "the base has no .*layers.9.mlp"),
        ({"base_model.model.lm_head.weight": torch.ones(3, 3)}, r"lm_head.weight: shape \(3, 3\), the base has"),
    ],
)
def test_a_peft_file_that_does_not_fit_is_refused(exported, base, changes, message, tmp_path):
    tensors = {**load_file(exported / "adapter_model.safetensors"), **changes}
    shutil.copytree(exported, tmp_path / "peft")
    save_file({k: t for k, t in tensors.items() if t is not None}, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        import_from_peft(tmp_path / "peft", tmp_path / "back", base=base)
    assert not (tmp_path / "back").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, single_process_group):
    folder = tmp_path_factory.mktemp("exported")
    trained({"target_modules": "vit-mlp"}, folder / "ours")
    export_to_peft(folder / "ours", folder / "peft")
    return folder / "peft"

"""Adapters of the successors of CogVLM through PEFT itself: on a tree of plain modules with Hugging Face's names."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from sat_lora import AdapterError, add_lora, save_adapter
from sat_lora.adapters.merge import merge_adapter
from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.cogvlm.layer_names import sharding_named, slot_spans
from sat_lora.interop.peft_export import export_to_peft
from sat_lora.interop.peft_import import import_from_peft
from sat_lora.parallel.sharding import Sharding
from tests.support.tiny import fill_adapters
from tests.support.tiny_families import CONFIGS, family_model

pytestmark = pytest.mark.usefixtures("single_process_group")
FILE = "release/mp_rank_00_model_states.pt"
LINEARS = r"(?!.*\b(lm_head|[qkv]_proj)$).*(query_key_value|dense|query|key_value|w\d|conv|proj)(_list)?(\.\d+)?"
CASES = {
    "cogvlm2": dict(target_modules=LINEARS),
    "cogvlm2, q and v": dict(target_modules=LINEARS, qkv_slots=("q", "v")),
    "cogvlm2, k": dict(target_modules=r".*query_key_value.*", qkv_slots=("k",)),
    "cogvlm2, with a module": dict(target_modules=["vision-expert-mlp"], modules_to_save=["conv"]),
    "cogvlm2-video": dict(target_modules=LINEARS),
    "cogagent": dict(target_modules=LINEARS),
    "cogagent, v": dict(target_modules=["cross-attention"], qkv_slots=("v",)),
}


def tree(state):
    """Every weight in a module of its kind, under Hugging Face's name."""
    root = nn.Module()
    for name, tensor in state.items():
        path, _, leaf = (hf_name(name) or "").rpartition(".")
        if leaf != "weight" or tensor.dim() not in (2, 4) or path.endswith("embedding"):
            continue
        if tensor.dim() == 2:
            module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        else:
            module = nn.Conv2d(tensor.shape[1], tensor.shape[0], tensor.shape[2], tensor.shape[2])
            module.bias.data = state[f"{name.removesuffix('weight')}bias"].clone()
        module.weight.data = tensor.clone()
        parent = root
        *parts, last = path.split(".")
        for part in parts:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)
    return root


@pytest.fixture
def exported(tmp_path, request):
    case = request.param
    name = case.partition(",")[0]
    base = tmp_path / "base"
    save_weights(base, CONFIGS[name], family_model(name).state_dict())
    model = family_model(name)
    model.base_name = "base"
    add_lora(model, r=2, lora_alpha=6, **CASES[case])
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", name


FAST = {"cogvlm2, q and v", "cogvlm2, with a module", "cogagent"}
MARKED = [case if case in FAST else pytest.param(case, marks=pytest.mark.matrix) for case in CASES]


@pytest.mark.parametrize("exported", MARKED, indirect=True)
def test_what_peft_merges_is_what_is_merged_here(exported, tmp_path):
    base, adapter, _ = exported
    export_to_peft(adapter, tmp_path / "peft")
    merge_adapter(base, adapter, tmp_path / "merged")
    wanted = torch.load(tmp_path / "merged" / FILE)["module"]
    before = torch.load(base / FILE)["module"]
    merged = PeftModel.from_pretrained(tree(before), tmp_path / "peft").merge_and_unload().state_dict()
    changed = {name for name in wanted if not torch.equal(wanted[name], before[name])}
    assert changed and {hf_name(name) for name in changed} - {"model.vision.conv.bias"} <= merged.keys()
    for name in changed:
        got = merged[hf_name(name)]
        assert (got - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name
    import_from_peft(tmp_path / "peft", tmp_path / "back", base=base)
    merge_adapter(base, tmp_path / "back", tmp_path / "again")
    again = torch.load(tmp_path / "again" / FILE)["module"]
    assert all((again[name] - wanted[name]).abs().max() < 1e-6 for name in wanted)


@pytest.mark.parametrize("exported", ["cogvlm2"], indirect=True)
def test_q_alone_does_not_say_how_many_rows_the_layer_has(exported, tmp_path):
    base, _, name = exported
    model = family_model(name)
    add_lora(model, target_modules=["language-attention"], qkv_slots=("q",), r=2)
    fill_adapters(model)
    save_adapter(model, tmp_path / "q")
    with pytest.raises(
        AdapterError, match="only q is adapted, and the adapter does not say how many rows .* give --base"
    ):
        export_to_peft(tmp_path / "q", tmp_path / "peft")
    export_to_peft(tmp_path / "q", tmp_path / "peft", base=base)
    merge_adapter(base, tmp_path / "q", tmp_path / "merged")
    merged = PeftModel.from_pretrained(tree(torch.load(base / FILE)["module"]), tmp_path / "peft").merge_and_unload()
    wanted = torch.load(tmp_path / "merged" / FILE)["module"]
    layer = "transformer.layers.1.attention.query_key_value.weight"
    assert torch.allclose(merged.state_dict()[hf_name(layer)], wanted[layer], atol=1e-6)


def test_slots_and_cuts_are_told_by_names_and_shapes():
    """As published: 32 heads of queries and 8 of keys, of 128 channels each."""
    layer = "transformer.layers.0.attention.query_key_value"
    assert slot_spans(layer, 6144, 4096) == {"q": (0, 4096), "k": (4096, 5120), "v": (5120, 6144)}
    assert slot_spans("transformer.layers.0.cross_attention.key_value", 2048, 1024) == {
        "k": (0, 1024),
        "v": (1024, 2048),
    }
    assert slot_spans("transformer.layers.0.cross_attention.query", 1024, 4096) == {}
    vision = "mixins.rotary.vision_query_key_value_list.3"
    assert sharding_named(f"{vision}.weight", 6144, 4096) == sharding_named(f"{vision}.bias", 6144, 4096)
    assert sharding_named(f"{layer}.weight", 6144, 4096) == Sharding(0, (4, 1, 1))
    assert sharding_named("transformer.layers.0.cross_attention.key_value.weight", 2048, 1024) == Sharding(0, (1, 1))
    assert sharding_named("mixins.encoder.vit.model.blocks.0.attn.proj.weight", 1024, 1024) == Sharding()

"""The adapter on disk: what it holds, and that it comes back as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sat_lora import AdapterError, ConfigError, LoraConfig, LoraMixin, add_lora, describe, load_adapter, save_adapter
from sat_lora.adapters.card import CARD
from sat_lora.adapters.read import read_adapter
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.mixin import lora_mixins
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def trained_model(dtype=torch.float32, **fields):
    """A model whose adapters are not zero, as after training."""
    model = tiny_model(dtype).eval()
    add_lora(model, **{"r": 4, **fields})
    fill_adapters(model)
    return model


def tensors_of(model):
    return {f"{n}.{leaf}": getattr(a, leaf).detach() for n, a in adapters_of(model).items() for leaf in "AB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["fresh model", "mixin of the same shape"])
def test_a_loaded_adapter_gives_the_same_logits_bit_for_bit(tmp_path, dtype, place):
    batch, model = tiny_batch(), trained_model(dtype)
    save_adapter(model, tmp_path / "adapter")
    other = tiny_model(dtype).eval()
    base = logits_of(other, batch)
    if place != "fresh model":
        add_lora(other, r=4)
        fill_adapters(other, seed=5)
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    assert not torch.allclose(logits_of(other, batch), base, atol=0.1)


def test_a_loaded_adapter_goes_on_training_and_the_base_does_not(tmp_path):
    save_adapter(trained_model(), tmp_path / "adapter")
    model = tiny_model()
    load_adapter(model, tmp_path / "adapter")
    adapters = {id(p) for a in adapters_of(model).values() for p in a.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == adapters and len(adapters) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_holds_the_adapter_and_nothing_of_the_base(tmp_path, dtype):
    model = trained_model(dtype)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CARD, CONFIG, WEIGHTS]
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {key.rpartition(".")[2] for key in tensors} == {"lora_A", "lora_B"}
    assert {t.dtype for t in tensors.values()} == {dtype}
    base = {tensor.numpy(force=True).tobytes() for tensor in tiny_model().state_dict().values()}
    assert not base & {t.float().numpy().tobytes() for t in tensors.values()}
    parameters = sum(p.numel() for a in adapters_of(model).values() for p in a.parameters())
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert size <= parameters * dtype.itemsize + 64 * 1024


def test_slots_are_named_in_the_file_and_come_back(tmp_path):
    model, batch = trained_model(qkv_slots=("v", "q")), tiny_batch()
    save_adapter(model, tmp_path / "adapter")
    name = "transformer.layers.0.attention.query_key_value"
    tensors, adapter = load_file(tmp_path / "adapter" / WEIGHTS), adapters_of(model)[name]
    own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
    assert {key: tuple(t.shape) for key, t in own.items()} == {
        "q.lora_A": (4, 64),
        "q.lora_B": (64, 4),
        "v.lora_A": (4, 64),
        "v.lora_B": (64, 4),
    }
    assert torch.equal(own["v.lora_A"], adapter.A[4:]) and torch.equal(own["v.lora_B"], adapter.B[64:])
    other = tiny_model().eval()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))


def test_patterns_and_scales_come_back(tmp_path):
    model, batch = (
        trained_model(rank_pattern={"dense": 2}, alpha_pattern={"gate_proj": 3}, use_rslora=True),
        tiny_batch(),
    )
    save_adapter(model, tmp_path / "adapter")
    other = tiny_model().eval()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    assert read_adapter(tmp_path / "adapter").config == next(iter(lora_mixins(model).values())).config


def test_a_mixin_on_the_language_model_alone_comes_back_alone(tmp_path):
    """`model.add_mixin("lora", LoraMixin(model))`, without `add_lora`: the vision transformer has no mixin."""
    model, batch = tiny_model().eval(), tiny_batch()
    model.add_mixin("lora", LoraMixin(model, r=4))
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    other = tiny_model().eval()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    assert list(lora_mixins(other)) == ["mixins.lora"]


def test_two_adapters_are_saved_and_loaded_by_name(tmp_path):
    model, batch = trained_model(), tiny_batch()
    add_lora(model, r=2, name="second")
    save_adapter(model, tmp_path / "first")
    save_adapter(model, tmp_path / "second", name="second")
    assert read_adapter(tmp_path / "second").config.r == 2
    other = tiny_model().eval()
    load_adapter(other, tmp_path / "second", name="lora")
    load_adapter(other, tmp_path / "first", name="another")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))


def test_saving_twice_gives_identical_bytes_and_saving_again_replaces(tmp_path):
    model = trained_model()

    def saved(model):
        save_adapter(model, tmp_path / "adapter")
        return [(tmp_path / "adapter" / name).read_bytes() for name in (WEIGHTS, CONFIG)]

    first = saved(model)
    assert saved(model) == first
    fill_adapters(model, seed=9)
    assert saved(model) != first
    loaded = tiny_model()
    load_adapter(loaded, tmp_path / "adapter")
    expected = tensors_of(model)
    assert all(torch.equal(t, expected[name]) for name, t in tensors_of(loaded).items())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_write_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    model = trained_model()
    save_adapter(model, tmp_path / "adapter")
    before = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    fill_adapters(model, seed=9)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(AdapterError, match="adapter: the adapter could not be written: .*No space left"):
        save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_model_without_the_mixin_cannot_be_saved(tmp_path):
    with pytest.raises(AdapterError, match="not saved, the model has no LoRA mixin called 'other'"):
        save_adapter(trained_model(), tmp_path / "adapter", name="other")
    assert not (tmp_path / "adapter").exists()


def test_two_configs_under_one_name_are_refused(tmp_path):
    model = tiny_model()
    add_lora(model, LoraConfig(r=4, target_modules="vit-mlp"))
    model.add_mixin("lora", LoraMixin(model, r=2))
    with pytest.raises(AdapterError, match="different configs and a file holds one; give them different names"):
        save_adapter(model, tmp_path / "adapter")


def test_a_name_that_is_taken_is_refused_before_anything_changes(tmp_path):
    save_adapter(trained_model(), tmp_path / "adapter")
    model = tiny_model()
    with pytest.raises(ConfigError, match="has a mixin mixins.rotary already"):
        load_adapter(model, tmp_path / "adapter", name="rotary")
    assert not lora_mixins(model) and all(p.requires_grad for p in model.parameters())


def test_the_config_is_readable_by_name(tmp_path):
    save_adapter(trained_model(), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32.0)
    assert config["sat_lora"]["format_version"] == 2
    linear = config["sat_lora"]["layers"]["transformer.layers.0.attention.query_key_value"]
    assert linear == {
        "kind": "column",
        "r": 4,
        "scale": 8.0,
        "slots": ["q", "k", "v"],
        "rows": [[0, 64], [64, 128], [128, 192]],
    }


@pytest.mark.parametrize("verb", ["merge", "disable"])
def test_a_merged_or_disabled_adapter_takes_no_file(tmp_path, verb):
    model = trained_model()
    save_adapter(model, tmp_path / "adapter")
    getattr(model.get_mixin("lora"), verb)()
    with pytest.raises(AdapterError, match="'lora' is merged or disabled; unmerge"):
        load_adapter(model, tmp_path / "adapter")


def test_a_pissa_adapter_goes_on_from_its_file_with_what_it_subtracts(tmp_path):
    """Into the mixins that it came from, not as the plain pair of twice the rank that others see."""
    model, batch = trained_model(init_lora_weights="pissa"), tiny_batch()
    logits = logits_of(model, batch)
    save_adapter(model, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").config.r == 8
    again = trained_model(init_lora_weights="pissa")
    for adapter in adapters_of(again).values():
        torch.nn.init.zeros_(adapter.origin_A)
        torch.nn.init.zeros_(adapter.B)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, batch), logits)
    plain = tiny_model().eval()
    load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(plain, batch), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}], ids=["adapters", "with biases"])
def test_mixins_put_on_inner_and_outer_model_by_hand_lose_nothing(tmp_path, fields):
    """Both know their layers by the same names, such as transformer.layers.0.attention.dense."""
    model, batch = tiny_model().eval(), tiny_batch()
    vit = model.get_mixin("eva").vit_model
    for one in (model, vit):
        mixin = LoraMixin(one, r=4, target_modules=["attention.dense", "query_key_value"], **fields)
        one.add_mixin("lora", mixin)
        torch.manual_seed(len(mixin.adapters))
        for parameter in mixin.trainable():
            torch.nn.init.normal_(parameter, std=0.1)
    assert len(adapters_of(model)) == 8
    assert describe(model)[-1]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path / "adapter")
    assert len(read_adapter(tmp_path / "adapter").layers) == 8
    other = tiny_model().eval()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    load_adapter(model, tmp_path / "adapter")

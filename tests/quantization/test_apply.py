"""`quantize_model` on SAT models, with what may be put on them afterwards."""

import pytest
import torch

from sat_lora import (
    AdapterError,
    ConfigError,
    QuantizationError,
    add_lora,
    describe,
    describe_text,
    load_adapter,
    quantize_model,
    save_adapter,
)
from sat_lora.adapters.read import trained_whole
from sat_lora.lora.live_base import identity_of_model
from sat_lora.lora.mixin import lora_mixins
from sat_lora.quantization.config import NAMES, Quantization
from sat_lora.quantized.layers import put_quantized, quantized_weight_of, quantized_weights
from sat_lora.quantized.quantized_weight import whole
from tests.support.quantized_layers import decoded_copy
from tests.support.tiny import WIDE, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
# Rows of 64 and 96 in the language model; the ViT's of 48 and 72 no block divides.
VIT = "mixins.eva.vit_model."


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(4)
    model.train()
    logits_of(model, batch).float().pow(2).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("scheme", NAMES)
def test_names_and_modules_stay_and_the_weights_take_fewer_bits(scheme):
    model = tiny_model()
    names = set(model.state_dict())
    modules = {name: type(module) for name, module in model.named_modules()}
    layers = quantize_model(model, scheme=scheme)
    assert set(model.state_dict()) == names
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert [name for name, _ in quantized_weights(model)] == sorted(layers, key=[*modules].index)
    assert "transformer.layers.0.attention.query_key_value" in layers and "mixins.lm.lm_head" not in layers
    assert not any(name.startswith(VIT) for name in layers)  # blocks do not divide 48 and 72
    assert not any(isinstance(module, torch.nn.Embedding) for module in map(model.get_submodule, layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, dict(use_dora=True), dict(lora_dropout=0.1), dict(init_lora_weights="olora")])
def test_a_model_trains_as_on_the_decoded_weights(dtype, fields):
    model = tiny_model(dtype)
    quantize_model(model)
    plain = decoded_copy(model)
    batch = tiny_batch()
    batch["images"] = batch["images"].to(dtype)
    results = []
    for side in (model, plain):
        add_lora(side, r=4, **fields)
        fill_adapters(side)
        results.append(gradients(side, batch))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 40
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []


@pytest.mark.parametrize("settings", [dict(fixed_order=True), dict(second=True)])
def test_a_fixed_order_and_a_second_adapter_work_on_it(settings):
    model = tiny_model()
    quantize_model(model, scheme="int8")
    plain = decoded_copy(model)
    results = []
    for side in (model, plain):
        add_lora(side, r=4, fixed_order=settings.get("fixed_order", False))
        if "second" in settings:
            add_lora(side, r=2, name="other", target_modules=["language-attention", "language-mlp"])
        fill_adapters(side)
        results.append(gradients(side, tiny_batch()))
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []


def test_recomputed_layers_give_the_same_gradients():
    results = []
    for recomputed in (False, True):
        model = tiny_model(checkpoint_activations=recomputed, vit_checkpoint_activations=recomputed)
        quantize_model(model)
        add_lora(model, r=4)
        fill_adapters(model)
        results.append(gradients(model, tiny_batch()))
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []


def test_deleting_the_mixin_gives_the_quantised_base_back():
    model = tiny_model()
    quantize_model(model)
    before = logits_of(model, tiny_batch())
    add_lora(model, r=4)
    fill_adapters(model)
    assert not torch.equal(logits_of(model, tiny_batch()), before)
    for mixin in lora_mixins(model).values():
        with mixin.disable():
            pass
    model.del_mixin("lora")
    model.mixins["eva"].vit_model.del_mixin("lora")
    assert torch.equal(logits_of(model, tiny_batch()), before)


def test_an_adapter_is_of_the_base_and_not_of_its_bits(tmp_path):
    """Trained on either, it loads on the other, without --any-base."""
    model, plain = tiny_model(), tiny_model()
    quantize_model(model)
    assert identity_of_model(model).difference(identity_of_model(plain)) is None
    for number, (trained, other) in enumerate(((model, tiny_model()), (plain, tiny_model(seed=0)))):
        add_lora(trained, r=4)
        fill_adapters(trained)
        save_adapter(trained, tmp_path / str(number))
        if trained is plain:
            quantize_model(other)
        load_adapter(other, tmp_path / str(number))
    with pytest.raises(Exception, match="base"):
        load_adapter(tiny_model(seed=1), tmp_path / "0")


def test_the_table_counts_the_elements_of_the_base():
    model = tiny_model()
    add_lora(model, r=4)
    wanted = describe(model)
    quantized = tiny_model()
    quantize_model(quantized)
    add_lora(quantized, r=4)
    assert describe(quantized) == wanted
    last = describe_text(quantized).split("\n")[-1]
    assert last.startswith("quantised: ") and " linears to nf4, " in last and "quantised" not in describe_text(model)
    count = sum(weight.numel() for _, weight in quantized_weights(quantized))
    assert f"in place of {count * 4 / 1e6:,.1f} on each rank" in last


def test_merging_in_place_names_the_command_that_merges_files():
    model = tiny_model()
    quantize_model(model)
    add_lora(model, r=4)
    fill_adapters(model)
    before = logits_of(model, tiny_batch())
    with pytest.raises(
        ConfigError, match=r"weight and \d+ more: quantised weights take no delta.*sat-lora merge --base"
    ):
        lora_mixins(model)["mixins.lora"].merge()
    assert torch.equal(logits_of(model, tiny_batch()), before)


@pytest.mark.parametrize("name", ["linear_proj", "transformer.layers.0.mlp", "mixins.mlp.gate_proj.0.weight"])
def test_what_is_quantised_does_not_train_whole(name):
    model = tiny_model()
    quantize_model(model)
    with pytest.raises(ConfigError, match="modules_to_save: .*weight is quantised and does not train.*keep_modules"):
        add_lora(model, r=4, modules_to_save=[name])


def test_what_stays_whole_trains():
    model = tiny_model()
    quantize_model(model, keep_modules=["projector"])
    add_lora(model, r=4, modules_to_save=["linear_proj"], bias="all")
    assert model.mixins["eva"].linear_proj.linear_proj.weight.requires_grad


def test_an_adapter_with_a_whole_weight_wants_that_whole(tmp_path):
    model = tiny_model()
    add_lora(model, r=4, modules_to_save=["linear_proj.linear_proj", "boi"])
    save_adapter(model, tmp_path / "adapter")
    name = "mixins.eva.linear_proj.dense_h_to_4h.weight"
    assert trained_whole(tmp_path / "adapter") == ("mixins.eva.boi", "mixins.eva.linear_proj.linear_proj.weight")
    quantized = tiny_model(config=WIDE)
    quantize_model(quantized)
    wanted = "mixins.eva.linear_proj.linear_proj.weight is trained whole, and quantised in the model"
    with pytest.raises(AdapterError, match=wanted):
        load_adapter(quantized, tmp_path / "adapter", any_base=True)
    narrow = tiny_model()
    quantize_model(narrow, trained=trained_whole(tmp_path / "adapter"))
    load_adapter(narrow, tmp_path / "adapter")
    assert quantized_weight_of(narrow.get_submodule(name.removesuffix(".weight"))) is not None


def test_a_model_with_adapters_is_not_quantised():
    model = tiny_model()
    add_lora(model, r=4)
    with pytest.raises(ConfigError, match="the model has adapters, which began on its whole weights"):
        quantize_model(model)


def test_a_weight_that_is_not_finite_is_named():
    model = tiny_model()
    model.transformer.layers[1].mlp.dense_4h_to_h.weight.data[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match="transformer.layers.1.mlp.dense_4h_to_h.weight: it holds values"):
        quantize_model(model)


PROBLEMS = {
    "an unknown scheme": (dict(scheme="nf5"), "there is no scheme 'nf5', only nf4 and int8"),
    "an unknown module": (dict(modules=["q_proj"]), "quantize_modules: 'q_proj' matches no layer; nearest: query_key"),
    "an unknown one to keep": (dict(keep_modules=["vit_mlp"]), "keep_modules: 'vit_mlp' matches no layer"),
    "no regular expression": (dict(modules="(.*"), r"quantize_modules: '\(\.\*' is not a regular expression"),
    "rows that no block divides": (
        dict(modules=["vit_model.transformer.layers.0.attention.dense"]),
        "attention.dense has rows of 48 elements on each rank, which blocks of 64 or 32 do not divide; leave it out",
    ),
    "an embedding": (
        dict(modules=["word_embeddings"]),
        "word_embeddings is a VocabParallelEmbedding, and only linears",
    ),
    "a convolution": (dict(modules=r".*patch_embedding\.proj"), "patch_embedding.proj is a Conv2d, and only linears"),
    "the head": (dict(modules=["lm_head"]), "lm_head is the output head, which stays whole; leave it out"),
    "what trains whole": (
        dict(modules=["linear_proj.linear_proj", "dense"], trained=["linear_proj"]),
        "linear_proj.linear_proj trains whole, by modules_to_save; leave it out",
    ),
    "nothing": (dict(keep_modules=["all-linear"]), "quantize_modules: nothing is left after keep_modules"),
    "presets that fit nowhere": (
        dict(modules=["vit-attention"]),
        "^quantize_modules: nothing that it selects can be quantised: mixins.eva.vit_model.* has rows of 48.*, and "
        "[0-9]+ more stay whole; select other linears",
    ),
    "no pattern": (dict(modules=[]), "^quantize_modules: it names no layer; give presets or patterns, such as all-lin"),
}


@pytest.mark.parametrize(("fields", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_mistakes_get_one_error_and_change_nothing(fields, problem):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=problem):
        quantize_model(model, **fields)
    assert not [*quantized_weights(model)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_several_mistakes_are_one_error():
    with pytest.raises(ConfigError, match="quantize_modules: 'nowhere' .*; keep_modules: 'nobody' "):
        quantize_model(tiny_model(), modules=["nowhere"], keep_modules=["nobody"])


def test_a_shared_weight_stays_whole():
    model = tiny_model()
    layers = model.transformer.layers
    layers[1].mlp.dense_h_to_4h.weight = layers[0].mlp.dense_h_to_4h.weight
    names = quantize_model(model)
    assert "transformer.layers.0.mlp.dense_4h_to_h" in names
    assert not any(name.endswith("dense_h_to_4h") and name.startswith("transformer") for name in names)


def test_a_second_time_finds_nothing_more():
    model = tiny_model()
    quantize_model(model)
    with pytest.raises(
        ConfigError, match="nothing that it selects can be quantised: .* is quantised already, and [0-9]+ more"
    ):
        quantize_model(model, modules=["language-mlp"])


def test_lists_are_taken_for_tuples():
    assert Quantization(keep_modules=["a"]) == Quantization(keep_modules=("a",))


def test_whole_weights_can_be_put_back():
    model = tiny_model()
    quantize_model(model)
    plain = decoded_copy(model)
    assert all(
        torch.equal(whole(weight), plain.get_submodule(name).weight) for name, weight in quantized_weights(model)
    )
    name, weight = next(quantized_weights(model))
    put_quantized(plain.get_submodule(name), weight)
    assert torch.equal(logits_of(plain, tiny_batch()), logits_of(model, tiny_batch()))

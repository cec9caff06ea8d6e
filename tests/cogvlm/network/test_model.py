"""The SAT model against a second, plain implementation of CogVLM's arithmetic."""

import re

import pytest
import torch

from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.errors import DataError
from tests.support.paths import ROOT
from tests.support.reference_cogvlm import reference_logits
from tests.support.tiny import CONFIG, logits_of, tiny_batch, tiny_model

PUBLISHED = (
    """
transformer.word_embeddings.weight transformer.layers.{i}.input_layernorm.weight
transformer.layers.{i}.attention.query_key_value.weight transformer.layers.{i}.attention.dense.weight
transformer.layers.{i}.post_attention_layernorm.weight transformer.layers.{i}.mlp.dense_h_to_4h.weight
transformer.layers.{i}.mlp.dense_4h_to_h.weight transformer.final_layernorm.weight mixins.lm.lm_head.weight
mixins.rotary.rotary_emb.inv_freq mixins.rotary.vision_query_key_value_list.{i}.weight
mixins.rotary.vision_dense_list.{i}.weight mixins.mlp.gate_proj.{i}.weight mixins.mlp.vision_gate_proj.{i}.weight
mixins.mlp.vision_dense_h_to_4h_list.{i}.weight mixins.mlp.vision_dense_4h_to_h_list.{i}.weight
mixins.eva.boi mixins.eva.eoi mixins.eva.linear_proj.linear_proj.weight mixins.eva.linear_proj.norm1.weight
mixins.eva.linear_proj.norm1.bias mixins.eva.linear_proj.gate_proj.weight mixins.eva.linear_proj.dense_h_to_4h.weight
mixins.eva.linear_proj.dense_4h_to_h.weight mixins.eva.vit_model.mixins.patch_embedding.proj.weight
mixins.eva.vit_model.mixins.patch_embedding.proj.bias mixins.eva.vit_model.transformer.word_embeddings.weight
mixins.eva.vit_model.transformer.position_embeddings.weight
""".split()
    + [
        f"mixins.eva.vit_model.transformer.layers.{{j}}.{module}.{leaf}"
        for module in (
            "input_layernorm",
            "post_attention_layernorm",
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
        for leaf in ("weight", "bias")
    ]
)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def test_state_has_exactly_the_published_names():
    layers = {"{i}": CONFIG["num_layers"], "{j}": CONFIG["eva_args"]["num_layers"]}
    expected = set()
    for name in PUBLISHED:
        key = next((k for k in layers if k in name), None)
        expected |= {name.replace(key, str(n)) for n in range(layers[key])} if key else {name}
    assert set(tiny_model().state_dict()) == expected


def test_full_sizes_have_the_published_shapes():
    """One layer of each tower of CogVLM-17B."""
    config = dict(
        CONFIG,
        num_layers=1,
        hidden_size=4096,
        num_attention_heads=32,
        vocab_size=32000,
        inner_hidden_size=11008,
        image_length=1225,
    )
    config["eva_args"] = dict(
        CONFIG["eva_args"],
        num_layers=1,
        hidden_size=1792,
        num_attention_heads=16,
        inner_hidden_size=15360,
        image_size=[490, 490],
        patch_size=14,
    )
    shapes = {
        k: tuple(v.shape) for k, v in build_cogvlm(config, skip_init=True, dtype=torch.bfloat16).state_dict().items()
    }
    assert shapes["mixins.rotary.vision_query_key_value_list.0.weight"] == (12288, 4096)
    assert shapes["mixins.eva.linear_proj.linear_proj.weight"] == (4096, 1792)
    assert shapes["mixins.eva.vit_model.transformer.position_embeddings.weight"] == (1226, 1792)
    assert shapes["mixins.eva.vit_model.mixins.patch_embedding.proj.weight"] == (1792, 3, 14, 14)
    assert shapes["mixins.rotary.rotary_emb.inv_freq"] == (64,)


@pytest.mark.parametrize("rows", [(True, False), (True, True), (False, False)], ids=["mixed", "images", "text"])
def test_logits_equal_the_plain_implementation(rows):
    model, batch = tiny_model(torch.float64), tiny_batch(rows)
    batch["images"] = batch["images"].double()
    expected = reference_logits(model.state_dict(), CONFIG, batch)
    assert relative_error(logits_of(model.eval(), batch), expected) < 1e-12


@pytest.mark.parametrize("rows", [(True, False), (False, False)], ids=["mixed", "text"])
def test_gradients_equal_the_plain_implementation(rows):
    model, batch = tiny_model(torch.float64).train(), tiny_batch(rows)
    batch["images"] = batch["images"].double()
    logits_of(model, batch).pow(2).mean().backward()
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    reference_logits(state, CONFIG, batch).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if state[name].grad is None else state[name].grad
        assert relative_error(parameter.grad, expected) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float64(dtype):
    batch = tiny_batch()
    exact = logits_of(tiny_model(torch.float64).eval(), {**batch, "images": batch["images"].double()})
    rough = logits_of(tiny_model(dtype).eval(), batch)
    assert rough.dtype == dtype
    error = (rough.double() - exact).norm() / exact.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_every_batch_gives_every_parameter_a_gradient_in_one_order():
    """ZeRO fills buckets in the order in which gradients arrive; a branch on the data would change it."""
    orders = []
    batches = [tiny_batch(rows) for rows in ((True, True), (True, False), (False, False))]
    for batch in (*batches, {**batches[-1], "images": None}):
        model, order = tiny_model().train(), []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, n=name, o=order: o.append(n))
        logits_of(model, batch).sum().backward()
        assert set(order) == {n for n, _ in model.named_parameters()} and len(set(order)) == len(order)
        orders.append(order)
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_a_text_batch_without_images_equals_one_with_a_blank_image():
    model, batch = tiny_model().eval(), tiny_batch((False, False))
    assert torch.equal(logits_of(model, batch), logits_of(model, {**batch, "images": None}))


def test_images_that_do_not_fit_their_places_are_named():
    batch = tiny_batch((True, True))
    with pytest.raises(DataError, match=r"marks 22 places, but 1 images of 9 patches"):
        logits_of(tiny_model(), {**batch, "images": batch["images"][:1]})


def test_no_size_of_the_published_model_is_written_into_the_code():
    source = "".join(p.read_text() for p in (ROOT / "sat_lora").rglob("*.py"))
    assert not re.search(r"\b(1792|15360|11008|4096|1225)\b", source)

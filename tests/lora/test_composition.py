"""A mixin beside others: other mixins, hooks that were there before, base weights that train."""

import pytest
import torch

from sat_lora import LoraMixin, add_lora
from sat_lora._sat import ColumnParallelLinear, RowParallelLinear
from sat_lora.lora.apply import adapters_of
from tests.support.tiny import adapter_gradients, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


def test_two_mixins_add_up():
    model, batch = tiny_model(torch.float64).eval(), tiny_batch()
    batch["images"] = batch["images"].double()
    base = logits_of(model, batch)
    targets = ["lm-head"]  # linear in its delta, so that effects add
    effects = []
    for name in ("one", "two"):
        model.add_mixin(name, LoraMixin(model, r=2, target_modules=targets))
        with torch.no_grad():
            torch.nn.init.normal_(next(iter(model.get_mixin(name).adapters.values())).B)
        effects.append(logits_of(model, batch))
    assert sum(p.requires_grad for p in model.parameters()) == 4
    model.get_mixin("one").enabled = False
    only_two = logits_of(model, batch)
    torch.testing.assert_close(effects[1] - base, (effects[0] - base) + (only_two - base))


def gradients_with(prepare, **fields):
    model = tiny_model(torch.float64)
    prepare(model)
    add_lora(model, **{"r": 4, **fields})
    fill_adapters(model)
    batch = tiny_batch()
    batch["images"] = batch["images"].double()
    return adapter_gradients(model, batch)


def test_a_hook_that_was_there_before_sees_the_base_output_and_changes_nothing():
    """A mixin takes over the product of a layer only where no hook has seen it."""
    seen = []

    def watch(model):
        for layer in model.modules():
            if isinstance(layer, (torch.nn.Linear, ColumnParallelLinear, RowParallelLinear)):
                layer.register_forward_hook(
                    lambda layer, args, out: seen.append((layer, args[0].detach(), out.detach()))
                )

    plain, watched = gradients_with(lambda model: None), gradients_with(watch)
    for name, gradient in plain.items():
        torch.testing.assert_close(watched[name], gradient, rtol=1e-9, atol=1e-12)
    for layer, x, out in seen[::7]:
        bias = None if layer.bias is None else layer.bias.detach()
        torch.testing.assert_close(out, torch.nn.functional.linear(x, layer.weight.detach(), bias))


def test_a_trainable_base_weight_keeps_its_gradient_under_an_adapter():
    model = tiny_model(torch.float64)
    add_lora(model, r=4)
    fill_adapters(model)
    batch = tiny_batch()
    batch["images"] = batch["images"].double()
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    plain = adapter_gradients(model, batch)
    model.zero_grad()
    layer.weight.requires_grad_()
    together = adapter_gradients(model, batch)
    assert layer.weight.grad.any()
    for name, gradient in plain.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-9, atol=1e-12)


def test_two_mixins_on_the_same_layers_have_the_gradients_of_their_sum():
    """A and B of two mixins of rank 2 are the halves of one of rank 4."""
    batch = tiny_batch()
    batch["images"] = batch["images"].double()
    one, two = tiny_model(torch.float64), tiny_model(torch.float64)
    targets = ["language-mlp", "vit-mlp", "attention.dense"]
    add_lora(one, r=4, lora_alpha=4, target_modules=targets)
    fill_adapters(one)
    for name in ("lora", "second"):
        add_lora(two, r=2, lora_alpha=2, target_modules=targets, name=name)
    with torch.no_grad():
        for name, whole in adapters_of(one).items():
            for half, part in enumerate(adapters_of(two, mixin)[name] for mixin in ("lora", "second")):
                part.A.copy_(whole.A[2 * half : 2 * half + 2])
                part.B.copy_(whole.B[:, 2 * half : 2 * half + 2])
    for model in (one, two):
        logits_of(model.train(), batch).pow(2).mean().backward()
    for name, whole in adapters_of(one).items():
        halves = [adapters_of(two, mixin)[name] for mixin in ("lora", "second")]
        torch.testing.assert_close(torch.cat([h.A.grad for h in halves]), whole.A.grad, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(torch.cat([h.B.grad for h in halves], 1), whole.B.grad, rtol=1e-6, atol=1e-12)

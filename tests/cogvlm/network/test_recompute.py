"""What is run, recomputed and differentiated: only what a gradient flows through, whatever is checkpointed."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.network.recompute import lowest_trained_layer
from sat_lora.training.steps.loss import answer_loss_sum
from tests.support.tiny import fill_adapters, tiny_batch, tiny_model

VIT = "mixins.eva.vit_model"


def model_with(checkpoint=True, *, dtype=torch.float32, **fields):
    model = tiny_model(dtype, checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint).train()
    add_lora(model, LoraConfig(r=4, **fields))
    fill_adapters(model, std=0.1)
    return model


def runs_of_layers(model, batch):
    """How often each layer ran in a step, by its first linear: once, or twice where it was recomputed."""
    counts = Counter()
    for name, module in model.named_modules():
        layer, _, linear = name.rpartition(".attention.")
        if linear == "dense":
            module.register_forward_hook(lambda *args, layer=layer: counts.update([layer]))
    answer_loss_sum(model, batch).backward()
    return counts


def flops_of(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


CASES = {
    # which layers are recomputed: of the ViT, then of the language model
    "all-linear": (dict(), (2, 2), (2, 2)),
    "vit upper": (dict(target_modules=["vit-mlp"], layers_to_transform="vit:1"), (1, 2), (2, 2)),
    "projector": (dict(target_modules=["projector"]), (1, 1), (2, 2)),
    "language": (dict(target_modules=["language-mlp"]), (1, 1), (2, 2)),
    "language upper": (dict(target_modules=["language-mlp"], layers_to_transform="language:1"), (1, 1), (1, 2)),
    "expert upper": (dict(target_modules=["vision-expert-mlp"], layers_to_transform="language:1"), (1, 1), (1, 2)),
    "patch": (dict(target_modules=["patch-embedding"]), (2, 2), (2, 2)),
    "boi": (
        dict(target_modules=["language-mlp"], layers_to_transform="language:1", modules_to_save=["boi"]), (1, 1), (2, 2)
    ),
    "head": (dict(target_modules=["lm-head"]), (1, 1), (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("with_image", [(True, False), (False, False)], ids=["images", "text"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_without_a_gradient_runs_once(case, with_image):
    fields, vit, language = CASES[case]
    found = runs_of_layers(model_with(**fields), tiny_batch(with_image))
    assert tuple(found[f"{VIT}.transformer.layers.{i}"] for i in range(2)) == vit
    assert tuple(found[f"transformer.layers.{i}"] for i in range(2)) == language


@pytest.mark.parametrize("case", CASES)
def test_checkpointing_changes_no_gradient_by_a_bit(case):
    fields, batch = CASES[case][0], tiny_batch()
    results = []
    for checkpoint in (False, True):
        model = model_with(checkpoint, lora_dropout=0.1, **fields)
        torch.manual_seed(5)
        answer_loss_sum(model, batch).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in results[1].values())
    assert all(torch.equal(results[0][name], gradient) for name, gradient in results[1].items())


def test_a_vit_without_adapters_costs_its_forward_pass():
    """By the operations that are counted: its backward is none, checkpointed or not."""
    batch = tiny_batch((True, True))
    plain, checkpointed = (model_with(c, target_modules=["language-mlp"]) for c in (False, True))
    forward = flops_of(lambda: plain.mixins["eva"](batch["images"]))

    def backward_of_vit(model):
        with FlopCounterMode(display=False) as counter:
            answer_loss_sum(model, batch).backward()
        return sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith(".eva"))

    assert backward_of_vit(plain) == backward_of_vit(checkpointed) == forward


def test_a_tower_in_evaluation_mode_trains_all_the_same():
    """SAT's own checkpointing loses the gradients of such a tower's adapters."""
    results = []
    for checkpoint in (False, True):
        model = model_with(checkpoint)
        model.mixins["eva"].vit_model.eval()
        answer_loss_sum(model, tiny_batch()).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


def test_what_a_name_does_not_place_may_be_in_any_layer():
    model = tiny_model()
    model.requires_grad_(False)
    assert lowest_trained_layer(model) == float("inf")
    model.transformer.layers[1].mlp.dense_h_to_4h.weight.requires_grad_()
    assert lowest_trained_layer(model) == 1
    model.mixins["lm"].unknown = torch.nn.Parameter(torch.zeros(1))
    assert lowest_trained_layer(model) == 1
    model.mixins["eva"].vit_model.mixins["final"].unknown = torch.nn.Parameter(torch.zeros(1))
    assert lowest_trained_layer(model) == 1 and lowest_trained_layer(model.mixins["eva"].vit_model) == 0
    model.mixins["rotary"].prefix = torch.nn.Parameter(torch.zeros(1))
    assert lowest_trained_layer(model) == 0


def test_a_text_batch_runs_the_vit_on_nothing():
    """By the operations that are counted: as many as without the image side, and a blank image would cost more."""
    fields = dict(target_modules=["all-linear", "patch-embedding"])
    batch = tiny_batch((False, False))
    with_vit, without_vit = model_with(**fields), model_with(**fields)
    without_vit.mixins["eva"].forward = lambda images: without_vit.mixins["eva"].boi.expand(0, 11, -1)
    cost = [flops_of(lambda m=model: answer_loss_sum(m, batch).backward()) for model in (with_vit, without_vit)]
    assert cost[0] == cost[1]
    blank = {**batch, "images": torch.zeros(1, 3, 21, 21)}
    assert flops_of(lambda: answer_loss_sum(with_vit, blank).backward()) > 1.1 * cost[1]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields", [{}, dict(use_dora=True), dict(lora_dropout=0.5), dict(init_lora_weights="pissa")], ids=str
)
def test_nothing_of_the_image_side_misses_its_gradient_in_a_text_batch(checkpoint, dtype, fields):
    model = tiny_model(dtype, checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint).train()
    whole = ["linear_proj.norm1", "boi", "eoi", "position_embeddings", "word_embeddings"]
    targets = ["all-linear", "patch-embedding"] if "init_lora_weights" not in fields else ["all-linear"]
    add_lora(model, LoraConfig(r=4, target_modules=targets, modules_to_save=whole, bias="all", **fields))
    for images in (torch.zeros(0, 3, 21, 21), None):
        model.zero_grad()
        answer_loss_sum(model, {**tiny_batch((False, False)), "images": images}).backward()
        gradients = {name.replace("/", "."): p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        assert {name for name, gradient in gradients.items() if gradient.any()} == {
            name
            for name in gradients
            if "mixins.eva" not in name and "vision" not in name and (name[-2:] != ".A" or "pissa" in str(fields))
        }


def test_images_none_is_a_batch_of_no_images():
    """Without them in the graph, a rank whose batch has none would make other collectives than the rest."""
    model, calls = tiny_model().train(), []
    model.mixins["eva"].vit_model.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    batch = tiny_batch((False, False))
    for images in (None, batch["images"]):
        model.zero_grad()
        answer_loss_sum(model, {**batch, "images": images}).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert calls == [(0, 9, 48)] * 2

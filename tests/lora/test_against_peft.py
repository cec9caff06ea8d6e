"""Every variant against PEFT on plain torch layers, in float64: outputs, gradients, merged weights, beginnings."""

import peft
import pytest
import torch

from sat_lora import LoraConfig
from sat_lora.adapters.format import plain_config
from sat_lora.lora.targets import find_sites, plan
from tests.support.single_layer import (
    LAYERS,
    LOOKUP,
    NOT_PEFT,
    adapter_for,
    build_layer,
    copy_to_peft,
    inputs_for,
    peft_parameters,
    under_peft,
)

pytestmark = pytest.mark.usefixtures("single_process_group")

SAME = dict(rtol=1e-10, atol=1e-10)
VARIANTS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "dora and rslora": dict(use_dora=True, use_rslora=True),
}
BY_PEFT = [name for name in LAYERS if name not in NOT_PEFT]
CASES = [(layer, variant) for layer in BY_PEFT for variant in VARIANTS if not (layer in LOOKUP and "dora" in variant)]


def both(layer_name, seed: int | None = 3, dtype=torch.float64, **fields):
    """(layer, our adapter, PEFT's layer) with the same config; random values if there is a seed."""
    fields = dict(r=4, lora_alpha=6) | fields
    layer = build_layer(layer_name, dtype)
    ours, theirs = adapter_for(layer, LoraConfig(**fields), seed), under_peft(layer, **fields)
    assert ours.rank == fields["r"], "the bound lowered the rank; choose another"
    return layer, ours, theirs


def assert_same_outputs_and_gradients(layer, ours, theirs):
    results = []
    for parameters, run in (
        (dict(ours.named_parameters()), lambda x: ours(layer(x), x, layer)),
        (peft_parameters(theirs), theirs),
    ):
        x = inputs_for(layer)
        out = run(x)
        torch.manual_seed(9)
        (out * torch.randn_like(out)).sum().backward()
        gradients = [parameters[leaf].grad.flatten() for leaf in dict(ours.named_parameters())]
        results.append([out, *gradients, *([x.grad] if x.requires_grad else [])])
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, **SAME)


@pytest.mark.parametrize(("layer_name", "variant"), CASES)
def test_outputs_gradients_and_merged_weights_are_pefts(layer_name, variant):
    layer, ours, theirs = both(layer_name, **VARIANTS[variant])
    copy_to_peft(ours, theirs)
    assert_same_outputs_and_gradients(layer, ours, theirs)
    theirs.merge()
    torch.testing.assert_close(ours.merged_weight(layer), theirs.get_base_layer().weight, **SAME)


@pytest.mark.parametrize("layer_name", ["linear", "column", "row"])
@pytest.mark.parametrize("scheme", ["pissa", "olora"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_begins_from_the_weight_begins_and_trains_as_pefts(layer_name, scheme, variant):
    """PEFT writes the rest into the base; here the base stays and the pair's beginning is subtracted."""
    # PEFT begins in float32 alone; from there on both go on in float64.
    layer, ours, theirs = both(layer_name, None, torch.float32, init_lora_weights=scheme, **VARIANTS[variant])
    weight, start = layer.weight.clone(), peft_parameters(theirs)
    for leaf, parameter in start.items():
        torch.testing.assert_close(ours.get_parameter(leaf).view_as(parameter), parameter)
    torch.testing.assert_close(theirs.get_base_layer().weight, weight - ours.scale * ours.B @ ours.A)
    for module in (layer, ours, theirs):
        module.double()
    with torch.no_grad():
        theirs.get_base_layer().weight.copy_(layer.weight - ours.scale * ours.B @ ours.A)
    x = inputs_for(layer)
    if ours.magnitude_or_none is None:
        torch.testing.assert_close(ours(layer(x), x, layer), layer(x), **SAME)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.3 * torch.randn_like(parameter).abs()
    copy_to_peft(ours, theirs)
    assert_same_outputs_and_gradients(layer, ours, theirs)
    theirs.merge()
    torch.testing.assert_close(ours.merged_weight(layer), theirs.get_base_layer().weight, **SAME)
    assert torch.equal(layer.weight, weight.double())


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_what_is_saved_is_the_plain_pair_that_peft_converts_to(scheme, variant):
    """PEFT's conversion (save_pretrained with path_initial_model_for_weight_conversion) keeps [A, A0], [B, -B0]."""
    fields = dict(init_lora_weights=scheme, **VARIANTS[variant])
    _, ours, theirs = both("linear", None, torch.float32, **fields)
    start = {leaf: ours.get_parameter(leaf).detach().clone() for leaf in "AB"}
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += torch.randn_like(parameter)
    copy_to_peft(ours, theirs)
    delta = ours.delta()
    now = peft_parameters(theirs)
    torch.testing.assert_close(delta.a, torch.cat([now["A"], start["A"]]), **SAME)
    torch.testing.assert_close(delta.b, torch.cat([now["B"], -start["B"]], 1), **SAME)
    plain = plain_config(LoraConfig(r=4, lora_alpha=6, **fields))
    assert (plain.r, plain.init_lora_weights) == (8, "kaiming")
    assert plain.scale_for("layer", 8) == pytest.approx(ours.scale)


def test_the_randomised_svd_of_many_steps_is_the_exact_one():
    layer = build_layer("linear")
    u, _, vh = torch.linalg.svd(layer.weight, full_matrices=False)
    layer.weight.copy_(u @ torch.diag(2.0 ** -torch.arange(10.0, dtype=u.dtype)) @ vh)
    exact, many = (adapter_for(layer, LoraConfig(r=4, init_lora_weights=s)) for s in ("pissa", "pissa_niter_40"))
    torch.testing.assert_close(many.B @ many.A, exact.B @ exact.A, rtol=1e-6, atol=1e-6)


def test_orthogonal_factors_have_no_product_and_pefts_size():
    _, ours, theirs = both("linear", None, torch.float32, init_lora_weights="orthogonal")
    product = ours.B @ ours.A
    torch.testing.assert_close(product, torch.zeros_like(product), rtol=0, atol=1e-7)
    for leaf, parameter in peft_parameters(theirs).items():
        mine = ours.get_parameter(leaf).detach()
        assert torch.linalg.matrix_rank(mine, rtol=1e-4) == torch.linalg.matrix_rank(parameter, rtol=1e-4) == 2
        assert 0.5 < mine.std() / parameter.std() < 2


@pytest.mark.parametrize("scheme", ["kaiming", "gaussian"])
def test_drawn_factors_have_pefts_distribution(scheme):
    wide = torch.nn.Linear(4096, 64)
    for parameter in wide.parameters():
        parameter.requires_grad_(False)
    ours = adapter_for(wide, LoraConfig(r=16, init_lora_weights=scheme))
    theirs = peft_parameters(under_peft(wide, r=16, init_lora_weights=True if scheme == "kaiming" else scheme))
    assert not ours.B.any() and not theirs["B"].any()
    assert ours.A.std().item() == pytest.approx(theirs["A"].std().item(), rel=0.02)
    largest = [a.abs().max().item() for a in (ours.A, theirs["A"])]
    assert largest[0] == pytest.approx(largest[1], rel=0.02 if scheme == "kaiming" else 0.2)


@pytest.mark.parametrize("layer_name", LOOKUP)
def test_an_embedding_begins_as_pefts_with_a_zero(layer_name):
    _, ours, theirs = both(layer_name, seed=None)
    theirs = peft_parameters(theirs)
    assert not ours.A.any() and not theirs["A"].any()
    assert 0.7 < ours.B.std() < 1.3 and 0.7 < theirs["B"].std() < 1.3


class Tree(torch.nn.Module):
    """Linears with nested names."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.ModuleDict({"dense": torch.nn.Linear(40, 40), "query": torch.nn.Linear(40, 40)})
        self.mlp = torch.nn.ModuleDict({"dense": torch.nn.Linear(40, 40), "gate_proj": torch.nn.Linear(40, 40)})


@pytest.mark.parametrize(
    "patterns",
    [
        dict(rank_pattern={"attention.dense": 2, "dense": 8}, alpha_pattern={"gate_proj": 3}),
        dict(rank_pattern={"dense": 8, "attention.dense": 2}, alpha_pattern={"mlp.*": 5, "dense": 7}),
        dict(rank_pattern={r"mlp\.\w+": 3}, alpha_pattern={"query|gate_proj": 9}, use_rslora=True),
    ],
)
def test_rank_and_alpha_patterns_mean_what_they_mean_in_peft(patterns):
    tree = Tree()
    sites = find_sites(tree)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*sites], **patterns), tree)
    for name, target in plan(sites, {}, LoraConfig(r=4, lora_alpha=6, **patterns)).targets.items():
        theirs = tree.get_submodule(name)
        assert (target.rank, target.scale) == (theirs.r["default"], pytest.approx(theirs.scaling["default"])), name

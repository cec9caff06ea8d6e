"""Every variant against PEFT's on plain torch layers, in float64: outputs, all gradients, merged weights, beginnings."""

import pytest
import torch

from sat_lora import LoraConfig
from tests.single_layer import (
    CONV,
    LAYERS,
    LINEAR,
    LOOKUP,
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
CASES = [
    (layer, variant) for layer in LAYERS for variant in VARIANTS if not (layer in LOOKUP and variant.startswith("dora"))
]


def both(layer_name, seed=3, **fields):
    fields = dict(r=4, lora_alpha=6) | fields
    layer = build_layer(layer_name)
    ours = adapter_for(layer, LoraConfig(**fields, rank_pattern={"layer": fields["r"]}), seed)
    theirs = under_peft(layer, **fields)
    assert ours.rank == fields["r"], "the bound lowered the rank; choose another"
    return layer, ours, theirs


@pytest.mark.parametrize(("layer_name", "variant"), CASES)
def test_outputs_gradients_and_merged_weights_are_pefts(layer_name, variant):
    layer, ours, theirs = both(layer_name, **VARIANTS[variant])
    copy_to_peft(ours, theirs)
    results, x = [], inputs_for(layer)
    for parameters, run in (
        (dict(ours.named_parameters()), lambda x: ours(layer(x), x, layer)),
        (peft_parameters(theirs), theirs),
    ):
        out = run(x)
        torch.manual_seed(9)
        (out * torch.randn_like(out)).sum().backward()
        gradients = [parameters[leaf].grad.flatten() for leaf in dict(ours.named_parameters())]
        results.append([out, *gradients, *([] if x.grad is None else [x.grad])])
        x = inputs_for(layer)
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, **SAME)
    theirs.merge()
    torch.testing.assert_close(ours.merged_weight(layer), theirs.get_base_layer().weight, **SAME)


@pytest.mark.parametrize("layer_name", LINEAR[:1] + CONV)
@pytest.mark.parametrize("scheme", ["pissa", "olora"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_what_begins_from_the_weight_begins_and_trains_as_pefts(layer_name, scheme, variant):
    if layer_name in CONV:
        pytest.importorskip("peft")
    layer = build_layer(layer_name if layer_name in LINEAR else "linear")
    fields = dict(r=4, lora_alpha=6, init_lora_weights=scheme, **VARIANTS[variant])
    ours, theirs = adapter_for(layer, LoraConfig(**fields)), under_peft(layer, **fields)
    for leaf, parameter in peft_parameters(theirs).items():
        torch.testing.assert_close(ours.get_parameter(leaf), parameter, **SAME)

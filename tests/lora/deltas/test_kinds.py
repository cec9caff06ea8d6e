"""A kind of layer that somebody else adds takes adapters as the others do."""

import pytest
import torch
from torch import nn

from sat_lora import LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.adapters.merge import merged_tensor
from sat_lora.adapters.read import read_adapter
from sat_lora.lora.delta_hook import DeltaHook, DeltaState
from sat_lora.lora.deltas.kinds import KINDS, kind_of
from sat_lora.lora.deltas.layers import Kind
from sat_lora.lora.mixin import lora_mixins
from tests.support.single_layer import adapter_for
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


class TransposedLinear(nn.Module):
    """x W + b, as GPT-2's Conv1D: its weight is (in, out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class Transposed(Kind):
    name, layers = "transposed", (TransposedLinear,)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T


class DoubledLinear(nn.Linear):
    """Does more than an nn.Linear does, with the same parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Doubled(Kind):
    name, layers = "doubled", (DoubledLinear,)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for kind in (Transposed(), Doubled()):
        monkeypatch.setitem(KINDS, kind.name, kind)


def transposed_layer(dtype=torch.float64) -> TransposedLinear:
    torch.manual_seed(0)
    layer = TransposedLinear(torch.randn(6, 10, dtype=dtype), torch.randn(10, dtype=dtype))
    return layer.requires_grad_(False)


@pytest.mark.parametrize("use_dora", [False, True])
def test_its_output_is_that_of_the_merged_weight(use_dora):
    layer = transposed_layer()
    adapter = adapter_for(layer, LoraConfig(r=2, lora_alpha=3, use_dora=use_dora), seed=5)
    assert (adapter.A.shape, adapter.B.shape) == ((2, 6), (10, 2))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    adapted = adapter(layer(x), x, layer)
    merged = TransposedLinear(adapter.merged_weight(layer), layer.bias)
    assert not torch.allclose(adapted, layer(x), atol=0.1)
    torch.testing.assert_close(adapted, merged(x), rtol=1e-10, atol=1e-10)
    if not use_dora:
        torch.testing.assert_close(merged.weight, layer.weight + 1.5 * (adapter.B @ adapter.A).T)


def with_transposed_projector() -> nn.Module:
    """A tiny CogVLM whose projector has such a layer, of the same function."""
    model = tiny_model().eval()
    projector = model.mixins["eva"].linear_proj
    projector.gate_proj = TransposedLinear(projector.gate_proj.weight.detach().T.contiguous())
    return model


def test_it_is_adapted_saved_loaded_and_merged_in_a_model(tmp_path):
    model, batch = with_transposed_projector(), tiny_batch()
    plain = logits_of(model, batch)
    torch.testing.assert_close(plain, logits_of(tiny_model().eval(), batch))
    name = "mixins.eva.linear_proj.gate_proj"
    add_lora(model, LoraConfig(r=4, target_modules=[name]))
    assert torch.equal(logits_of(model, batch), plain)
    fill_adapters(model)
    adapted = logits_of(model, batch)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter")
    assert saved.layers[name].kind == "transposed"
    base = dict(with_transposed_projector().named_parameters())
    again = with_transposed_projector()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, batch), adapted)
    for mixin in lora_mixins(again).values():
        mixin.merge()
    torch.testing.assert_close(logits_of(again, batch), adapted, rtol=1e-4, atol=1e-5)
    merged = merged_tensor(f"{name}.weight", base, saved)
    torch.testing.assert_close(merged, again.get_submodule(name).weight, rtol=0, atol=0)


def test_a_subclass_of_a_known_layer_has_its_own_kind_and_others_have_theirs():
    class Other(nn.Linear):
        pass

    assert kind_of(DoubledLinear(3, 3)).name == "doubled"
    assert kind_of(nn.Linear(3, 3)).name == kind_of(Other(3, 3)).name == "linear"
    assert kind_of(nn.LayerNorm(3)) is None


def test_what_its_forward_does_is_not_left_out():
    """A product is made beside the layer only for kinds that say that this is all it does."""
    layer = DoubledLinear(6, 10).requires_grad_(False)
    adapter = adapter_for(layer, LoraConfig(r=2), seed=5)
    x, state = torch.randn(3, 6), DeltaState(fixed_order=False)
    expected = layer(x) + adapter.scale * x @ adapter.A.T @ adapter.B.T
    state.scope_is_open = True
    DeltaHook(state, adapter).attach(layer)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)

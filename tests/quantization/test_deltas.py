"""Deltas on quantised layers, against the same deltas on the same layers with the decoded weight: bit for bit."""

import copy

import pytest
import torch

from sat_lora import LoraConfig
from sat_lora.lora import delta_hook
from sat_lora.lora.delta_hook import DeltaHook, DeltaState
from sat_lora.quantization.config import NAMES
from sat_lora.quantized.quantized_weight import QuantizedWeight
from tests.support.quantized_layers import DTYPES, IN, LAYERS, counted_decoding, pair_of
from tests.support.single_layer import adapter_for

pytestmark = pytest.mark.usefixtures("single_process_group")
CONFIGS = {
    "plain": {},
    "rsLoRA": dict(use_rslora=True),
    "dropout": dict(lora_dropout=0.25),
    "DoRA": dict(use_dora=True),
    "DoRA and dropout": dict(use_dora=True, lora_dropout=0.25),
    "PiSSA": dict(init_lora_weights="pissa"),
    "PiSSA, approximated": dict(init_lora_weights="pissa_niter_4"),
    "OLoRA": dict(init_lora_weights="olora"),
    "LoRA-FA": dict(freeze_a=True),
    "another dtype": dict(adapter_dtype="float64"),
}


def hooked(layer, **fields):
    """The adapter of the layer, whose hook is attached in an open scope. A and B have values that both layers share."""
    adapter = adapter_for(layer, LoraConfig(r=4, lora_alpha=8, **fields))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in (adapter.A, adapter.B):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    state = DeltaState(fixed_order=False)
    state.scope_is_open = True
    DeltaHook(state, adapter.train()).attach(layer)
    return adapter


def results(layer, adapter, dtype) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    torch.manual_seed(11)  # of dropout
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.requires_grad}
    adapter.eval()
    with torch.no_grad():
        return {"y": y, "x": x.grad, "without grad": layer(x), **gradients}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["linear", "column", "row"])
def test_it_is_the_delta_on_the_decoded_weight(name, config, scheme, dtype):
    ours, theirs = (results(layer, hooked(layer, **CONFIGS[config]), dtype) for layer in pair_of(name, scheme, dtype))
    assert ours.keys() == theirs.keys()
    assert [leaf for leaf in ours if not torch.equal(ours[leaf], theirs[leaf])] == []


@pytest.mark.parametrize("name", LAYERS)
def test_every_linear_goes_directly_and_decodes_once_each_way(name, monkeypatch):
    layer, plain = pair_of(name, "nf4", torch.float32)
    adapter = hooked(layer)
    decodings = counted_decoding(monkeypatch)
    adapter.forward = lambda *args: pytest.fail("the adapter's module was called")
    for way in ("__torch_function__", "__torch_dispatch__"):  # half of what such a layer took the host
        monkeypatch.setattr(QuantizedWeight, way, lambda *args, way=way: pytest.fail(f"{way}: the long way round"))
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert len(decodings) == 2
    with torch.no_grad():
        layer(x)
    assert len(decodings) == 3
    assert hooked(plain) is not adapter


def test_no_tokens_decode_nothing(monkeypatch):
    layer, _ = pair_of("column", "nf4", torch.float32)
    adapter = hooked(layer)
    decodings = counted_decoding(monkeypatch)
    x = torch.randn(2, 0, IN, requires_grad=True)
    layer(x).sum().backward()
    assert not decodings and not adapter.A.grad.any() and not adapter.B.grad.any()


@pytest.mark.parametrize("scheme", NAMES)
def test_beside_others_at_work_on_the_layer_the_module_takes_it_and_fuses(scheme, monkeypatch):
    """A hook of somebody's sends the delta the second way; ZeRO-3 does so too."""
    monkeypatch.setattr(delta_hook, "quantized_weight_of", lambda layer: None)  # the direct way is not open
    pair = pair_of("row", scheme, torch.float32)
    decodings = counted_decoding(monkeypatch)
    ours, theirs = (results(layer, hooked(layer), torch.float32) for layer in pair)
    assert [leaf for leaf in ours if not torch.equal(ours[leaf], theirs[leaf])] == []
    assert len(decodings) == 3  # forward, backward, and the pass without grad: y's own backward is not taken


def test_a_bias_that_trains_gets_its_gradient():
    pair = pair_of("linear", "nf4", torch.float32)
    gradients = []
    for layer in pair:
        hooked(layer)
        layer.bias.requires_grad_(True)
        layer(torch.ones(3, IN, requires_grad=True)).square().sum().backward()
        gradients.append(layer.bias.grad)
    assert torch.equal(*gradients)


def test_a_copied_layer_has_its_own():
    layer, _ = pair_of("linear", "nf4", torch.float32)
    hooked(layer)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


@pytest.mark.parametrize("config", ["plain", "DoRA", "PiSSA"])
def test_the_merged_weight_is_that_of_the_decoded_one(config):
    layer, plain = pair_of("linear", "nf4", torch.float32)
    merged = [
        adapter_for(side, LoraConfig(r=4, **CONFIGS[config]), seed=2).merged_weight(side) for side in (layer, plain)
    ]
    assert torch.equal(*merged)

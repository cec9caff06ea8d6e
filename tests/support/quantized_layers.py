"""Layers with a quantised weight, and the same with the decoded one as a plain tensor: two that have to agree."""

import copy

import torch
from torch import nn

from sat_lora import quantize_model
from sat_lora._sat import ColumnParallelLinear, RowParallelLinear
from sat_lora.quantized.layers import put_quantized, quantized_weights
from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.quantized.schemes import SCHEMES
from tests.support.tiny import WIDE, tiny_model

IN, OUT = 128, 96
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "column": lambda: ColumnParallelLinear(IN, OUT, gather_output=False, stride=3),
    "column, gathered": lambda: ColumnParallelLinear(IN, OUT, gather_output=True, bias=False),
    "row": lambda: RowParallelLinear(IN, OUT, input_is_parallel=True, final_bias=True),
    "row, early bias": lambda: RowParallelLinear(IN, OUT, input_is_parallel=True, final_bias=False),
    "row, input whole": lambda: RowParallelLinear(IN, OUT, input_is_parallel=False),
}
DTYPES = (torch.float32, torch.bfloat16)


def pair_of(name: str, scheme: str, dtype: torch.dtype, *, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """(the layer with a quantised weight, the same with what that is decoded to), both frozen."""
    torch.manual_seed(seed)
    layer = LAYERS[name]().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1).requires_grad_(False)
    return quantized_pair(layer, scheme)


def quantized_pair(layer: nn.Module, scheme: str) -> tuple[nn.Module, nn.Module]:
    """The same of a layer."""
    plain = copy.deepcopy(layer)
    put_quantized(layer, QuantizedWeight.of(layer.weight, SCHEMES[scheme]))
    plain.weight.data = layer.weight.decoded()
    return layer, plain


def decoded_copy(model: nn.Module) -> nn.Module:
    """The model with plain weights, those that the quantised ones are decoded to."""
    plain = copy.deepcopy(model)
    for name, weight in quantized_weights(model):
        layer = plain.get_submodule(name)
        del layer._buffers["weight"]
        layer.register_parameter("weight", nn.Parameter(weight.decoded(), requires_grad=False))
    return plain


def quantized_tiny_model(scheme: str, dtype=torch.float32, **settings) -> nn.Module:
    """A tiny CogVLM with quantised linears, all of whose rows blocks of 64 divide."""
    model = tiny_model(dtype, config=WIDE, **settings)
    quantize_model(model, scheme=scheme)
    return model


def decoded_tiny_model(scheme: str, dtype=torch.float32, **settings) -> nn.Module:
    """The same with the decoded weights as plain ones, which it takes for the quantised base all the same."""
    return decoded_copy(quantized_tiny_model(scheme, dtype, **settings))


def counted_decoding(monkeypatch) -> list[QuantizedWeight]:
    """A list that gets each weight that is decoded from now on."""
    decodings = []
    decoded = QuantizedWeight.decoded

    def noted(weight):
        decodings.append(weight)
        return decoded(weight)

    monkeypatch.setattr(QuantizedWeight, "decoded", noted)
    return decodings

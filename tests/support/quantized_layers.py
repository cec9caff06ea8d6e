"""Layers with a quantised weight, and the same with the decoded one as a plain tensor: two that have to agree."""

import copy

import torch
from torch import nn

from sat_lora._sat import ColumnParallelLinear, RowParallelLinear
from sat_lora.quantization.weights.layers import put_quantized
from sat_lora.quantization.weights.quantized_weight import QuantizedWeight
from sat_lora.quantization.weights.schemes import SCHEMES

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


def counted_decoding(monkeypatch) -> list[tuple[int, ...]]:
    """A list that gets the shape of each weight that is decoded from now on."""
    decodings = []
    decoded = QuantizedWeight.decoded

    def noted(weight):
        decodings.append(tuple(weight.shape))
        return decoded(weight)

    monkeypatch.setattr(QuantizedWeight, "decoded", noted)
    return decodings

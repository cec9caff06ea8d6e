"""The weight of a layer, whole or quantised: put there, and found again."""

from collections.abc import Iterator

import torch
from torch import nn

from sat_lora.quantized.quantized_weight import QuantizedWeight


def put_quantized(layer: nn.Module, weight: QuantizedWeight) -> None:
    """Let the layer have a quantised weight, under the name that its parameter had.

    It is a buffer: DeepSpeed casts, broadcasts, partitions and exchanges parameters, which only a plain tensor bears,
    and leaves buffers as they are. In `state_dict` it has its place and its name.
    """
    layer._parameters.pop("weight", None)
    layer.register_buffer("weight", weight)


def quantized_weight_of(layer: nn.Module) -> QuantizedWeight | None:
    """Return the layer's quantised weight; None where it has none."""
    weight = layer._buffers.get("weight")
    return weight if isinstance(weight, QuantizedWeight) else None


def own_weight(layer: nn.Module) -> torch.Tensor | None:
    """Return the weight that the layer holds, a parameter or a quantised one; None where it is made of others."""
    weight = layer._parameters.get("weight")
    return quantized_weight_of(layer) if weight is None else weight


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield the name of each layer of the model that has a quantised weight, and that weight."""
    for name, layer in model.named_modules():
        weight = quantized_weight_of(layer)
        if weight is not None:
            yield name, weight


def plain_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors that hold memory: codes, scales and more of a quantised weight, else the tensor itself."""
    return tensor.parts if isinstance(tensor, QuantizedWeight) else (tensor,)


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor holds."""
    return sum(part.numel() * part.element_size() for part in plain_parts(tensor))

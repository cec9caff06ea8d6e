"""Quantising the base of a SAT model that is in memory."""

from functools import partial
from typing import Any

import torch
from torch import nn

from sat_lora.errors import ConfigError
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.live_base import identity_of_model, remember_base
from sat_lora.lora.mixin import lora_mixins, refuse_engine
from sat_lora.quantization.config import Quantization
from sat_lora.quantization.select import as_encoded, select_layers
from sat_lora.quantized.layers import put_quantized
from sat_lora.quantized.quantized_weight import QuantizedWeight


@torch.no_grad()
def quantize_model(
    model: nn.Module, quantization: Quantization | None = None, *, keep_originals: bool = False, **fields: Any
) -> list[str]:
    """Hold the weights of a SAT model's linears in fewer bits from now on; return the names of these layers.

    quantize_model(model, scheme="nf4", keep_modules=["vit-mlp"])      # then add_lora(model, ...)

    No module is replaced, and no name changes: `layer.weight` is a frozen QuantizedWeight. `fields` are those of
    Quantization, if none is given. keep_originals: the whole weights wait in host memory, for LoftQ. Every
    model-parallel rank calls it, and encodes its own slices. Raises ConfigError,
    with nothing changed, where the model has adapters or an engine already or a layer cannot be quantised.
    """
    quantization = quantization if quantization is not None else Quantization(**fields)
    refuse_engine(model)
    if lora_mixins(model):
        raise ConfigError("the model has adapters, which began on its whole weights; quantise it before add_lora")
    layers = select_layers(model, quantization)
    quantization = as_encoded(model, quantization)
    identity = identity_of_model(model)
    for name, layer in layers.items():
        weight = QuantizedWeight.of(layer.weight, quantization.weight_scheme, f"{name}.weight")
        if keep_originals:
            weight.original = partial(torch.clone, layer.weight.detach().to("cpu", copy=True))
        put_quantized(layer, weight)
    remember_quantization(model, identity, quantization)
    return [*layers]


def remember_quantization(model: nn.Module, identity: BaseIdentity, quantization: Quantization) -> None:
    """Let the model know which base it was before its weights were quantised, and how they were: for adapters of it."""
    remember_base(model, identity)
    model.base_quantization = quantization

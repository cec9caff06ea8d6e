"""One layer with its adapter, outside of any model, and the same under PEFT."""

import contextlib
import warnings

import peft
import torch
from torch import nn

from sat_lora import LoraConfig
from sat_lora._sat import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.targets import aim, find_sites

LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "linear without bias": lambda: nn.Linear(12, 10, bias=False),
    "column": lambda: ColumnParallelLinear(12, 10, gather_output=False),
    "column, gathered": lambda: ColumnParallelLinear(12, 10, gather_output=True),
    "row": lambda: RowParallelLinear(12, 10, input_is_parallel=True, final_bias=True),
    "row, early bias": lambda: RowParallelLinear(12, 10, input_is_parallel=True, final_bias=False),
    "row, input whole": lambda: RowParallelLinear(12, 10, input_is_parallel=False),
    "conv1d": lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1),
    "conv2d": lambda: nn.Conv2d(3, 10, (2, 3), stride=(2, 1), padding=(0, 1), bias=False),
    "conv2d, dilated": lambda: nn.Conv2d(3, 10, 3, padding=1, dilation=(1, 2)),
    "conv2d, reflecting": lambda: nn.Conv2d(3, 10, 3, padding=1, padding_mode="reflect"),
    "conv2d, grouped": lambda: nn.Conv2d(4, 10, 3, padding=1, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 10, 2),
    "embedding": lambda: nn.Embedding(30, 10),
    "vocab": lambda: VocabParallelEmbedding(30, 10),
}
LINEAR = [name for name in LAYERS if name.startswith(("linear", "column", "row"))]
CONV = [name for name in LAYERS if name.startswith("conv")]
LOOKUP = ["embedding", "vocab"]
NOT_PEFT = ["conv2d, dilated", "conv2d, reflecting", "conv2d, grouped"]  # PEFT 0.21.2 ignores what sets them apart


def build_layer(name: str, dtype=torch.float64, seed=0) -> nn.Module:
    """The layer with random weight and bias, frozen."""
    torch.manual_seed(seed)
    layer = LAYERS[name]().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter).requires_grad_(False)
    return layer


def inputs_for(layer: nn.Module, dtype=torch.float64, seed=1) -> torch.Tensor:
    """(batch, seq, in), (batch, channels, *size) or ids (batch, seq); requires grad if it can."""
    torch.manual_seed(seed)
    if hasattr(layer, "kernel_size"):
        return torch.randn(2, layer.in_channels, *[7, 6, 5][: len(layer.kernel_size)], dtype=dtype, requires_grad=True)
    if hasattr(layer, "num_embeddings"):
        return torch.randint(0, layer.num_embeddings, (2, 9))
    return torch.randn(2, 5, layer.weight.shape[1], dtype=dtype, requires_grad=True)


def adapter_for(layer: nn.Module, config: LoraConfig, seed: int | None = None) -> LoraAdapter:
    """The layer's adapter; with a seed its parameters get random values."""
    name, holder = getattr(layer, "site_name", "layer"), nn.Module()
    holder.add_module(name, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rank bound, on sizes as small as these
        target = aim(find_sites(holder)[name], config)
    dtype = getattr(torch, config.adapter_dtype) if config.adapter_dtype else layer.weight.dtype
    adapter = LoraAdapter(target, config, dtype, layer.weight.device)
    adapter.reset_parameters(layer)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter.trainable():
        parameter.requires_grad_(True)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for leaf, parameter in adapter.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise.abs() + 0.5 if leaf == "magnitude" else noise)
    return adapter.eval()


def under_peft(layer: nn.Module, **fields) -> nn.Module:
    """PEFT's LoRA around a plain torch layer with the same weight (and bias) as `layer`."""
    plain = as_torch_layer(layer)
    holder = nn.Module()
    holder.layer = plain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["layer"], **fields), holder)
    return holder.layer.eval()


def as_torch_layer(layer: nn.Module) -> nn.Module:
    """torch's own layer with the weights of a SAT one; a copy of any other."""
    weight = layer.weight.detach()
    if hasattr(layer, "num_embeddings"):
        plain = nn.Embedding(*weight.shape, dtype=weight.dtype)
    elif hasattr(layer, "kernel_size"):
        options = {
            k: getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        }
        bias = layer.bias is not None
        plain = type(layer)(layer.in_channels, layer.out_channels, bias=bias, dtype=weight.dtype, **options)
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=weight.dtype)
    plain.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
    return plain


def peft_parameters(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's A, B and magnitude by our names, with PEFT's shapes."""
    if wrapped.lora_embedding_A:
        return {"A": wrapped.lora_embedding_A["default"], "B": wrapped.lora_embedding_B["default"]}
    found = {"A": wrapped.lora_A["default"].weight, "B": wrapped.lora_B["default"].weight}
    with contextlib.suppress(KeyError):
        found["magnitude"] = wrapped.lora_magnitude_vector["default"].weight
    return found


def copy_to_peft(adapter: LoraAdapter, wrapped: nn.Module) -> None:
    with torch.no_grad():
        for leaf, parameter in peft_parameters(wrapped).items():
            parameter.copy_(adapter.get_parameter(leaf).view(parameter.shape))

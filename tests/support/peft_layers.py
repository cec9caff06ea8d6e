"""Ways to bring PEFT to SAT's linears: its own dispatch, its custom modules, its Megatron layers, and hooks."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import peft
import torch
from peft.tuners import lora
from torch import nn

from sat_lora._sat import BaseMixin, BaseModel, ColumnParallelLinear, RowParallelLinear, mpu
from sat_lora.parallel.sharding import REPLICATED, Sharding, sharding_of

PARALLEL = (ColumnParallelLinear, RowParallelLinear)


class LocalSizes(lora.Linear):
    """PEFT's LoRA on what a rank holds of a SAT linear: A and B have the sizes of its part of the weight."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        out_features, in_features = module.weight.shape
        return in_features, out_features


class ParallelLora(LocalSizes):
    """PEFT's LoRA on a SAT linear that may be cut: what a custom module of PEFT needs to be right on several ranks.

    A column-parallel layer's A is whole and its B cut, so the gradient of A x is summed over the ranks. A row-parallel
    layer's A is cut and its B whole, so A x itself is summed.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output (..., out of this rank) with the deltas of the active adapters in it."""
        base = self.get_base_layer()
        y = base(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            projected = self.lora_A[name](self.lora_dropout[name](x))
            if isinstance(base, RowParallelLinear):
                delta = self.lora_B[name](mpu.reduce_from_model_parallel_region(projected))
            else:
                delta = self.lora_B[name](mpu.copy_to_model_parallel_region(projected))
                if base.gather_output:
                    delta = mpu.gather_from_model_parallel_region(delta)
            y = y + self.scaling[name] * delta
        return y


def shardings_under_peft(base: nn.Module) -> dict[str, Sharding]:
    """Return how A and B of `ParallelLora` are cut over the model-parallel ranks."""
    weight = sharding_of(base, "weight")
    return {"A": weight if weight.dim == 1 else REPLICATED, "B": weight if weight.dim == 0 else REPLICATED}


def peft_config(targets: Iterable[str] | str, custom: type | None = None, **fields: Any) -> peft.LoraConfig:
    """Return a config of PEFT, which takes `custom` for SAT's parallel linears where that is given."""
    fields = {"r": 4, "lora_alpha": 8, **fields}
    config = peft.LoraConfig(target_modules=targets if isinstance(targets, str) else [*targets], **fields)
    if custom is not None:
        config._register_custom_module(dict.fromkeys(PARALLEL, custom))
    return config


def inject(config: peft.PeftConfig, model: nn.Module) -> nn.Module:
    """Return the model with PEFT's layers in it, which were put there without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.inject_adapter_in_model(config, model)


def pairs_under_peft(model: nn.Module) -> dict[str, lora.LoraLayer]:
    """Return PEFT's layers by the name that their base layer had."""
    return {name: module for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}


def linears_of(model: nn.Module) -> list[str]:
    """Return the names of all linears but the language model's head."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *PARALLEL)) and not name.endswith("lm_head")
    ]


@contextmanager
def sat_as_megatron(tensor_parallel: Any) -> Iterator[None]:
    """Inside, `import megatron.core` gives a module whose `tensor_parallel` is that; PEFT takes no other name."""
    names = ("megatron", "megatron.core")
    before = {name: sys.modules.get(name) for name in names}
    package, core = map(ModuleType, names)
    core.tensor_parallel = tensor_parallel
    package.core = core
    sys.modules.update(zip(names, (package, core)))
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


class MegatronArguments(ModuleType):
    """SAT's parallel linears, which PEFT builds with Megatron's arguments."""

    class ColumnParallelLinear(ColumnParallelLinear):
        def __init__(self, *, skip_bias_add: bool = False, init_method: Any = None, config: Any = None, **fields: Any):
            super().__init__(**fields)

    class RowParallelLinear(RowParallelLinear):
        def __init__(self, *, skip_bias_add: bool = False, init_method: Any = None, config: Any = None, **fields: Any):
            super().__init__(**fields)


class StandIn(nn.Linear):
    """A layer as PEFT's tuners want it: a linear with that layer's weight and bias, and the layer's own forward."""

    def __init__(self, layer: nn.Module):
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.weight.shape
        self.weight = layer.weight
        self.bias = layer.bias
        self.run = lambda x: type(layer).forward(layer, x)

    def hide_parameters(self) -> None:
        """Keep weight and bias as plain attributes: as parameters they stand in the model's state a second time."""
        self.__dict__.update(self._parameters)
        self._parameters.clear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


class PeftMixin(BaseMixin):
    """Layers of PEFT's tuners in the forward of a SAT model's layers: nothing is replaced, no name changes."""

    def __init__(self, model: BaseModel, config: peft.PeftConfig, names: Iterable[str]):
        super().__init__()
        layers = {name.replace(".", "/"): model.get_submodule(name) for name in names}
        config.target_modules = [*layers]
        model.requires_grad_(False)
        self.tuners = inject(config, nn.ModuleDict({key: StandIn(layer) for key, layer in layers.items()}))
        for key, layer in layers.items():
            self.tuners[key].get_base_layer().hide_parameters()
            layer.forward = self.tuners[key].__call__


def plain_linear(layer: nn.Module) -> nn.Linear:
    """Return torch's linear with a copy of the layer's weight, for a layer without bias."""
    out_features, in_features = layer.weight.shape
    plain = nn.Linear(in_features, out_features, bias=False, dtype=layer.weight.dtype)
    plain.load_state_dict({"weight": layer.weight.detach().clone()})
    return plain.requires_grad_(False)

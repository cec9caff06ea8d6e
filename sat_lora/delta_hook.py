"""The forward hook that adds a delta to its layer's output.

Two ways. The direct one is for what nearly every layer of a run is: a frozen linear, a plain pair A and B, one dtype,
and nobody else at work on layer or adapter. It calls no module and opens no context, because at 576 linears each
microsecond of Python shows in a training step. Every other case goes through the adapter as a module: ZeRO-3, which
gathers parameters where a module is called; DoRA and PiSSA; autocast; convolutions; other hooks.

What an adapter is decides once whether it may go the direct way; what can change around it is compared by identity.
"""

import copy
import weakref

import torch
from torch import nn

from sat_lora.adapter import LoraAdapter
from sat_lora.errors import ConfigError
from sat_lora.functional import RandomDropout, add_delta, add_delta_in_place
from sat_lora.merging import MergedWeights


class DeltaState:
    """What the hooks of one mixin share. No nn.Module, since setting an attribute on one takes microseconds."""

    __slots__ = ("enabled", "fixed_order", "merged", "scale", "scope_is_open")

    def __init__(self, *, fixed_order: bool):
        self.fixed_order = fixed_order
        self.scope_is_open = False
        """Whether one of SAT's hooks runs that the mixin is in."""
        self.enabled = True
        self.merged: MergedWeights | None = None
        self.scale = 1.0


class DeltaHook:
    """Registered on one layer. Holds its adapter weakly, so that a deleted mixin is freed."""

    def __init__(self, state: DeltaState, adapter: LoraAdapter):
        self._state, self._adapter = state, weakref.ref(adapter)
        self._dropout = RandomDropout(adapter.dropout) if adapter.dropout else None
        is_plain = type(adapter).forward is LoraAdapter.forward and adapter.is_plain and not state.fixed_order
        self._layer_types = adapter.kind.layers if is_plain else ()

    def __call__(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        state, adapter = self._state, self._adapter()
        if not state.scope_is_open or not state.enabled or state.merged is not None or adapter is None:
            return None
        x = args[0]
        if not self._goes_directly(adapter, layer, x, output):
            return self._through_adapter(adapter, layer, x, output)
        parameters, layout = adapter._parameters, adapter.layout
        dropout = self._dropout if adapter.training else None
        a, b, scale = parameters["A"], parameters["B"], adapter.scale * state.scale
        if torch.is_grad_enabled():
            return add_delta(output, x, a, b, dropout, scale, layout, layer._parameters["weight"])
        add_delta_in_place(output, x, a, b, dropout, scale, layout)
        return None

    def _goes_directly(self, adapter: LoraAdapter, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether the output is x W^T as it stands, W frozen and whole, and all that is needed has one dtype.

        Reads nn.Module's own dictionaries, since `layer.weight` takes a detour in Python.
        """
        if type(layer) not in self._layer_types:  # a subclass, or one that torch's parametrize has made
            return False
        dtype = x.dtype
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        return (
            weight is not None
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not hasattr(weight, "ds_id")  # ZeRO-3
            and len(layer._forward_hooks) == 1
            and not adapter._forward_hooks
            and not adapter._forward_pre_hooks
            and weight.dtype is dtype
            and output.dtype is dtype  # another one under autocast
            and adapter._parameters["A"].dtype is dtype
            and output.is_contiguous()
        )

    def _through_adapter(self, adapter: LoraAdapter, layer: nn.Module, x, output) -> torch.Tensor:
        state = self._state
        if state.fixed_order and torch.is_grad_enabled() and not adapter.in_graph:
            raise ConfigError(
                f"fixed_order: {adapter.name} ran outside of layer {adapter.target.site.layer}, to which its name puts "
                "it, so its gradient has no place in the order; leave it out with exclude_modules"
            )
        output_is_untouched = next(iter(layer._forward_hooks.values())) is self
        return adapter(output, x, layer, state.scale, output_is_untouched)

    def __deepcopy__(self, memo: dict) -> "DeltaHook":
        """A copied model's hook belongs to the copied adapter."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        adapter = self._adapter()
        copied._state = copy.deepcopy(self._state, memo)
        copied._adapter = self._adapter if adapter is None else weakref.ref(copy.deepcopy(adapter, memo))
        return copied

"""Where the delta of one layer is added: in its `forward`, or in a hook behind it.

A mixin sets `layer.forward` on the layer itself, for as long as the mixin is there; the layer's class, its name and its
parameters stay what they were, and hooks run around it as around any forward. Two ways lead through it. The direct one
is for what nearly every layer of a run is: a frozen linear, a plain pair A and B, one dtype. It makes the layer's own
product and the delta in one autograd Function and calls nothing of SAT's or of the adapter's, because at 576 linears
each microsecond of Python shows in a training step. Every other case runs the layer as its class says and then the
adapter as a module: ZeRO-3, which gathers parameters where a module is called; DoRA and PiSSA; autocast; convolutions.

A layer on which others were at work first, by a hook or by a forward of their own, gets a hook behind theirs: they see
the base's output, and the delta goes the second way.

What an adapter is decides once whether it may go the direct way; what can change around it is compared by identity.
"""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sat_lora.errors import ConfigError
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.deltas.low_rank import RandomDropout, adapted_linear, add_delta, add_delta_in_place, product_of
from sat_lora.lora.deltas.merging import MergedWeights
from sat_lora.quantized.layers import quantized_weight_of


class DeltaState:
    """What the hooks of one mixin share. It is no nn.Module, since setting an attribute on one takes microseconds."""

    __slots__ = ("enabled", "fixed_order", "merged", "scale", "scope_is_open")

    def __init__(self, *, fixed_order: bool):
        self.fixed_order = fixed_order
        self.scope_is_open = False
        """Whether one of SAT's hooks runs that the mixin is in."""
        self.enabled = True
        self.merged: MergedWeights | None = None
        self.scale = 1.0


class DeltaHook:
    """Adds the delta of one layer. It holds layer and adapter weakly, so that a deleted mixin is freed."""

    def __init__(self, state: DeltaState, adapter: LoraAdapter):
        self._state = state
        self._adapter = weakref.ref(adapter)
        self._layer: Callable[[], nn.Module] = lambda: None
        """The layer, which is there whenever its forward runs; None before `attach`, and once it is freed."""
        self._dropout = RandomDropout(adapter.dropout) if adapter.dropout else None
        is_plain = type(adapter).forward is LoraAdapter.forward and adapter.is_plain and not state.fixed_order
        self._layer_types = adapter.kind.layers if is_plain else ()
        # A row-parallel layer sums over the ranks, and may add its bias to the sum.
        self._is_one_product = adapter.kind.cut != "in" or adapter.layout.mp_size == 1
        self._may_add_bias = adapter.kind.cut == "in"
        self.on_entry: Callable[[], object] | None = None
        """Called before each forward of the layer that this is the forward of: cheaper than a hook of torch's."""

    def attach(self, layer: nn.Module) -> Callable[[], None]:
        """Add the delta to that layer's output from now on; return what takes it away again."""
        self._layer = weakref.ref(layer)
        if layer._forward_hooks or "forward" in layer.__dict__:
            remove: Callable[[], None] = layer.register_forward_hook(self._behind).remove
            return remove
        layer.forward = self
        return partial(_take_away, self._layer, weakref.ref(self))

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output (..., out) with the delta in it; called in place of the layer's `forward`."""
        if self.on_entry is not None:
            self.on_entry()
        state = self._state
        adapter = self._adapter()
        layer = self._layer()
        if not state.scope_is_open or not state.enabled or state.merged is not None or adapter is None:
            return type(layer).forward(layer, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if not self._goes_directly(adapter, layer, x):
            return self._through_adapter(adapter, layer, x, type(layer).forward(layer, *args, **kwargs), True)
        layer_parameters = layer._parameters
        weight = layer_parameters.get("weight")
        if weight is None:
            weight = layer._buffers["weight"]
        bias = layer_parameters["bias"]
        added_bias = None
        if self._may_add_bias and layer.final_bias:
            added_bias = bias
            bias = None
        dropout = self._dropout if adapter.training else None
        adapter_parameters = adapter._parameters
        a = adapter_parameters[adapter.leaves[0]]
        b = adapter_parameters[adapter.leaves[1]]
        scale = adapter.scale * state.scale
        layout = adapter.layout
        if torch.is_grad_enabled():
            if self._is_one_product:
                return adapted_linear(x, weight, bias, added_bias, a, b, dropout, scale, layout)
            product = type(layer).forward(layer, x.detach())
            return add_delta(product, x, a, b, dropout, scale, layout, weight)
        y = product_of(x, weight, bias, added_bias) if self._is_one_product else type(layer).forward(layer, x)
        add_delta_in_place(y, x, a, b, dropout, scale, layout)
        return y

    def _behind(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Return the layer's output with the delta in it, None if there is none to add: a forward hook of torch's."""
        state = self._state
        adapter = self._adapter()
        if not state.scope_is_open or not state.enabled or state.merged is not None or adapter is None:
            return None
        return self._through_adapter(adapter, layer, args[0], output, False)

    def _goes_directly(self, adapter: LoraAdapter, layer: nn.Module, x: torch.Tensor) -> bool:
        """Return whether the layer makes a product with a frozen W that is here, and all that is needed has one dtype.

        It reads nn.Module's own dictionaries, since `layer.weight` takes a detour in Python.
        """
        if type(layer) not in self._layer_types:  # a subclass, or one that torch's parametrize has made
            return False
        dtype = x.dtype
        weight = layer._parameters.get("weight")
        bias = layer._parameters.get("bias")
        if weight is not None:
            is_frozen = not weight.requires_grad and not hasattr(weight, "ds_id")  # ZeRO-3
            weight_dtype = weight.dtype
        else:
            quantized = quantized_weight_of(layer)
            if quantized is None:
                return False
            is_frozen = not hasattr(adapter._parameters["A"], "ds_id")  # ZeRO-3, in which such a W has none
            weight_dtype = quantized.decoded_dtype
        return (
            is_frozen
            and (bias is None or not bias.requires_grad)
            and not adapter._forward_hooks
            and not adapter._forward_pre_hooks
            and weight_dtype is dtype
            and adapter._parameters[adapter.leaves[0]].dtype is dtype
            and not torch._C._is_any_autocast_enabled()
        )

    def _through_adapter(
        self, adapter: LoraAdapter, layer: nn.Module, x: torch.Tensor, output: torch.Tensor, is_untouched: bool
    ) -> torch.Tensor:
        state = self._state
        if state.fixed_order and torch.is_grad_enabled() and not adapter.in_graph:
            raise ConfigError(
                f"fixed_order: {adapter.name} ran outside of layer {adapter.target.site.layer}, to which its name puts "
                "it, so its gradient has no place in the order; leave it out with exclude_modules"
            )
        return adapter(output, x, layer, state.scale, is_untouched)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeltaHook":
        """Return the hook of a copied model, which belongs to the copied layer and adapter."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        adapter = self._adapter()
        layer = self._layer()
        copied.on_entry = None
        copied._state = copy.deepcopy(self._state, memo)
        copied._adapter = self._adapter if adapter is None else weakref.ref(copy.deepcopy(adapter, memo))
        copied._layer = self._layer if layer is None else weakref.ref(copy.deepcopy(layer, memo))
        return copied


def has_adapter(layer: nn.Module) -> bool:
    """Return whether the delta of a mixin that is still there is added to the layer's output."""
    hooks = [layer.__dict__.get("forward"), *(getattr(h, "__self__", None) for h in layer._forward_hooks.values())]
    return any(isinstance(hook, DeltaHook) and hook._adapter() is not None for hook in hooks)


def _take_away(layer: Callable[[], nn.Module | None], hook: Callable[[], DeltaHook | None]) -> None:
    """Let the layer have the forward of its class again.

    Both arguments are weak references, for this waits as long as the mixin lives. A forward that somebody has set over
    the hook stays: without an adapter the hook is the layer's own forward.
    """
    live_layer = layer()
    live_hook = hook()
    if live_layer is not None and live_hook is not None and live_layer.__dict__.get("forward") is live_hook:
        del live_layer.forward

"""One order of gradients on every rank, on models whose graph depends on the data.

ZeRO fills its buckets in the order in which gradients arrive. A model that skips an expert without tokens, or the
vision transformer without images, makes them arrive in another order on a rank whose batch differs, or not at all.

So parameters enter the graph at fixed places. When a layer begins, its input passes through a chain of identities, one
for each adapter parameter of the layer, and deltas use what comes out of them:

    (x, P1) -> (x, P1')    (x, P2) -> (x, P2')    ...

In backward an identity runs after everything that used its P', if anything did, and after the next one of the chain.
The gradients of a layer therefore arrive there, in the order of the chain and none missing: zeros where nothing used
P'. Being inside the layer, the chain is made anew when an activation checkpoint is recomputed.
"""

from collections.abc import Callable, Iterable

import torch
from torch.autograd.function import FunctionCtx

from sat_lora.lora.adapter import LoraAdapter


class _PassBoth(torch.autograd.Function):
    """Identity on two tensors, whose gradients leave together."""

    @staticmethod
    def forward(ctx: FunctionCtx, carrier: torch.Tensor, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return carrier.detach(), parameter.detach()  # a view could not be changed in place by the model

    @staticmethod
    def backward(
        ctx: FunctionCtx, carrier_gradient: torch.Tensor, parameter_gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return carrier_gradient, parameter_gradient


def chained(carrier: torch.Tensor, adapters: Iterable[LoraAdapter], *, use: bool = True) -> torch.Tensor:
    """Return `carrier`, in its shape, after the chain over the adapters' parameters.

    use: whether the adapters' deltas take what comes out of the chain.
    """
    for adapter in adapters:
        for leaf, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                carrier, alias = _PassBoth.apply(carrier, parameter)
                if use:
                    adapter.in_graph[leaf] = alias
    return carrier


class GradientOrder:
    """Chains the adapters of one SAT model's mixin, layer by layer; those outside of layers where the words enter."""

    def __init__(self, adapters: Iterable[LoraAdapter], inner: Callable[[], Iterable["GradientOrder"]]):
        """Sort the adapters by their layer.

        inner: the orders of SAT models inside this one, which it may run or not when it makes its embeddings.
        """
        self._by_layer: dict[int | None, list[LoraAdapter]] = {}
        for adapter in adapters:
            self._by_layer.setdefault(adapter.target.site.layer, []).append(adapter)
        self._inner = inner
        self._runs = 0

    def enter_layer(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's input, to be used in place of `x`."""
        self._forget()
        if not torch.is_grad_enabled():
            return x
        return chained(x, self._by_layer.get(number, ()))

    def embed(self, make_embeddings: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what `make_embeddings` gives, with a chain of what lies outside of layers, and of inner models that
        did not run.
        """
        self._forget(everything=True)
        self._runs += 1
        if not torch.is_grad_enabled():
            return make_embeddings()
        runs = {order: order._runs for order in self._inner()}
        device = next((adapter.A.device for layer in self._by_layer.values() for adapter in layer), None)
        carrier = chained(torch.zeros((), device=device), self._by_layer.get(None, ()))
        embeddings = make_embeddings()
        for order, before in runs.items():
            if order._runs == before:
                carrier = chained(carrier, order._in_order_of_use(), use=False)
        return embeddings + carrier.to(embeddings.dtype)

    def _in_order_of_use(self) -> list[LoraAdapter]:
        numbers = sorted(self._by_layer, key=lambda number: -1 if number is None else number)
        return [adapter for number in numbers for adapter in self._by_layer[number]]

    def _forget(self, *, everything: bool = False) -> None:
        """Let go of the graph of layers that are done."""
        for number, adapters in self._by_layer.items():
            if everything or number is not None:
                for adapter in adapters:
                    adapter.in_graph.clear()

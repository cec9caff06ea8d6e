"""Activation checkpointing of the layers that have something to differentiate, and of no other.

SAT 0.4.12 makes the embeddings of every checkpointed transformer ask for a gradient, since reentrant checkpointing
loses those of the parameters where no input asks for one. So a vision transformer without adapters, and the frozen
layers below the lowest adapter, are recomputed and differentiated for nothing. Here a layer is checkpointed if
gradients flow through it; the others run once, and autograd keeps nothing of them.
"""

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_in_one_graph
from torch.utils.checkpoint import set_checkpoint_early_stop

from sat_lora._sat import BaseModel, checkpoint

_ADAPTER = re.compile(r"mixins\.[^.]+\.adapters\.(?:mixins\.eva\.vit_model\.)?")  # then comes the adapted layer's name
_LAYER = re.compile(r"(?:transformer\.layers|mixins\.(?:mlp|rotary)\.\w+)\.(\d+)\.")
_BEFORE_LAYERS = re.compile(r"mixins\.(?:eva|encoder)\.|transformer\.word_embeddings\.")
_ENCODER_BLOCK = re.compile(r"mixins\.encoder\.vit\.model\.blocks\.(\d+)\.")
_AFTER_LAYERS = re.compile(r"mixins\.lm\.|transformer\.final_layernorm\.")

Layer = Callable[..., torch.Tensor]
"""What gives hidden states for hidden states, a mask, and other tensors through which gradients flow."""


class LayerCheckpointing:
    """Activation checkpointing of a SAT model's layers, in the place of SAT's own, whose switch it takes over."""

    def __init__(self, model: BaseModel):
        self.active = model.transformer.checkpoint_activations
        self._lowest = 0.0
        model.transformer.checkpoint_activations = False

    def run(
        self,
        layer: Layer,
        number: int,
        model: BaseModel,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        *more: torch.Tensor,
    ):
        """Return `layer(hidden_states, mask, *more)`, recomputed in backward if a gradient flows through it."""
        if not (self.active and torch.is_grad_enabled()):
            return layer(hidden_states, mask, *more)
        if not any(tensor.requires_grad for tensor in (hidden_states, *more)):
            if number == 0:
                self._lowest = lowest_trained_layer(model)
            if number < self._lowest:
                return layer(hidden_states, mask, *more)
            hidden_states = hidden_states.detach().requires_grad_()
        return recompute_layer(layer, hidden_states, mask, *more)


def lowest_trained_layer(model: nn.Module) -> float:
    """Return the number of the first layer that holds something trainable; infinity if none does.

    What comes before the layers trains through their input. What the names do not place, a mixin of somebody else's,
    may be used in any layer: that is 0.
    """
    return min((_layer_of(name) for name, p in model.named_parameters() if p.requires_grad), default=float("inf"))


def lowest_trained_block(model: nn.Module) -> float:
    """Return the number of the first block of a second vision encoder that holds something trainable, see above."""
    names = (_ADAPTER.sub("", name.replace("/", ".")) for name, p in model.named_parameters() if p.requires_grad)
    blocks = (match for match in map(_ENCODER_BLOCK.match, names) if match is not None)
    return min((int(match[1]) for match in blocks), default=float("inf"))


def recompute_layer(layer: Layer, *inputs: torch.Tensor) -> torch.Tensor:
    """Return `layer(*inputs)`, recomputed in backward; some input has to ask for a gradient."""
    return checkpoint(layer, *inputs)


def _layer_of(name: str) -> float:
    name = _ADAPTER.sub("", name.replace("/", "."))
    layer = _LAYER.match(name)
    if layer is not None:
        return int(layer[1])
    return float("inf") if _BEFORE_LAYERS.match(name) or _AFTER_LAYERS.match(name) else 0


def recompute_rows(work: Callable[..., torch.Tensor], *args) -> torch.Tensor:
    """Return `work(*args)`, recomputed in backward, as one of several parts of one tensor.

    Not reentrant: a parameter that several parts use gets one gradient, the sum, when ZeRO counts on one. To its end,
    since ZeRO-3's hooks gather and release in pairs.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint_in_one_graph(work, *args, use_reentrant=False)

"""Activation checkpointing of the layers that have something to differentiate, and of no other.

SAT 0.4.12 makes the embeddings of every checkpointed transformer ask for a gradient, since reentrant checkpointing
loses those of the parameters where no input asks for one. So a vision transformer without adapters, and the frozen
layers below the lowest adapter, are recomputed and differentiated for nothing. Here a layer is checkpointed if
gradients flow through it; the others run once, and autograd keeps nothing of them.

Checkpointing keeps the input of each layer until backward comes to it, and that may wait in host memory: SAT's function
is given in its place a tensor of the same shape that takes the memory of one element, and the layer begins by
exchanging it for the input: the one at hand in forward, in backward the copy that went to the host meanwhile. Copies
are exact, and so is everything that is computed of them.

Not by DeepSpeed 0.19.8's `cpu_checkpointing`: it empties whatever tensor of floats the layer is given, a mask that the
next layer is given as well and hidden states that somebody else holds among them. Not by torch's `save_on_cpu`:
DeepSpeed's function, which SAT checkpoints with on CUDA, keeps its inputs where saved-tensor hooks do not see them.
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
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
        self.from_host = False
        """Whether the layers' inputs wait for backward in host memory."""
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
        if self.from_host:
            return checkpoint_from_host(checkpoint, layer, hidden_states, mask, *more)
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


class HostCopy:
    """A copy of a tensor in host memory, made beside what the device computes; of a tensor in it, the tensor itself."""

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, tensor: torch.Tensor):
        """Begin to copy; the tensor's memory is free again once that is done and nobody else has it."""
        self._device = tensor.device
        self._copied: torch.cuda.Event | None = None
        self._content = tensor
        if tensor.is_cuda:
            stream = self._streams.get(tensor.device)
            if stream is None:
                stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            self._content = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            with torch.cuda.stream(stream):
                self._content.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            self._copied = stream.record_event()

    def on_device(self) -> torch.Tensor:
        """Return the tensor again, on its device."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return self._content.to(self._device, non_blocking=True)


class _Place:
    """Where the input of one layer is."""

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor there: itself for the one who takes it first, a copy for all others."""
        self._at_hand: torch.Tensor | None = tensor
        self._copy = HostCopy(tensor)

    def take(self) -> torch.Tensor:
        """Return the tensor, on its device."""
        at_hand = self._at_hand
        self._at_hand = None
        return self._copy.on_device() if at_hand is None else at_hand


class _Leave(torch.autograd.Function):
    """Leaves a tensor at a place, and gives what stands for it: of its shape, with the memory of one element."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: torch.Tensor, place: _Place) -> torch.Tensor:
        place.put(tensor.detach())
        return tensor.new_zeros(1).expand(tensor.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Fetch(torch.autograd.Function):
    """Gives the tensor that was left at a place for what stands for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, stand_in: torch.Tensor, place: _Place) -> torch.Tensor:
        return place.take()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def checkpoint_from_host(
    checkpoint: Callable[..., Any], layer: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any
) -> Any:
    """Return `checkpoint(layer, hidden_states, *args)`, the hidden states of which wait for backward in host memory."""
    place = _Place()

    def begin(stand_in: torch.Tensor, *more: Any) -> torch.Tensor:
        return layer(_Fetch.apply(stand_in, place), *more)

    return checkpoint(begin, _Leave.apply(hidden_states, place), *args)

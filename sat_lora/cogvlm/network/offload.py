"""The input of a recomputed layer, in host memory while nobody needs it.

Activation checkpointing keeps the input of each layer until backward comes to it: 0.57 GiB a sample of CogVLM-17B. Here
the checkpointing function, SAT's, is given in its place a tensor of the same shape that takes the memory of one
element, and the layer begins by exchanging it for the input: the one at hand in forward, in backward the copy that went
to the host meanwhile. Copies are exact, and so is everything that is computed of them.

Not by DeepSpeed 0.19.8's `cpu_checkpointing`: it empties whatever tensor of floats the layer is given, a mask that the
next layer is given as well and hidden states that somebody else holds among them. Not by torch's `save_on_cpu`:
DeepSpeed's function, which SAT checkpoints with on CUDA, keeps its inputs where saved-tensor hooks do not see them.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.autograd.function import FunctionCtx


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
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Fetch(torch.autograd.Function):
    """Gives the tensor that was left at a place for what stands for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, stand_in: torch.Tensor, place: _Place) -> torch.Tensor:
        return place.take()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


def checkpoint_from_host(
    checkpoint: Callable[..., Any], layer: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any
) -> Any:
    """Return `checkpoint(layer, hidden_states, *args)`, the hidden states of which wait for backward in host memory."""
    place = _Place()

    def begin(stand_in: torch.Tensor, *more: Any) -> torch.Tensor:
        return layer(_Fetch.apply(stand_in, place), *more)

    return checkpoint(begin, _Leave.apply(hidden_states, place), *args)

"""A step of fixed shapes as a CUDA graph: some hundred kernels for the price of one launch."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sat_lora.parallel.sharding import model_parallel_layout

CAPTURES = 2  # tries, before the steps stay eager
WARM_UPS = 2  # eager calls, on the capturing stream, in which libraries make their plans and take their workspaces


def can_be_captured(model: nn.Module, device: torch.device) -> bool:
    """Return whether a forward pass of the model is kernels alone.

    ZeRO-3 gathers weights from Python between them, and model-parallel ranks would all have to agree to capture.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return device.type == "cuda" and not partitioned and model_parallel_layout()[1] == 1


class CapturedStep:
    """A step that is called, from the third time on by replaying its kernels; only eagerly where it cannot be captured.

    step: takes nothing, returns a tensor, and reads and writes no memory but tensors that stay where they are. Called
    twice in a row it has to do what it does once. The result is overwritten by the next call.
    """

    def __init__(self, step: Callable[[], torch.Tensor], *, capture: bool):
        self._step = step
        self._capture_wanted = capture
        self._calls = 0
        self._captures = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: torch.Tensor | None = None
        self._stream = torch.cuda.Stream() if capture else None

    @property
    def is_captured(self) -> bool:
        """Whether the step is replayed from now on."""
        return self._graph is not None

    def __call__(self) -> torch.Tensor:
        if self._stream is None or not self._capture_wanted:
            return self._step()
        if self._calls < WARM_UPS:
            self._calls += 1
            return self._warm_up(self._stream)
        if self._graph is None:
            self._capture()
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._output

    def _warm_up(self, stream: torch.cuda.Stream) -> torch.Tensor:
        """Run the step on the capturing stream, and give up on capture if it waits for the device.

        That is asked here, since a capture that fails leaves torch's allocator and random generator in the middle of
        it.
        """
        stream.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self._step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
        if any("synchronizing CUDA operation" in str(warning.message) for warning in caught):
            self._capture_wanted = False
        return output

    def _capture(self) -> None:
        self._captures += 1
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, of data workers and of saves, may use the device meanwhile.
            with (
                _no_garbage_collection(),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                output = self._step()
        except RuntimeError as error:
            if self._captures == CAPTURES:
                self._capture_wanted = False
                cause = _first_cause(error)
                warnings.warn(f"no CUDA graph: the step could not be captured, and runs eagerly: {cause}", stacklevel=2)
            return
        self._graph = graph
        self._output = output


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside: a capture is spoilt by memory, as of an earlier graph, given back meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _first_cause(error: BaseException) -> BaseException:
    """Return the error that came first: the end of a capture that has failed only says that it has."""
    while error.__context__ is not None:
        error = error.__context__
    return error

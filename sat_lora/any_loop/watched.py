"""The watchdog around any training loop, which tells it nothing: hooks see what the loop is doing.

with watched(model, "runs/mine"):
    for batch in batches:
        ...
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from sat_lora.errors import ConfigError
from sat_lora.files.foreign import os_problem
from sat_lora.parallel.distributed import run_on_all_ranks
from sat_lora.parallel.wrapped import require_trainable, unwrapped
from sat_lora.printable import printable
from sat_lora.watchdog.rank_files import clear
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.watchdog import watched_trace

Result = TypeVar("Result")

LIMIT = 120.0
_open: list[Path] = []
"""The folder of the block that this process is in; empty outside."""


@contextmanager
def watched(model: nn.Module, folder: str | Path, *, limit: float = LIMIT) -> Iterator[Trace]:
    """Watch the loop inside, and end it with a verdict where it hangs, in place of waiting for ever.

    model: one that trains, DeepSpeed's engine around it or not; the engine may also be made inside. folder: gets
    `watchdog/`, which `sat-lora doctor --run FOLDER` reads, and may hold anything else. limit: seconds without a sign
    of life below which nothing is ever wrong; a phase may take ten times the longest that it has taken of late, and
    five times `limit` at first. Every rank enters and leaves it.

    Gives the trace. What the loop does is seen by hooks, which are gone afterwards: forward and backward passes, the
    optimizer, evaluation (a forward pass without gradients), `torch.save`, saving and loading of DeepSpeed's engine.
    What else takes longer than `limit`, and gives no sign meanwhile, is told by `trace.at("write")`.
    Raises ConfigError on every rank where the folder cannot be written or belongs to a run that goes on, where nothing
    trains, and inside another such block.
    """
    inner = _on_all_ranks(lambda: _checked(model, folder, limit))
    path = Path(folder)
    is_first = _rank() == 0
    _on_all_ranks(lambda: _take(path) if is_first else None)
    trace = _on_all_ranks(lambda: _trace(path, inner))
    _open.append(path)
    try:
        with ExitStack() as stack:
            stack.callback(trace.detach)
            stack.enter_context(watched_trace(trace, limit))
            _Phases(trace, inner).attach(stack)
            yield trace
    finally:
        _open.remove(path)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _on_all_ranks(step: Callable[[], Result]) -> Result:
    """Return what `step` returns; a mistake of any rank is raised on all, where there are ranks."""
    return run_on_all_ranks(step) if torch.distributed.is_initialized() else step()


def _checked(model: nn.Module, folder: str | Path, limit: float) -> nn.Module:
    """Return the model itself. Raises ConfigError for what cannot be watched."""
    inner = unwrapped(model, user="watched")
    require_trainable(inner, user="watched")
    if _open:
        raise ConfigError(
            f"watched: this process is watched already, in {printable(_open[0])}; one block around the whole loop is "
            "enough for several models"
        )
    if isinstance(folder, bytes) or not isinstance(folder, str | os.PathLike) or not str(folder):
        raise ConfigError(f"watched: got {folder!r} for the folder; give a path, such as runs/mine")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not (math.isfinite(limit) and limit > 0):
        raise ConfigError(f"watched: limit is {limit!r}; wanted seconds above 0, such as {LIMIT:g}")
    return inner


def _take(folder: Path) -> None:
    """Make the folder, without what an earlier run has left there. Raises ConfigError where another one goes on."""
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        states = read_states(folder)
    except (OSError, ValueError):
        states = []  # of files that nobody has finished
    living = [state.pid for state in states if state.is_alive and state.pid != os.getpid() and not state.ended]
    if living:
        raise ConfigError(
            f"watched: {printable(folder)} belongs to a run that goes on (process {living[0]}); give another folder, "
            "or wait for it"
        )
    clear(folder)


def _trace(folder: Path, model: nn.Module) -> Trace:
    with _writable(folder):
        return Trace(folder, model, rank=_rank(), world_size=_world_size())


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn an error of the system, inside, into a ConfigError about the folder."""
    try:
        yield
    except OSError as error:
        reason = os_problem(error) if error.filename is not None else printable(error)
        raise ConfigError(
            f"watched: {printable(folder)} cannot be written: {reason}; give a folder that you may write to, on a disk "
            "with room"
        ) from error


class _Phases:
    """Tells a trace what the loop is doing, by hooks on the model, on torch's optimizers and on DeepSpeed's engine."""

    def __init__(self, trace: Trace, model: nn.Module):
        self._trace = trace
        self._model = model
        self._step = 0
        self._micro_batch = 0
        self._has_stepped = True
        self._in_engine = False
        self._trained = _trained(model)

    def attach(self, stack: ExitStack) -> None:
        """Put all hooks in place, until the stack is closed."""
        from deepspeed.runtime.engine import DeepSpeedEngine

        self._next_data()
        for handle in (
            self._model.register_forward_pre_hook(self._forward_begins),
            self._model.register_forward_hook(self._forward_ends, always_call=True),
            torch_optimizer.register_optimizer_step_pre_hook(self._optimizer_begins),
            torch_optimizer.register_optimizer_step_post_hook(self._optimizer_ends),
        ):
            stack.callback(handle.remove)
        phases = {"save_checkpoint": "write", "load_checkpoint": "load"}
        replaced = {name: self._as_phase(getattr(DeepSpeedEngine, name), phase) for name, phase in phases.items()}
        replaced["step"] = self._engine_step(DeepSpeedEngine.step)
        replaced["allreduce_gradients"] = self._reduce(DeepSpeedEngine.allreduce_gradients)
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(DeepSpeedEngine, name, function))
        stack.enter_context(mock.patch.object(torch, "save", self._as_phase(torch.save, "write")))

    def _forward_begins(self, module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            self._trace.at("evaluate")
            return
        if self._has_stepped:
            self._follow_what_trains()
            self._step += 1
            self._micro_batch = 0
        else:
            self._micro_batch += 1
        self._has_stepped = False
        self._trace.at("forward", step=self._step, micro_batch=self._micro_batch)

    def _follow_what_trains(self) -> None:
        """Begin the trace anew where other parameters train than at the last step: adapters came meanwhile, say."""
        trained = _trained(self._model)
        if trained != self._trained:
            self._trained = trained
            self._trace.attach(self._model)

    def _next_data(self) -> None:
        """Note that the data of the next step, or of the next micro-batch, are waited for."""
        self._trace.at("data", step=self._step + 1 if self._has_stepped else self._step)

    def _forward_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():  # an evaluation goes on until the next step: what it measures may take long
            self._trace.at("backward")

    def _optimizer_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._in_engine:
            self._trace.at("optimizer")

    def _optimizer_ends(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._in_engine:
            self._has_stepped = True
            self._next_data()

    def _engine_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the engine's `step`, which is one of the optimizer's at the last micro-batch alone."""

        @wraps(original)
        def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
            is_last = engine.is_gradient_accumulation_boundary()
            self._in_engine = True
            self._trace.at("optimizer")
            try:
                return original(engine, *args, **kwargs)
            finally:
                self._in_engine = False
                self._has_stepped = is_last
                self._next_data()

        return step

    def _reduce(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def reduce(*args: Any, **kwargs: Any) -> Any:
            self._trace.at("reduce")
            return original(*args, **kwargs)

        return reduce

    def _as_phase(self, original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return a function that is a phase of its own, and the one before it goes on afterwards."""

        @wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            before = self._trace.phase
            self._trace.at(phase)
            try:
                return original(*args, **kwargs)
            finally:
                self._trace.at(before)

        return function


def _trained(model: nn.Module) -> list[int]:
    return [id(parameter) for parameter in model.parameters() if parameter.requires_grad]

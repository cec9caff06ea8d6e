"""One forward and backward pass of a model, recorded by hooks: what ran, how, and what came back.

No engine and no optimizer take part, so ranks wait for each other nowhere but inside model-parallel layers, and what
would hang a run can be looked at. Checks read the record.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import torch
from torch import nn

from sat_lora.lora.mixin import lora_mixins
from sat_lora.training.steps.nonfinite import floating_tensors

LossOf = Callable[[nn.Module, dict], torch.Tensor]
"""What gives the loss, a scalar, of a model and a batch."""

_CHECKPOINTING = ("torch/utils/checkpoint.py", "activation_checkpointing/checkpointing.py")


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    in_backward: bool
    """Recomputed."""
    with_grad: bool
    """Whether autograd recorded it."""
    has_graph: bool
    """Whether its output asks for a gradient."""
    checkpointed: bool
    sums: tuple[float, float]
    """The sums of the output's values and of their magnitudes, in float64: equal for equal outputs."""


@dataclass
class Passes:
    """The record of one batch on this rank. Modules and parameters are named from the model down."""

    kind: str
    """The kind of the batch."""
    loss: float = float("nan")
    has_graph: bool = False
    """Whether the loss asks for a gradient at all."""
    calls: dict[str, list[Call]] = field(default_factory=dict)
    """The calls of each module, the modules in the order of their first output."""
    arrivals: list[str] = field(default_factory=list)
    """Trainable parameters, each time that a gradient came."""
    answered: set[str] = field(default_factory=set)
    """Modules whose output got a gradient."""
    reached: set[str] = field(default_factory=set)
    """Trainable parameters that a walk from the loss through the graph meets; not those in checkpointed regions."""
    switches: list[dict[str, str]] = field(default_factory=list)
    """What a layer's result depends on beside its input: before forward, in each recomputed call, after backward."""
    nonfinite: list[str] = field(default_factory=list)
    """Trainable parameters whose gradient has a NaN or infinity."""


def record_passes(model: nn.Module, loss_of: LossOf, batch: dict, kind: str, *, backward=None) -> Passes:
    """Run `loss_of(model, batch)` and its backward; return the record.

    Gradients are left in place for the caller to look at and clear. backward: called with the loss, by default
    `loss.backward()`.
    """
    recorder = _Recorder(model, kind)
    with ExitStack() as hooks:
        for handle in recorder.attach():
            hooks.callback(handle.remove)
        recorder.note_switches()
        loss = loss_of(model, batch)
        record = recorder.record
        record.loss = float(loss.detach())
        record.has_graph = loss.requires_grad
        recorder.in_backward = True
        if loss.requires_grad:
            record.reached = reached_parameters(model, loss)
            (backward or torch.Tensor.backward)(loss)
        recorder.note_switches()
    return record


def reached_parameters(model: nn.Module, loss: torch.Tensor) -> set[str]:
    """Return the names of parameters that can be reached from the loss through the autograd graph."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reached = set()
    seen = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            reached.add(names[id(leaf)])
        waiting += [following for following, _ in node.next_functions]
    return reached


class _Recorder:
    def __init__(self, model: nn.Module, kind: str):
        self.model = model
        self.record = Passes(kind)
        self.in_backward = False

    def attach(self) -> Iterator:
        for name, module in self.model.named_modules():
            yield module.register_forward_hook(partial(self._after_forward, name))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield parameter.register_hook(partial(self._gradient, name))

    def note_switches(self) -> None:
        switches = {}
        for name, mixin in lora_mixins(self.model).items():
            switches[f"{name}.enabled"] = str(mixin.enabled)
            switches[f"{name}.scale"] = f"{mixin.scale:g}"
            switches[f"{name}.merged"] = str(mixin.merged)
        for name, module in self.model.named_modules():
            switches[f"{name}.training"] = str(module.training)
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
            switches[f"{name}'s forward hooks"] = str(hooks)  # of a mixin the forward that it sets
        self.record.switches.append(switches)

    def _after_forward(self, name: str, module, args, output) -> None:
        tensors = [tensor for tensor in floating_tensors(output)]
        if not tensors:
            return
        if self.in_backward and name not in self.record.calls:
            return  # what a checkpointed region runs is noted when it runs first
        calls = self.record.calls.setdefault(name, [])
        if self.in_backward and not any(
            call.in_backward for calls_of_module in self.record.calls.values() for call in calls_of_module
        ):
            self.note_switches()
        has_graph = any(tensor.requires_grad for tensor in tensors)
        calls.append(
            Call(self.in_backward, torch.is_grad_enabled(), has_graph, _inside_checkpointing(), _sums(tensors))
        )
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, name=name: self.record.answered.add(name))

    def _gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.record.arrivals.append(name)
        if not gradient.isfinite().all():
            self.record.nonfinite.append(name)


def _sums(tensors: list[torch.Tensor]) -> tuple[float, float]:
    with torch.no_grad():
        sums = [(float(tensor.double().sum()), float(tensor.double().abs().sum())) for tensor in tensors]
    return sum(total for total, _ in sums), sum(size for _, size in sums)


def _inside_checkpointing() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_CHECKPOINTING):
            return True
        frame = frame.f_back
    return False

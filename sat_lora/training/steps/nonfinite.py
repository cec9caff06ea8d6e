"""Losses and gradients that are not finite: noticing them before the optimizer moves, and finding where they begin."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from sat_lora.lora.adapter import LoraAdapter
from sat_lora.training.steps.optimizer_state import stepped_tensors


class Origin(NamedTuple):
    """Where on a rank a value that is not finite began."""

    order: int
    """How far into the passes it was; the least is the first."""
    place: str
    """The place as a clause for messages."""
    module: str | None = None
    """The module's name; None for the batch."""
    parameter: str | None = None
    """The parameter's name, where its gradient is the value."""


def nonfinite_gradients(engine) -> torch.Tensor:
    """Return 1.0 if this rank's share of the step's gradients holds a NaN or infinity, else 0.0: a float32 scalar on
    the engine's device.

    Call it after the last backward pass and before `engine.step()`. It looks at the very tensors that step will take,
    and neither waits for the device nor changes them. They are sums over micro-batches and data-parallel ranks, which
    a value that is not finite survives, so whichever rank made it, the owners of that share see it.
    """
    is_bad = torch.zeros((), dtype=torch.bool, device=engine.device)
    by_kind: dict[tuple, list[torch.Tensor]] = {}
    for gradient in filter(torch.Tensor.numel, _gradients_to_step(engine)):
        by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, _), alike in by_kind.items():
        if device != is_bad.device:
            torch.cuda.synchronize()  # offloaded to the host, by copies that nothing on the host has waited for
        # The largest magnitude of each: exact in every dtype, where another norm might overflow; NaN if there is one.
        largest = torch.stack(torch._foreach_norm(alike, float("inf")))
        is_bad |= (~largest.isfinite().all()).to(is_bad.device)
    return is_bad.float()


def _gradients_to_step(engine) -> Iterator[torch.Tensor]:
    """Yield the gradients that the next step will take.

    DeepSpeed 0.19.8 keeps them in `averaged_gradients` by group; at stage 0, and offloaded, beside what it steps.
    """
    averaged = getattr(engine.optimizer, "averaged_gradients", {})
    groups = [group for group in averaged.values() if group is not None]
    if groups:
        yield from (gradient for group in groups for gradient in group)
    else:
        yield from (master.grad for master in stepped_tensors(engine) if master.grad is not None)


@contextmanager
def discard_step(engine) -> Iterator[None]:
    """Let `engine.step()` throw the gradients away, inside the block, and move neither parameters nor moments, at any
    ZeRO stage.

    DeepSpeed's optimizers all call `step` of the one they wrap, and copy back what it left. It may be nested.
    """
    own = vars(engine.basic_optimizer)
    before = {name: own[name] for name in ("step",) if name in own}
    own["step"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del own["step"]
        own.update(before)


def first_nonfinite(model: nn.Module, repeat: Callable[[], None]) -> Origin | None:
    """Return where on this rank a value that is not finite is first made; None where all values are finite.

    repeat: runs the step's forward and backward passes again. A module makes such a value if all it was given is
    finite; where no module can be named, it is the first place where such a value is seen. Of several ranks the first
    is the one of the least order: they all run the same passes.
    """
    search = _Search(model)
    hooks = [
        module.register_forward_hook(partial(search.after_forward, name), with_kwargs=True)
        for name, module in model.named_modules()
        if not isinstance(module, LoraAdapter)  # it writes into the output of its layer, which stands for both
    ]
    hooks.append(model.register_forward_pre_hook(search.before_forward, with_kwargs=True))
    hooks += [
        parameter.register_hook(partial(search.parameter_gradient, name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        repeat()
    finally:
        for hook in hooks:
            hook.remove()
    return search.made or search.seen


class _Search:
    """The hooks of `first_nonfinite`, and what they saw first: `made` by a module out of finite values,
    `seen` at all.
    """

    def __init__(self, model: nn.Module):
        self.kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        self.made: Origin | None = None
        self.seen: Origin | None = None
        self._looks = 0
        self._bad_above: set[str] = set()  # modules whose output has a gradient that is not finite

    def before_forward(self, model, args, kwargs) -> None:
        """Look at what the model is given."""
        if not self._look((args, kwargs)):
            self._note("the batch itself", True)

    def after_forward(self, name: str, module, args, kwargs, output) -> None:
        """Look at what a module gives, and later at the gradients of that and of what it was given."""
        if not self._look(output):
            place = f"the output of {self._called(name)} in the forward pass"
            self._note(place, _all_finite((args, kwargs)), module=name)
        for tensor in floating_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._output_gradient, name))
        for tensor in floating_tensors((args, kwargs)):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._input_gradient, name))

    def parameter_gradient(self, parameter: str, gradient: torch.Tensor) -> None:
        """Look at the gradient of the parameter of that name."""
        if not self._look(gradient):
            owner = parameter.rpartition(".")[0]
            place = f"the gradient of {parameter} in the backward pass"
            self._note(place, owner not in self._bad_above, module=owner, parameter=parameter)

    def _output_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if not self._look(gradient):
            self._bad_above.add(name)
            self._note(f"the gradient at the output of {self._called(name)} in the backward pass", False, module=name)

    def _input_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if not self._look(gradient):
            place = f"the gradient at the input of {self._called(name)} in the backward pass"
            self._note(place, name not in self._bad_above, module=name)

    def _look(self, nest) -> bool:
        """Return whether all is finite, and count the look."""
        self._looks += 1
        return _all_finite(nest)

    def _note(self, place: str, made_here: bool, **names: str) -> None:
        """Keep a place where a value is not finite, if it is the first. names: the module's and the parameter's."""
        origin = Origin(self._looks, place, **names)
        self.seen = self.seen or origin
        if made_here:
            self.made = self.made or origin

    def _called(self, name: str) -> str:
        """Return how messages call the module of that name."""
        return f"{name} ({self.kinds[name]})" if name else f"the whole model ({self.kinds[name]})"


def floating_tensors(nest) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(nest, torch.Tensor):
        if nest.is_floating_point():
            yield nest
    elif isinstance(nest, dict):
        yield from floating_tensors(list(nest.values()))
    elif isinstance(nest, list | tuple):
        for part in nest:
            yield from floating_tensors(part)


def _all_finite(nest) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in floating_tensors(nest))

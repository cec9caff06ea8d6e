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

    order: int  # how far into the passes
    words: str
    module: str | None = None
    parameter: str | None = None


def nonfinite_gradients(engine) -> torch.Tensor:
    """1.0 if this rank's share of the step's gradients holds a NaN or infinity, else 0.0: a scalar on their device.

    Call it after the last backward pass and before `engine.step()`. It looks at the very tensors that step will take,
    and neither waits for the device nor changes them. They are sums over micro-batches and data-parallel ranks, which
    a value that is not finite survives, so whichever rank made it, the owners of that share see it.
    """
    found = torch.zeros((), dtype=torch.bool, device=engine.device)
    by_kind: dict[tuple, list[torch.Tensor]] = {}
    for gradient in filter(torch.Tensor.numel, _gradients_to_step(engine)):
        by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, _), alike in by_kind.items():
        if device != found.device:
            torch.cuda.synchronize()  # offloaded to the host, by copies that nothing on the host has waited for
        # The largest magnitude of each: exact in every dtype, where another norm might overflow; NaN if there is one.
        largest = torch.stack(torch._foreach_norm(alike, float("inf")))
        found |= (~largest.isfinite().all()).to(found.device)
    return found.float()


def _gradients_to_step(engine) -> Iterator[torch.Tensor]:
    """DeepSpeed 0.19.8 keeps them in `averaged_gradients` by group; at stage 0, and offloaded, beside what it steps."""
    averaged = getattr(engine.optimizer, "averaged_gradients", {})
    groups = [group for group in averaged.values() if group is not None]
    if groups:
        yield from (gradient for group in groups for gradient in group)
    else:
        yield from (master.grad for master in stepped_tensors(engine) if master.grad is not None)


@contextmanager
def discard_step(engine) -> Iterator[None]:
    """Inside, `engine.step()` throws the gradients away and moves neither parameters nor moments, at any ZeRO stage.

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
    """Where on this rank a value that is not finite is first made, or None.

    repeat: runs the step's forward and backward passes again. A module makes such a value if all it was given is
    finite; where none can be told, it is the first place where one is seen. The first of several ranks is the one that
    is least far: they all run the same passes.
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
    """What hooks saw first: `made` by a module out of finite values, and `seen` at all."""

    def __init__(self, model: nn.Module):
        self.kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        self.made: Origin | None = None
        self.seen: Origin | None = None
        self._looks = 0
        self._bad_above: set[str] = set()  # modules whose output has a gradient that is not finite

    def before_forward(self, model, args, kwargs) -> None:
        if not self._look((args, kwargs)):
            self._note("the batch itself", True)

    def after_forward(self, name: str, module, args, kwargs, output) -> None:
        if not self._look(output):
            words = f"the output of {self._called(name)} in the forward pass"
            self._note(words, _all_finite((args, kwargs)), module=name)
        for tensor in floating_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._output_gradient, name))
        for tensor in floating_tensors((args, kwargs)):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._input_gradient, name))

    def parameter_gradient(self, parameter: str, gradient: torch.Tensor) -> None:
        if not self._look(gradient):
            owner = parameter.rpartition(".")[0]
            words = f"the gradient of {parameter} in the backward pass"
            self._note(words, owner not in self._bad_above, module=owner, parameter=parameter)

    def _output_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if not self._look(gradient):
            self._bad_above.add(name)
            self._note(f"the gradient at the output of {self._called(name)} in the backward pass", False, module=name)

    def _input_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if not self._look(gradient):
            words = f"the gradient at the input of {self._called(name)} in the backward pass"
            self._note(words, name not in self._bad_above, module=name)

    def _look(self, nest) -> bool:
        self._looks += 1
        return _all_finite(nest)

    def _note(self, words: str, made_here: bool, **place: str) -> None:
        found = Origin(self._looks, words, **place)
        self.seen = self.seen or found
        if made_here:
            self.made = self.made or found

    def _called(self, name: str) -> str:
        return f"{name} ({self.kinds[name]})" if name else f"the whole model ({self.kinds[name]})"


def floating_tensors(nest) -> Iterator[torch.Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(nest, torch.Tensor):
        if nest.is_floating_point():
            yield nest
    elif isinstance(nest, dict):
        yield from floating_tensors(list(nest.values()))
    elif isinstance(nest, list | tuple):
        for one in nest:
            yield from floating_tensors(one)


def _all_finite(nest) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in floating_tensors(nest))

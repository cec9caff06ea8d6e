"""What of the base trains, and that nothing else of it does.

`modules_to_save` and `bias` train parameters whole, beside the adapters. All others are frozen, in SAT's own trainer
too: its `training_main` calls `model.disable_untrainable_params()`, in which scripts freeze and unfreeze by parts of
names. A list that was written for other adapters freezes these, or trains a part of the base.
"""

import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sat_lora._sat import RowParallelLinear
from sat_lora.errors import ConfigError
from sat_lora.lora.targets import BaseParameter
from sat_lora.parallel.sharding import mark_sharded, model_parallel_layout, sharding_of
from sat_lora.terminal.notice import warn

METHOD = "disable_untrainable_params"
SHOWN = 12  # names in a warning, the layers of one name counted once


class TrainedBase:
    """Parameters that train in place, so that ZeRO and model parallelism see ordinary ones.

    The originals wait on the CPU. It holds tensors and no modules, since the call that gives the originals back must
    not keep the model alive.
    """

    def __init__(self, parameters: dict[str, BaseParameter]):
        self.shardings = {name: sharding_of(place.module, place.leaf) for name, place in parameters.items()}
        # SAT sets only its own flag on what it cuts; DeepSpeed's gradient norm reads another.
        self.tensors = {name: mark_sharded(place.tensor, self.shardings[name]) for name, place in parameters.items()}
        self._hooks = [
            place.tensor.requires_grad_().register_hook(lambda gradient: gradient * model_parallel_layout()[1])
            for place in parameters.values()
            if has_part_of_gradient(place)
        ]
        self._originals: dict[str, torch.Tensor] = {}
        self._swapped = False

    @torch.no_grad()
    def remember(self) -> None:
        """Take the present values as the originals; of what ZeRO-3 has partitioned, this rank's partition."""
        local = {name: getattr(tensor, "ds_tensor", tensor) for name, tensor in self.tensors.items()}
        self._originals = {name: tensor.detach().to("cpu", copy=True) for name, tensor in local.items()}
        self._swapped = False

    def originals(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (parameter, its original on the CPU) of each that has another value now, as `remember` keeps it."""
        if not self._swapped:
            yield from ((self.tensors[name], original) for name, original in self._originals.items())

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange trained values and originals. Raises ConfigError where ZeRO-3 has partitioned one."""
        for name, tensor in self.tensors.items():
            if hasattr(tensor, "ds_id"):
                raise ConfigError(f"{name} is partitioned by ZeRO-3: its original cannot be brought back during a run")
        for name, tensor in self.tensors.items():
            current = tensor.detach().to("cpu", copy=True)
            tensor.copy_(self._originals[name])
            self._originals[name] = current
        self._swapped = not self._swapped

    def give_back(self) -> None:
        """Put the originals back and make them untrainable, for a base whose mixin is gone."""
        if not self._swapped and not any(hasattr(tensor, "ds_id") for tensor in self.tensors.values()):
            self.swap()
        for hook in self._hooks:
            hook.remove()
        for tensor in self.tensors.values():
            tensor.requires_grad_(False)


def has_part_of_gradient(parameter: BaseParameter) -> bool:
    """Return whether SAT leaves each of n model-parallel ranks an n-th of the gradient of a parameter that all hold.

    A row-parallel linear with final_bias=False (the ViT's) adds bias / n on every rank before the sum.
    """
    layer = parameter.module
    return isinstance(layer, RowParallelLinear) and parameter.leaf == "bias" and not layer.final_bias


def freeze_base(model: nn.Module, *more: nn.Module) -> None:
    """Make every parameter untrainable except what LoRA mixins train (`more`: not yet on the model).

    Decided by asking the mixins, never by names.
    """
    trained = _trained_by(*_mixins_in(model), *more)
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            parameter.was_trainable = True  # for what a script keeps by freezing others: see TrainedSet
        parameter.requires_grad_(id(parameter) in trained)


def _mixins_in(model: nn.Module) -> list[Any]:
    """Return the LoRA mixins in the model, known by the mark they carry."""
    return [module for module in model.modules() if getattr(module, "holds_adapters", False)]


def _trained_by(*mixins: Any) -> set[int]:
    return {id(parameter) for mixin in mixins for parameter in mixin.trainable()}


class StandIn:
    """Stands for one method of one SAT model, on that model alone: `model.method(...)` calls it in its place."""

    method: str

    def __init__(self, model: nn.Module, own: Callable[..., Any] | None = None):
        """Stand for the method of `model`; own: what the script has set on the model itself, in its place."""
        self._model = weakref.ref(model)
        self._own = own

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        """Stand there from now on. A second call changes nothing."""
        own = vars(model).get(cls.method)
        if not isinstance(own, cls):
            object.__setattr__(model, cls.method, cls(model, own))

    def original(self, model: nn.Module, *args: Any, **kw_args: Any) -> Any:
        """Return what the method gives without this."""
        if self._own is not None:
            return self._own(*args, **kw_args)
        return getattr(type(model), self.method)(model, *args, **kw_args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandIn":
        """Return that of the copied model."""
        model = self._model()
        return self if model is None else type(self)(memo.get(id(model), model), self._own)


class _TrainableFlags(TorchFunctionMode):
    """Hears which parameters are made trainable and which are frozen while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[int, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__):
            self._last[id(args[0])] = bool(args[1] if len(args) > 1 else given.get("requires_grad", True))
        return func(*args, **given)

    def wanted(self, base: dict[str, nn.Parameter]) -> list[str]:
        """Return the names of what was made trainable; and, where others were frozen, of what was left as it had been
        before LoRA froze it: a script that names what trains often freezes the rest and no more.
        """
        freezes = any(self._last.get(id(parameter)) is False for parameter in base.values())
        return [
            name
            for name, parameter in base.items()
            if parameter.requires_grad
            or (freezes and getattr(parameter, "was_trainable", False) and id(parameter) not in self._last)
        ]


class TrainedSet(StandIn):
    """Stands for a model's `disable_untrainable_params`: the script's own, and then the mixins' word."""

    method = METHOD

    def __call__(self) -> None:
        """Let the script say what trains, and leave trainable what the model's LoRA mixins train, no more, no less.

        A warning names what the script would have trained beside that. Raises ConfigError where a layer that a mixin
        adapts is not in the model, or has been replaced meanwhile: SAT asks this right before it makes the optimizer.
        """
        model = self._model()
        if model is None:
            return
        with _TrainableFlags() as flags:
            self.original(model)
        mixins = _mixins_in(model)
        if not mixins:
            return
        for mixin in mixins:
            mixin.refuse_foreign_layers(model)
        trained = _trained_by(*mixins)
        base = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in trained}
        more = flags.wanted(base)
        freeze_base(model)
        if more:
            names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in more))
            shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
            warn(
                f"{type(model).__name__}.{METHOD} leaves {len(more)} parameters trainable that LoRA does not train: "
                f"{shown}. They stay frozen; to train parameters of the base, name them in modules_to_save"
            )


def keep_trained_set(model: nn.Module) -> None:
    """Let the mixins' word be the last whenever SAT asks the model what trains. A second call changes nothing.

    model: a BaseModel, or what holds several, as SAT's EncoderDecoderModel does; nothing else is asked.
    """
    if callable(getattr(model, METHOD, None)):
        TrainedSet.put_on(model)

"""What trains is what the mixins say, in SAT's own trainer too.

SAT's `training_main` calls `model.disable_untrainable_params()`, in which scripts freeze and unfreeze by parts of
names: a list that was written for other adapters freezes these, or trains a part of the base.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from sat_lora._sat import BaseModel
from sat_lora.errors import ConfigError
from sat_lora.terminal.notice import warn

METHOD = "disable_untrainable_params"
SHOWN = 5


def freeze_base(model: nn.Module, *more: nn.Module) -> None:
    """Make every parameter untrainable except what LoRA mixins train (`more`: not yet on the model).

    Decided by asking the mixins, never by names.
    """
    trained = _trained_by(*_mixins_in(model), *more)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _mixins_in(model: nn.Module) -> list[nn.Module]:
    """Return the LoRA mixins in the model, known by the mark they carry."""
    return [module for module in model.modules() if getattr(module, "holds_adapters", False)]


def _trained_by(*mixins: Any) -> set[int]:
    return {id(parameter) for mixin in mixins for parameter in mixin.trainable()}


class TrainedSet:
    """Stands for a model's `disable_untrainable_params`: the script's own, and then the mixins' word."""

    def __init__(self, model: BaseModel, own: Callable[[], None] | None = None):
        """own: what the script has set on the model itself, in place of its class's method."""
        self._model = weakref.ref(model)
        self._own = own

    def __call__(self) -> None:
        """Let the script say what trains, and leave trainable what the model's LoRA mixins train, no more, no less.

        A warning names what the script would have trained beside that.
        """
        model = self._model()
        if model is None:
            return
        if self._own is None:
            getattr(type(model), METHOD)(model)
        else:
            self._own()
        mixins = _mixins_in(model)
        if not mixins:
            return
        trained = _trained_by(*mixins)
        more = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained]
        freeze_base(model)
        if more:
            shown = ", ".join(more[:SHOWN]) + ", ..." * (len(more) > SHOWN)
            warn(
                f"{type(model).__name__}.{METHOD} leaves {len(more)} parameters trainable that LoRA does not train: "
                f"{shown}. They stay frozen; to train parameters of the base, name them in modules_to_save"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainedSet":
        """A copied model's belongs to the copy."""
        model = self._model()
        return self if model is None else TrainedSet(memo.get(id(model), model), self._own)


def keep_trained_set(model: nn.Module) -> None:
    """Let the mixins' word be the last whenever SAT asks the model what trains. A second call changes nothing."""
    own = vars(model).get(METHOD)
    if isinstance(model, BaseModel) and not isinstance(own, TrainedSet):
        object.__setattr__(model, METHOD, TrainedSet(model, own))


def refuse_engine(model: nn.Module) -> None:
    """ConfigError: the model is in DeepSpeed's engine already, whose optimizer would not know of new adapters."""
    is_engine = "DeepSpeedEngine" in {base.__name__ for base in type(model).__mro__}
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    if is_engine or any("DeepSpeedEngine" in getattr(hook, "__qualname__", "") for hook in hooks):
        what = "is DeepSpeed's engine" if is_engine else "is in DeepSpeed's engine"
        raise ConfigError(
            f"the model {what} already, whose optimizer holds the parameters that it was made with; add the adapters "
            "before deepspeed.initialize, or before training_main"
        )

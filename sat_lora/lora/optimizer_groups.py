"""The trainable parameters as groups of an optimizer, for adapters whose B learns faster than their A (LoRA+)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sat_lora.errors import ConfigError
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.wrapped import is_engine, is_in_engine, require_trainable, unwrapped

RATIO = "lr_ratio"  # of a group; optimizers keep such an entry, in their checkpoints as well


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the trainable parameters of `model`, for any torch optimizer and for DeepSpeed.

    B of every adapter learns at `lr` times the `lr_ratio` of its mixin's config, everything else at `lr`. That is one
    group where no ratio differs from 1, else one at `lr` and then one per ratio, none of them empty. Groups and
    parameters come in the order of `model.parameters()`, which is the same on every rank.
    torch's schedulers keep the ratio; a loop that sets rates itself does with `group["lr"] = rate * group["lr_ratio"]`.
    Raises ConfigError where nothing trains, for a model without a LoRA mixin, whose base would train, and for one in
    DeepSpeed's engine, which has its groups.
    """
    inner = unwrapped(model, user="parameter_groups")
    trained = require_trainable(inner, user="parameter_groups")
    if not lora_mixins(inner):
        raise ConfigError(
            f"parameter_groups: the {type(inner).__name__} has no LoRA mixin, and {len(trained)} parameters of its "
            "base train; call add_lora(model, ...) first"
        )
    if is_engine(model) or is_in_engine(model):
        raise ConfigError(
            "parameter_groups: the model is in DeepSpeed's engine already, whose optimizer has its groups; make them "
            "before, and hand the optimizer to deepspeed.initialize"
        )
    return groups_of(model, [parameter for _, parameter in trained], lr=lr, weight_decay=weight_decay)


def groups_of(
    model: nn.Module, trained: Sequence[nn.Parameter], *, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the groups of `parameter_groups` for these trained parameters of `model`, in an engine or not."""
    ratio_of_b = {
        id(adapter.B): mixin.config.lr_ratio
        for mixin in lora_mixins(model).values()
        for adapter in mixin.adapters.values()
    }
    by_ratio: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in trained:
        by_ratio.setdefault(ratio_of_b.get(id(parameter), 1.0), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * ratio, "weight_decay": weight_decay, RATIO: ratio}
        for ratio, parameters in by_ratio.items()
        if parameters
    ]


def set_learning_rate(groups: list[dict[str, Any]], rate: float) -> None:
    """Give each of an optimizer's `param_groups` the rate times its own ratio."""
    for group in groups:
        group["lr"] = rate * group.get(RATIO, 1.0)

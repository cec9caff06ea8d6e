"""LoraMixins on a model and on the SAT models inside it: put there, and found again."""

from typing import Any

from torch import nn

from sat_lora._sat import BaseModel
from sat_lora.errors import ConfigError
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.base_parameters import freeze_base, keep_trained_set
from sat_lora.lora.config import LoraConfig
from sat_lora.lora.mixin import LoraMixin, lora_mixins, refuse_engine, refuse_loftq, refuse_lost_originals
from sat_lora.lora.targets import BaseParameter, Plan, Site, find_parameters, find_sites, plan


def sat_models(model: nn.Module) -> dict[str, BaseModel]:
    """Return the model itself under "" (if it is a SAT model), and each SAT model inside it, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseModel)}


def find_all_sites(model: nn.Module) -> dict[str, Site]:
    """Return every adaptable layer of the model and of the SAT models inside it, by name."""
    return {name: site for path, inner in sat_models(model).items() for name, site in find_sites(inner, path).items()}


def find_all_parameters(model: nn.Module) -> dict[str, BaseParameter]:
    """Return every base parameter of the model and of the SAT models inside it, by name."""
    return {n: p for path, inner in sat_models(model).items() for n, p in find_parameters(inner, path).items()}


def whole_name(owner: str, name: str) -> str:
    """Return the name from the outermost model of what a mixin, on the SAT model called `owner`, calls `name`.

    `add_lora` gives whole names; a mixin made by hand for an inner SAT model knows only that one.
    """
    return name if not owner or name.startswith(f"{owner}.") else f"{owner}.{name}"


def mixins_called(model: nn.Module, name: str = "lora") -> dict[str, LoraMixin]:
    """Return the LoraMixins of that name, by the name of the SAT model that each is on ("" for the outermost)."""
    named = ((path.rpartition("mixins."), mixin) for path, mixin in lora_mixins(model).items())
    return {owner.rstrip("."): mixin for (owner, _, own_name), mixin in named if own_name == name}


def adapters_of(model: nn.Module, name: str = "lora") -> dict[str, LoraAdapter]:
    """Return the adapters of every LoraMixin called `name`, by the name of their layer from the outermost model."""
    return {
        whole_name(owner, site): mixin.adapter_for(site)
        for owner, mixin in mixins_called(model, name).items()
        for site in mixin.targets
    }


def add_lora(
    model: nn.Module, config: LoraConfig | None = None, *, name: str = "lora", fixed_order: bool = False, **fields: Any
) -> list[LoraMixin]:
    """Put a LoraMixin on the model and on every SAT model inside it that `config` selects something of, and return
    them, the outermost model's first.

    config: or its fields by their names. name: what the mixins are called in each model. fixed_order: for a model that
    skips layers by what its batch holds, an expert without tokens or a vision transformer without images. Gradients
    then come in one order on every rank, with zeros where a layer did not run, which ZeRO 1 and 2 need; ZeRO-3 also
    gathers weights where they are used, and `start_engine` refuses it. The models of `sat_lora.cogvlm` skip nothing and
    need none of this. Raises ConfigError where nothing can be adapted, and for fixed_order with modules_to_save or
    bias.
    """
    refuse_engine(model)
    if not sat_models(model):
        raise ConfigError(
            f"{type(model).__name__} is no SAT model and holds none; deltas go on the layers of SAT's BaseModel, "
            "through its hooks"
        )
    config = config if config is not None else LoraConfig(**fields)
    planned = plan(find_all_sites(model), find_all_parameters(model), config)
    refuse_loftq(planned.targets, config)
    refuse_lost_originals(planned.targets, config)
    return place_mixins(model, config, planned, name, fixed_order=fixed_order)


def place_mixins(
    model: nn.Module, config: LoraConfig, planned: Plan, name: str, *, fixed_order: bool = False
) -> list[LoraMixin]:
    """Put a LoraMixin called `name` on every SAT model in `model` that holds some of what is `planned`; return them.

    Raises ConfigError, before any is made, if one of these models has a mixin of that name.
    """
    present = [f"{path}.mixins.{name}".lstrip(".") for path, inner in sat_models(model).items() if name in inner.mixins]
    if present:
        raise ConfigError(f"the model has a mixin {' and '.join(present)} already; delete it or choose another name")
    mixins = []
    for path, inner in sat_models(model).items():
        targets = {n: planned.targets[n] for n in find_sites(inner, path) if n in planned.targets}
        trained = {n: planned.trained[n] for n in find_parameters(inner, path) if n in planned.trained}
        if targets or trained:
            mixins.append(LoraMixin(inner, config, planned=Plan(targets, trained), fixed_order=fixed_order))
            inner.add_mixin(name, mixins[-1])
    freeze_base(model)
    keep_trained_set(model)
    return mixins

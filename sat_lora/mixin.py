"""LoraMixin: low-rank deltas inside a SAT model's own hooks. No module is replaced, no base weight renamed."""

import warnings
import weakref

import torch
from torch import nn

from sat_lora._sat import BaseMixin, BaseModel, non_conflict
from sat_lora.adapter import LoraAdapter, bounded_rank
from sat_lora.config import LoraConfig
from sat_lora.errors import ConfigError
from sat_lora.targets import LinearSite, find_linears, select


class LoraMixin(BaseMixin):
    """`model.add_mixin("lora", LoraMixin(model, r=16, lora_alpha=32))` on any SAT model.

    Each adapted linear has a forward hook that adds its delta, but only while one of the SAT hooks below runs. Those
    run again when an activation checkpoint is recomputed, so gradients are right with checkpointing; and once the
    mixin is deleted from the model nobody opens the scope, so the base model is what it was, bit for bit.

    Only adapters are left trainable. A SAT model inside this one (CogVLM's vision transformer) needs a mixin of its
    own, because its layers are recomputed on their own: `add_lora` places them all.
    """

    def __init__(self, model: BaseModel, config: LoraConfig | None = None, *, sites=None, **fields):
        """`fields` are those of LoraConfig, if no `config` is given; `sites`, if given, are taken as selected."""
        super().__init__()
        self.config = config if config is not None else LoraConfig(**fields)
        self.enabled = True
        self._open = False
        self.adapters = nn.ModuleDict()
        self.sites: dict[str, LinearSite] = select(find_linears(model), self.config) if sites is None else sites
        for name, site in self.sites.items():
            self._attach(name, site)
        self.reinit()
        freeze_base(model)
        self.train(model.training)

    def _attach(self, name: str, site: LinearSite) -> None:
        config, weight = self.config, site.module.weight
        rank, scale, slots = adapter_shape(site, config)
        if rank < config.rank_for(name):
            rows = min(stop - start for start, stop in site.slot_rows(slots))
            warnings.warn(
                f"LoRA rank {config.rank_for(name)} costs more than the full {rows} x {site.in_features} matrix; "
                f"using {rank}",
                stacklevel=4,
            )
        dtype = getattr(torch, config.adapter_dtype) if config.adapter_dtype else weight.dtype
        key = adapter_key(name)
        self.adapters[key] = LoraAdapter(site, rank, scale, slots, config.lora_dropout, dtype, weight.device)
        handle = site.module.register_forward_hook(_DeltaHook(self, key))
        weakref.finalize(self, handle.remove)

    def reinit(self, parent_model=None) -> None:
        """Back to the initial values. SAT calls it for a mixin that a checkpoint does not hold; twice does no harm."""
        for adapter in self.adapters.values():
            adapter.reset_parameters(self.config.seed)

    def adapter_for(self, name: str) -> LoraAdapter:
        """The adapter of the linear with that name."""
        return self.adapters[adapter_key(name)]

    @non_conflict
    def _in_scope(self, *args, old_impl=None, **kw_args):
        """What every hook below does: run what was there before, with the deltas switched on."""
        before, self._open = self._open, True
        try:
            return old_impl(*args, **kw_args)
        finally:
            self._open = before

    word_embedding_forward = attention_forward = cross_attention_forward = mlp_forward = final_forward = _in_scope


class _DeltaHook:
    """A forward hook that holds its mixin weakly, so that a deleted mixin is freed."""

    def __init__(self, mixin: LoraMixin, key: str):
        self._mixin, self._key = weakref.ref(mixin), key

    def __call__(self, module, args, output):
        mixin = self._mixin()
        if mixin is None or not (mixin._open and mixin.enabled):
            return None
        return mixin.adapters[self._key](output, args[0])


def adapter_shape(site: LinearSite, config: LoraConfig) -> tuple[int, float, tuple[str, ...]]:
    """(rank in effect, scale, adapted slots) that `config` gives to a linear."""
    slots = tuple(slot for slot in site.slot_names if slot in config.qkv_slots)
    smallest = min(stop - start for start, stop in site.slot_rows(slots))
    rank = bounded_rank(config.rank_for(site.name), site.in_features, smallest)
    return rank, config.scale_for(site.name, rank), slots


def adapter_key(name: str) -> str:
    """A linear's name as a key of nn.ModuleDict, which does not take dots."""
    return name.replace(".", "/")


def sat_models(model: BaseModel) -> dict[str, BaseModel]:
    """The model itself under "", and each SAT model inside it, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseModel)}


def lora_mixins(model: nn.Module) -> dict[str, LoraMixin]:
    """Every LoraMixin in the model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraMixin)}


def add_lora(model: BaseModel, config: LoraConfig | None = None, *, name: str = "lora", **fields) -> list[LoraMixin]:
    """Put a LoraMixin on the model and on every SAT model inside it that `config` selects linears of."""
    config = config if config is not None else LoraConfig(**fields)
    sites = {n: site for path, inner in sat_models(model).items() for n, site in find_linears(inner, path).items()}
    return place_mixins(model, config, set(select(sites, config)), name)


def place_mixins(model: BaseModel, config: LoraConfig, chosen: set[str], name: str) -> list[LoraMixin]:
    """A LoraMixin called `name` on every SAT model in `model` that holds some of the `chosen` linears."""
    taken = [f"{path}.mixins.{name}".lstrip(".") for path, inner in sat_models(model).items() if name in inner.mixins]
    if taken:
        raise ConfigError(f"the model has a mixin {' and '.join(taken)} already; delete it or choose another name")
    mixins = []
    for path, inner in sat_models(model).items():
        own = {site_name: site for site_name, site in find_linears(inner, path).items() if site_name in chosen}
        if own:
            mixins.append(LoraMixin(inner, config, sites=own))
            inner.add_mixin(name, mixins[-1])
    freeze_base(model)
    return mixins


def freeze_base(model: nn.Module) -> None:
    """Make every parameter untrainable except those of LoRA mixins: decided by asking modules, not by names."""
    trainable = {id(p) for mixin in lora_mixins(model).values() for p in mixin.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)

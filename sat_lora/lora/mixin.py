"""LoraMixin: low-rank deltas inside a SAT model's own hooks. No module is replaced, no base weight renamed."""

import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from sat_lora._sat import BaseMixin, BaseModel, non_conflict
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.base_parameters import StandIn, TrainedBase, freeze_base, keep_trained_set
from sat_lora.lora.config import LOFTQ, LoraConfig
from sat_lora.lora.delta_hook import DeltaHook, DeltaState, has_adapter
from sat_lora.lora.deltas.merging import MergedWeights
from sat_lora.lora.gradient_order import GradientOrder
from sat_lora.lora.targets import Plan, Target, find_parameters, find_sites, plan
from sat_lora.parallel.wrapped import is_engine, is_in_engine
from sat_lora.printable import printable
from sat_lora.quantized.layers import quantized_weight_of


class LoraMixin(BaseMixin):
    """The adapters of one SAT model: `model.add_mixin("lora", LoraMixin(model, r=16, lora_alpha=32))`.

    Each adapted layer has a forward hook that adds its delta, but only while one of the SAT hooks below runs. Those
    run again when an activation checkpoint is recomputed, so gradients are right with checkpointing; and once the
    mixin is deleted from the model nobody opens the scope, so the base model is what it was, bit for bit.

    Only adapters are left trainable, and what `modules_to_save` and `bias` name. A SAT model inside this one
    (CogVLM's vision transformer) needs a mixin of its own, because its layers are recomputed on their own: `add_lora`
    places them all.
    """

    holds_adapters = True  # asked by `targets.own_modules`: nothing in here is a part of the base
    adapter_class = LoraAdapter

    def __init__(
        self,
        model: BaseModel | None,
        config: LoraConfig | None = None,
        *,
        planned: Plan | None = None,
        fixed_order: bool = False,
        **fields: Any,
    ):
        """Adapt the layers of `model` that the config selects; None leaves a mixin without adapters.

        `fields` are those of LoraConfig, if no `config` is given; `planned`, if given, is taken as selected.
        fixed_order: for a model whose graph depends on the data, see `add_lora`.
        """
        super().__init__()
        self._state = DeltaState(fixed_order=fixed_order)
        self.config = config if config is not None else LoraConfig(**fields)
        self.adapters = nn.ModuleDict()
        self.targets: dict[str, Target] = {}
        self.trained = TrainedBase({})
        self._wraps_layers = False
        self._order: GradientOrder | None = None
        self._loading = Loading()
        self.register_load_state_dict_pre_hook(_look_into_checkpoint)
        self.register_state_dict_post_hook(_describe)
        if model is not None:
            refuse_engine(model)
            if planned is None:
                planned = plan(find_sites(model), find_parameters(model), self.config)
                refuse_loftq(planned.targets, self.config)
            self._attach(model, planned)

    def _attach(self, model: BaseModel, planned: Plan) -> None:
        refuse_engine(model)
        _refuse_other_lora(model, planned.targets)
        refuse_lost_originals(planned.targets, self.config)
        if self.fixed_order and planned.trained:
            raise ConfigError(
                f"fixed_order: {', '.join([*planned.trained][:5])} would train whole, and the base's own layers use "
                "them where they run; leave out modules_to_save and bias"
            )
        self._model = _ModelReference(model)
        self.targets = planned.targets
        for name, target in planned.targets.items():
            layer = target.site.module
            weight = layer.weight
            key = adapter_key(name)
            dtype = getattr(torch, self.config.adapter_dtype) if self.config.adapter_dtype else weight.dtype
            self.adapters[key] = self.adapter_class(target, self.config, dtype, weight.device)
            weakref.finalize(self, DeltaHook(self._state, self.adapters[key]).attach(layer))
        self._wraps_layers = "layer_forward" in model.hooks
        self._order = GradientOrder([*self.adapters.values()], self._inner_orders) if self.fixed_order else None
        self.trained = TrainedBase(planned.trained)
        weakref.finalize(self, self.trained.give_back).atexit = False
        self.reinit()
        freeze_base(model, self)
        keep_trained_set(model)
        _AddedOnce.put_on(model)
        if _after_loading not in model._load_state_dict_post_hooks.values():
            model.register_load_state_dict_post_hook(_after_loading)
        self.train(model.training)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Give the adapters their initial values, over the weights as they are, which count as the base from now on.

        SAT calls it for a mixin that a checkpoint does not hold; twice does no harm.
        """
        self._state.merged = None
        for name, target in self.targets.items():
            self.adapter_for(name).reset_parameters(target.site.module)
        self.trained.remember()
        self._loading.initial = self._versions()

    def _versions(self) -> list[int]:
        """Return how often each adapter parameter was written to, as torch counts."""
        return [0 if p.is_inference() else p._version for p in self.adapters.parameters()]

    def take_loaded_base(self) -> None:
        """Begin anew over weights that were loaded just now, unless the checkpoint or the script gave values.

        DoRA, PiSSA, OLoRA and `modules_to_save` begin with what the base holds. SAT calls `reinit` for mixins of the
        outermost model alone, and other loops do not call it.
        """
        if not self._loading.has_values and self._loading.initial == self._versions():
            self.reinit()

    def refuse_foreign_layers(self, model: nn.Module) -> None:
        """Raise ConfigError if a delta reaches nothing: the mixin is on another SAT model than the one it was made for,
        or a layer that it adapts is not in `model`.
        """
        modules = [*model.modules()]
        owners = [m for m in modules if isinstance(m, BaseModel) and any(own is self for own in m.mixins.values())]
        if self.targets and owners and self._model() is not owners[0]:
            raise ConfigError(
                f"a LoRA mixin on the {type(owners[0]).__name__} was made for another model, "
                f"{next(iter(self.targets))} its first layer; give LoraMixin the model that it is added to, or take "
                "add_lora, which makes one for each"
            )
        present = {id(module) for module in modules}
        lost = [name for name, target in self.targets.items() if id(target.site.module) not in present]
        if lost:
            raise ConfigError(
                f"{len(lost)} layers that LoRA adapts were replaced after it was added, {lost[0]} first: their deltas "
                "reach nothing. SAT's lora2 and quantisation replace layers; take one LoRA for a layer, and quantise "
                "before LoRA is added"
            )

    def adapter_for(self, name: str) -> LoraAdapter:
        """Return the adapter of the layer with that name."""
        adapter: LoraAdapter = self.adapters[adapter_key(name)]
        return adapter

    def trainable(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that train: those of the adapters, and whole ones of the base."""
        yield from (p for adapter in self.adapters.values() for p in adapter.trainable())
        yield from self.trained.tensors.values()

    @property
    def fixed_order(self) -> bool:
        """Whether gradients come in one order whatever the batch holds, see `add_lora`."""
        return self._state.fixed_order

    @property
    def scale(self) -> float:
        """What multiplies every delta, at run time; may be set."""
        return self._state.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._state.scale = value

    # Verbs

    @property
    def enabled(self) -> bool:
        """Whether deltas are added and base parameters have their trained values; may be set."""
        return self._state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self.merged and not value:
            raise ConfigError("the deltas are merged into the weights; unmerge() before disable()")
        if value != self._state.enabled:
            self.trained.swap()
            self._state.enabled = value

    def enable(self) -> None:
        """Add the deltas again, and bring back the trained values of base parameters."""
        self.enabled = True

    def disable(self) -> AbstractContextManager["LoraMixin"]:
        """Leave the base as it was until `enable`, and return a context manager that enables it at its end: it goes
        with `with mixin.disable():`, and need not be used.

        Raises ConfigError while the deltas are merged.
        """
        self.enabled = False
        return _enabled_afterwards(self)

    @property
    def merged(self) -> bool:
        """Whether the deltas are written into the weights at present."""
        return self._state.merged is not None

    def merge(self, *, keep_original: bool = True) -> None:
        """Write the deltas into the weights, so that a forward pass costs what the base does. Every rank calls it.

        They are computed in float32 and rounded once to the weight's dtype, in the layer as it is, cut or not.
        keep_original: the replaced weights wait on the CPU for a bit-exact `unmerge`. Raises MergeError, with nothing
        changed, if a merged weight would not be finite or is used elsewhere too; ConfigError while disabled.
        """
        if not self.enabled:
            raise ConfigError("the mixin is disabled; enable() before merge()")
        if not self.merged:
            pairs = [(target.site.module, self.adapter_for(name)) for name, target in self.targets.items()]
            self._state.merged = MergedWeights(pairs, self.scale, self._model(), keep_original=keep_original)

    def unmerge(self) -> None:
        """Take the deltas out again: bit for bit if the originals were kept, else by subtraction, with rounding."""
        merged = self._state.merged
        if merged is not None:
            merged.undo()
            self._state.merged = None

    def originals(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return (parameter of the base, what it was before) of all trained or merged ones; None if that is gone."""
        merged = self._state.merged
        replaced = [] if merged is None else merged.originals()
        return None if replaced is None else [*self.trained.originals(), *replaced]

    # SAT's hooks

    @non_conflict
    def _in_scope(self, *args: Any, old_impl: Callable[..., Any], **kw_args: Any) -> Any:
        """Run what was there before, with the deltas switched on, and return its result: what every hook below does."""
        state = self._state
        before = state.scope_is_open
        state.scope_is_open = True
        try:
            return old_impl(*args, **kw_args)
        finally:
            state.scope_is_open = before

    position_embedding_forward = final_forward = cross_attention_forward = mlp_forward = _in_scope

    @non_conflict
    def word_embedding_forward(self, *args: Any, old_impl: Callable[..., Any], **kw_args: Any) -> Any:
        """Return SAT's embeddings (batch, seq, hidden), with the deltas switched on while they are made."""
        if self._order is None:
            return self._in_scope(*args, old_impl=old_impl, **kw_args)
        if any(hasattr(parameter, "ds_id") for parameter in self.adapters.parameters()):
            refuse_branches({"LoRA": self})
        return self._order.embed(lambda: self._in_scope(*args, old_impl=old_impl, **kw_args))

    @non_conflict
    def attention_forward(
        self, hidden_states: torch.Tensor, *args: Any, old_impl: Callable[..., Any], **kw_args: Any
    ) -> Any:
        """Return a layer's attention (batch, seq, hidden), with the deltas switched on; a layer begins with it."""
        if self._order is not None:
            hidden_states = self._order.enter_layer(int(kw_args["layer_id"]), hidden_states)
        return self._in_scope(hidden_states, *args, old_impl=old_impl, **kw_args)

    def _inner_orders(self) -> list[GradientOrder]:
        """Return the gradient orders of the mixins on SAT models inside this one's."""
        inner = lora_mixins(self._model()).values()
        return [mixin._order for mixin in inner if mixin is not self and mixin._order is not None]

    @property
    def layer_forward(self) -> Callable[..., Any]:
        """SAT's hook, there only if another mixin has it too: with it SAT calls no layer as a module any more."""
        if not self._wraps_layers:
            raise AttributeError("layer_forward")
        in_scope: Callable[..., Any] = self._in_scope
        return in_scope


@contextmanager
def _enabled_afterwards(mixin: LoraMixin) -> Iterator[LoraMixin]:
    try:
        yield mixin
    finally:
        mixin.enable()


class _ModelReference:
    """A weak reference that, in a copied model, refers to the copy."""

    def __init__(self, model: BaseModel):
        self._reference = weakref.ref(model)

    def __call__(self) -> BaseModel:
        return self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ModelReference":
        return _ModelReference(memo.get(id(self()), self()))


def adapter_key(name: str) -> str:
    """Return a layer's name as a key of nn.ModuleDict, which does not take dots."""
    return name.replace(".", "/")


def lora_mixins(model: nn.Module) -> dict[str, LoraMixin]:
    """Return every LoraMixin in the model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraMixin)}


def refuse_branches(mixins: Mapping[str, LoraMixin]) -> None:
    """Raise ConfigError, for ZeRO-3, where the model of the mixins may skip layers by what its batch holds."""
    for name, mixin in mixins.items():
        if mixin.fixed_order:
            raise ConfigError(
                f"ZeRO stage 3: {name} was added with fixed_order, so the model may skip layers by what its batch "
                "holds. Stage 3 gathers the weights of each layer that runs from all ranks; a rank that skips one "
                "leaves the others waiting for ever. Use stage 2, or a model that runs every layer on every batch"
            )


_WRAPPERS = {
    "DeepSpeedEngine": "deepspeed.initialize",
    "DistributedDataParallel": "DistributedDataParallel",
    "DataParallel": "DataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
}
"""What is made around a model, by the name of its class, and what makes it."""


def refuse_engine(model: nn.Module) -> None:
    """Raise ConfigError if the model is wrapped or compiled already: what is around it would not know new adapters."""
    classes = {base.__name__ for base in type(model).__mro__}
    wrapper = next((name for name in _WRAPPERS if name in classes), None)
    if wrapper not in (None, "DeepSpeedEngine"):
        raise ConfigError(
            f"the model is wrapped in {wrapper} already, which would not know new adapters; add them to the model "
            f"itself, before {_WRAPPERS[wrapper]}"
        )
    compiled = next((name for name, module in model.named_modules() if _is_compiled(module)), None)
    if compiled is not None:
        raise ConfigError(
            f"{printable(compiled) or 'the model'} is compiled already, and what is compiled may not see new adapters; "
            "add them before .compile()"
        )
    if is_engine(model) or is_in_engine(model):
        what = "is DeepSpeed's engine" if is_engine(model) else "is in DeepSpeed's engine"
        raise ConfigError(
            f"the model {what} already, whose optimizer holds the parameters that it was made with; add the adapters "
            "before deepspeed.initialize, or before training_main"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called: what torch compiles by it takes later hooks for none."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _refuse_other_lora(model: BaseModel, targets: dict[str, Target]) -> None:
    """Raise ConfigError if one of the layers is inside of SAT's own lora2, which has put its layer around it."""
    around = {
        id(child): name
        for name, m in model.named_modules()
        if type(m).__name__ == "LoraLinear"
        for child in m.children()
    }
    taken = sorted({around[id(target.site.module)] for target in targets.values() if id(target.site.module) in around})
    if taken:
        raise ConfigError(
            f"{len(taken)} layers have SAT's own lora2 on them already, {taken[0]} first; take one LoRA for a layer: "
            "leave out SAT's mixin, or these layers by exclude_modules"
        )


def refuse_lost_originals(targets: Mapping[str, Target], config: LoraConfig) -> None:
    """Raise ConfigError where LoftQ would need a weight of which only the codes are left."""
    if config.init_lora_weights != LOFTQ:
        return
    for name, target in targets.items():
        weight = quantized_weight_of(target.site.module)
        if weight is not None and not weight.has_original:
            weight.read_original(f"{name}.weight")


def refuse_loftq(targets: Mapping[str, Target], config: LoraConfig) -> None:
    """Raise ConfigError where LoftQ is asked for and no adapted layer of the whole model is quantised, or the weight
    that it would change is the base of another adapter.
    """
    if config.init_lora_weights != LOFTQ or not targets:
        return
    layers = {name: target.site.module for name, target in targets.items()}
    weights = {name: weight for name, layer in layers.items() if (weight := quantized_weight_of(layer)) is not None}
    if not weights:
        raise ConfigError(
            f"init_lora_weights='loftq': it begins with what quantisation misses, and none of the {len(targets)} "
            "adapted layers is quantised; quantise these first (--quantize nf4, or quantize_model(model, "
            "keep_originals=True)), or take another init_lora_weights, such as pissa"
        )
    taken = [name for name, weight in weights.items() if weight.low_rank is not None or has_adapter(layers[name])]
    if taken:
        why = "has an adapter already" if has_adapter(layers[taken[0]]) else "was changed by an earlier one of loftq"
        raise ConfigError(
            f"init_lora_weights='loftq': it changes the weights of the base, and {taken[0]} {why}, so that this would "
            f"be on another base ({len(taken)} layers); add the adapter of loftq first, and one alone for a layer, or "
            "take another init_lora_weights, such as pissa"
        )


class _AddedOnce(StandIn):
    """Stands for `add_mixin`: a name that is taken is said, where SAT has a bare assertion."""

    method = "add_mixin"

    def __call__(self, name: str, new_mixin: BaseMixin, reinit: bool = False) -> None:
        """Add the mixin as SAT does. Raises ConfigError for a LoRA mixin under a name that is taken, added
        twice, or after the engine was made.
        """
        model = self._model()
        if model is None:
            return
        if getattr(new_mixin, "holds_adapters", False):
            refuse_engine(model)  # the mixin may have been made before there was one
            present = [own_name for own_name, mixin in model.mixins.items() if mixin is new_mixin]
            if name in model.mixins or present:
                taken = present[0] if present else name
                raise ConfigError(f"the model has a mixin {taken!r} already; delete it or choose another name")
        self.original(model, name, new_mixin, reinit=reinit)


class Loading:
    """What a mixin has to know about a checkpoint that is being loaded into its model."""

    has_values = False  # for the adapters
    initial: list[int] | None = None  # of the parameters' versions, after `reinit`


DESCRIPTION = "description"
"""The name, beside the adapters', of what a checkpoint says of a mixin: JSON as bytes, see `adapters.whole_model`."""


def _describe(mixin: LoraMixin, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Put what A and B do not say into a state dict with the adapters of `mixin`: torch's hook."""
    if not mixin.targets:
        return
    layers = {}
    for name, target in mixin.targets.items():
        about = {"kind": target.site.kind.name, "r": target.rank, "scale": target.scale, "slots": target.slots}
        layers[name] = {**about, "rows": target.rows, "blocks": target.site.blocks}
    content = {"config": mixin.config.to_dict(), "layers": layers, "trained": [*mixin.trained.tensors]}
    state[prefix + DESCRIPTION] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _look_into_checkpoint(mixin: LoraMixin, state: dict[str, Any], prefix: str, *more: Any) -> None:
    """Note whether a checkpoint has the adapters of `mixin`, before they are loaded from it: torch's hook.

    Raises AdapterError, one for all of them, if they are of another rank or shape or on other layers.
    """
    state.pop(prefix + DESCRIPTION, None)
    own = {f"{prefix}adapters.{name}": parameter for name, parameter in mixin.adapters.named_parameters()}
    mixin._loading.has_values = any(name in state for name in own)
    whole = {name: parameter for name, parameter in own.items() if not hasattr(parameter, "ds_id")}
    wrong = [name for name, parameter in whole.items() if name in state and state[name].shape != parameter.shape]
    if wrong:
        name = wrong[0]
        raise AdapterError(
            f"the checkpoint's adapters do not fit those of the model, {len(wrong)} tensors, {name} first: shape "
            f"{tuple(state[name].shape)}, the model has {tuple(own[name].shape)}; add LoRA with the rank (now r="
            f"{mixin.config.r}), the slots and the model-parallel size that the checkpoint was trained with"
        )
    expected = dict.fromkeys(f"{prefix}adapters.{name}" for name in mixin.adapters.state_dict())
    saved = [name for name in state if name.startswith(f"{prefix}adapters.")]
    lacking = [name for name in expected if name not in state]
    unknown = [name for name in saved if name not in expected]
    if expected and saved and (lacking or unknown):  # SAT would begin all of them anew, or drop what it does not know
        differing = [f"{len(lacking)} tensors of the model are not in it, {lacking[0]} first"] if lacking else []
        differing += [f"{len(unknown)} of it are not in the model, {printable(unknown[0])} first"] if unknown else []
        raise AdapterError(
            f"the checkpoint's adapters are on other layers than the model's: {'; '.join(differing)}; add LoRA with "
            "target_modules, layers_to_transform, use_dora and init_lora_weights as in its training"
        )


def _after_loading(model: nn.Module, keys: Any) -> None:
    """Let the model's mixins see the base that was loaded: torch's hook."""
    for mixin in model.mixins.values():
        if isinstance(mixin, LoraMixin):
            mixin.take_loaded_base()

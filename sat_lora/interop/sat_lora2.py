"""SAT's own LoRA, `sat.model.finetune.lora2`, as a drop-in: arguments, targets, scale and methods are SAT's.

    from sat_lora.interop.sat_lora2 import LoraMixin  # was: from sat.model.finetune.lora2 import LoraMixin

    model.add_mixin("lora", LoraMixin(num_layers, r=16, layer_range=[0, 1]), reinit=True)
    ...
    model.get_mixin("lora").merge_lora()

As in SAT 0.4.12:

- r is the rank and lora_alpha / r the scale, whatever the layer's size: a rank that costs more than the full matrix is
  not lowered, as it is by `sat_lora.LoraMixin`.
- A begins Kaiming-uniform with a = sqrt(5) for each slot, B with zeros. (Here A is drawn from a seed and the layer's
  name, not from torch's global generator.)
- What is trainable stays so when the mixin is added, and what a script's `disable_untrainable_params` looks for is
  there, since names are `mixins.lora.adapters.transformer/layers/0/attention/dense.matrix_A`.
- After `merge_lora` a saved checkpoint is one of the plain model.

Different:

- Once `disable_untrainable_params` has been called, as SAT's `training_main` does, nothing but adapters is trainable; a
  warning names what else the script would have trained. `sat_lora.freeze_base(model)` does so without SAT's trainer.
- No module is replaced and no base weight renamed, so a checkpoint of the plain model loads before and after
  `add_mixin`. One that SAT's own lora2 was saved in loads after it, on one model-parallel rank, if r and the layers are
  the same; of other layers, or more ranks, `sat-lora import --from lora2` makes an adapter.
- `reinit` twice sets the adapters back to their initial values; SAT fails there.
- More than one model-parallel rank works. SAT adds to `dense` what each rank computed from its own part of A, without
  the sum over ranks.
- `merge_lora` writes into the layers that are there, which stay parallel ones; SAT puts nn.Linear in their place.
- `model.del_mixin("lora")` gives the base back.
- SAT's `load_checkpoint` with mode="inference" refuses a plain checkpoint for an adapted model, since the adapters'
  names are missing in it; load first and add afterwards. With mode="finetune" either order works.
- qlora=True is refused. (SAT 0.4.12 fails there as well, at a dtype that it has not set.)
"""

import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sat_lora._sat import BaseModel
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.lora import mixin
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.config import LoraConfig
from sat_lora.lora.targets import Plan, Target, find_sites
from sat_lora.parallel.sharding import model_parallel_layout
from sat_lora.printable import printable

_LAYER = r"(.*\.)?transformer\.layers\.\d+\."
_SELF_ATTENTION = ("attention.dense", "attention.query_key_value")
_CROSS_ATTENTION = ("cross_attention.dense", "cross_attention.query", "cross_attention.key_value")
_NAMES = {"A": "matrix_A", "B": "matrix_B"}
_QLORA = (
    "qlora=True would replace the base's layers by 4-bit ones, and here no layer is replaced. Instead: qlora=False on "
    "a base that sat_lora.quantize_model(model, scheme='nf4') holds in 4 bits, or on the bf16 base with ZeRO-3 or "
    "model parallelism"
)


class _NamedAsInSat(LoraAdapter):
    """A and B are `matrix_A` and `matrix_B` by name, since scripts choose by these names what trains (CogVLM's do)."""

    leaves = ("matrix_A", "matrix_B")

    def __init__(self, *args):
        super().__init__(*args)
        self.shardings |= {_NAMES[leaf]: self.shardings[leaf] for leaf in _NAMES}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(_NAMES.get(name, name), param)

    @property
    def A(self) -> nn.Parameter:
        return self.matrix_A

    @property
    def B(self) -> nn.Parameter:
        return self.matrix_B


class LoraMixin(mixin.LoraMixin):
    """LoRA on the self-attention of some layers, and on the cross-attention where a layer has one; see the module."""

    adapter_class = _NamedAsInSat

    def __init__(
        self,
        layer_num: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        layer_range: Iterable[int] | None = None,
        qlora: bool = False,
        cross_attention: bool = True,
    ):
        """Keep the arguments; the mixin is attached by `reinit`, as in SAT.

        layer_range: numbers of the adapted layers, all `layer_num` if None.
        """
        layers = _layer_numbers(layer_num, layer_range)
        problems = [*_problems(r, layers, qlora)]
        if problems:
            raise ConfigError("LoraMixin: " + "; ".join(problems))
        leaves = _SELF_ATTENTION + (_CROSS_ATTENTION if cross_attention else ())
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout or 0.0,  # SAT takes None too
            target_modules=_LAYER + "(" + "|".join(leaf.replace(".", r"\.") for leaf in leaves) + ")",
            layers_to_transform=layers,
        )
        super().__init__(None, config)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = lora_alpha / r
        self.layer_range = list(layers)
        self.qlora = qlora
        self.cross_attention = cross_attention
        self._merged_away: tuple[dict[str, Target], nn.ModuleDict] | None = None

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Attach to the model at the first call; afterwards set the adapters back, over the weights as they are.

        After `merge_lora` these are the merged ones, or those of a checkpoint that was loaded over them.
        """
        self._bring_back()
        self._state.merged = None
        if self.targets:
            super().reinit(parent_model)
        elif parent_model is None:
            raise ConfigError('LoraMixin: not on a model yet; model.add_mixin("lora", LoraMixin(...), reinit=True)')
        else:
            self._attach_as_sat(parent_model)

    def merge_lora(self) -> None:
        """Write the deltas into the weights for good; the adapters leave the model's state. Every rank calls it.

        Raises MergeError as `merge` does. `unmerge` subtracts the deltas again, with rounding.
        """
        if not self.targets:
            raise ConfigError("merge_lora: there are no adapters; they are merged already, or reinit was never called")
        self.merge(keep_original=False)
        self._merged_away = (self.targets, self.adapters)
        self.targets = {}
        self.adapters = nn.ModuleDict()

    def unmerge(self) -> None:
        """Take the deltas out of the weights again, with the adapters that `merge_lora` has put away."""
        self._bring_back()
        super().unmerge()

    def _bring_back(self) -> None:
        if self._merged_away is not None:
            self.targets, self.adapters = self._merged_away
            self._merged_away = None
            for name, target in self.targets.items():
                self.adapter_for(name).to(target.site.module.weight.device)

    def _attach_as_sat(self, model: BaseModel) -> None:
        """Attach, and leave trainable what was: which base parameters train is for the script to say."""
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._attach(model, Plan(self._targets_in(model)))
        for parameter, trains in trainable:
            parameter.requires_grad_(trains)
        if all(getattr(hook, "hook", None) is not _take_sats for hook in model._load_state_dict_pre_hooks.values()):
            model.register_load_state_dict_pre_hook(_take_sats)
        if self._wraps_layers:
            model.collect_hooks_()  # add_mixin did so before `reinit`, when this was not known

    def _targets_in(self, model: BaseModel) -> dict[str, Target]:
        """Return SAT's targets, by name, with r and the scale as they were given."""
        layers = model.transformer.layers
        sites = {id(site.module): site for site in find_sites(model).values()}
        outside = sorted(number for number in self.layer_range if not 0 <= number < len(layers))
        if outside:
            raise ConfigError(f"layer_range: the model has layers 0 to {len(layers) - 1}, not {outside}")
        targets = {}
        for number in self.layer_range:
            for leaf in self._leaves_of(layers[number]):
                module = layers[number].get_submodule(leaf)
                if id(module) not in sites:
                    raise ConfigError(
                        f"transformer.layers.{number}.{leaf} is a {type(module).__name__}, which takes no adapter; "
                        "SAT's own lora2 and quantisation replace layers and cannot be there before"
                    )
                site = sites[id(module)]
                targets[site.name] = Target(site, self.r, self.scaling, site.slot_names)
        return targets

    def _leaves_of(self, layer: nn.Module) -> tuple[str, ...]:
        return _SELF_ATTENTION + (_CROSS_ATTENTION if self.cross_attention and layer.is_decoder else ())


_SATS = re.compile(r"(?P<layer>.+)\.(?P<leaf>original|matrix_A|matrix_B)\.(?P<part>weight|bias|\d+)")


def _take_sats(model: BaseModel, state: dict[str, Any], prefix: str, *more: Any) -> None:
    """Give a checkpoint with SAT's own lora2 in it the names that this model has: torch's hook, before loading.

    Raises AdapterError where lora2 is on layers that the mixins here leave out, or at model-parallel size 2 and more,
    at which what SAT has trained is no single pair.
    """
    matches = [match for key in state if key.startswith(prefix) and (match := _SATS.fullmatch(key[len(prefix) :]))]
    layers = {match["layer"] for match in matches if match["leaf"] != "original"}
    mixins = {name: own for name, own in model.mixins.items() if isinstance(own, LoraMixin)}
    inner = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseModel) and name)
    layers = {layer for layer in layers if not layer.startswith(inner)}  # of a SAT model inside, which is asked itself
    if not layers or not mixins:
        return
    advice = "`sat-lora import --from lora2` makes an adapter of it"
    if model_parallel_layout()[1] > 1:
        raise AdapterError(f"the checkpoint has SAT's own lora2 in it, of model-parallel ranks: {advice}")
    path = {target: f"{prefix}mixins.{name}.adapters." for name, own in mixins.items() for target in own.targets}
    others = sorted(layers - path.keys())
    if others:
        raise AdapterError(
            f"the checkpoint has SAT's own lora2 on layers that the model's mixin leaves out, {printable(others[0])} "
            f"first: give layer_range as in its training, or {advice}"
        )
    factors: dict[str, dict[int, torch.Tensor]] = {}
    for match in (match for match in matches if match["layer"] in layers):
        value = state.pop(prefix + match[0])
        layer = match["layer"]
        if match["leaf"] == "original":
            state[f"{prefix}{layer}.{match['part']}"] = value
        else:
            key = f"{path[layer]}{mixin.adapter_key(layer)}.{match['leaf']}"
            factors.setdefault(key, {})[int(match["part"])] = value
    state |= {key: torch.cat([parts[number] for number in sorted(parts)]) for key, parts in factors.items()}


def _layer_numbers(layer_num: int, layer_range: Iterable[int] | None) -> tuple[int, ...]:
    try:
        numbers = range(layer_num) if layer_range is None else layer_range
        return tuple(dict.fromkeys(operator.index(number) for number in numbers))
    except TypeError as error:
        raise ConfigError(
            "LoraMixin: layer_num has to be a number of layers and layer_range a list of layer numbers, "
            f"got {layer_num!r} and {layer_range!r}"
        ) from error


def _problems(r: int, layers: tuple[int, ...], qlora: bool) -> Iterator[str]:
    if r == 0:
        yield "r=0, which is SAT's default, is no rank (SAT divides by it); give one, r=8 for instance"
    if not layers:
        yield "layer_range names no layer"
    if qlora:
        yield _QLORA

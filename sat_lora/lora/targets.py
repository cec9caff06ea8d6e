"""Which layers of a SAT model can be adapted, and which of them a config selects."""

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sat_lora._sat import BaseModel
from sat_lora.errors import ConfigError
from sat_lora.files.patterns import matches, shortened
from sat_lora.lora.config import SLOTS, LoraConfig, ends_with
from sat_lora.lora.deltas.kinds import kind_of
from sat_lora.lora.deltas.layers import Kind
from sat_lora.parallel.sharding import blocks_of, model_parallel_layout, sharding_of
from sat_lora.quantized.layers import quantized_weight_of

_LAYER = r"((en|de)coder\.)?transformer\.layers\.\d+\."
_VIT = r"mixins\.eva\.vit_model\."
_ENCODER = r"mixins\.encoder\.vit\.model\.blocks\.\d+\."
PRESETS = {
    "language-attention": _LAYER + r"(cross_)?attention\.\w+",
    "language-mlp": _LAYER + r"mlp\.\w+|mixins\.(mlp|gated-mlp)\.(gate_proj|w2|gated_h_to_4h_list)\.\d+",
    "vision-expert-attention": r"mixins\.rotary\.vision_(query_key_value|dense)_list\.\d+",
    "vision-expert-mlp": r"mixins\.mlp\.vision_\w+\.\d+",
    "vit-attention": _VIT + _LAYER + r"attention\.\w+",
    "vit-mlp": _VIT + _LAYER + r"mlp\.\w+",
    "projector": r"mixins\.eva\.linear_proj\.\w+",
    "patch-embedding": r"(.*\.)?patch_embedding\.proj",
    "lm-head": r"(.*\.)?lm_head",
    "cross-attention": _LAYER + r"cross_attention\.\w+",
    "cross-vision-patch-embedding": r"mixins\.encoder\.vit\.model\.patch_embed\.proj",
    "cross-vision-attention": _ENCODER + r"attn\.\w+",
    "cross-vision-mlp": _ENCODER + r"mlp\.\w+",
    "vision-convolution": r"mixins\.eva\.conv",
    "all-linear": r"(?!.*\blm_head$).*",
}
"""What each preset selects. `language-attention` has the cross-attention of its layers with it, as it has had in every
adapter; `cross-attention` is that alone.
"""
OTHER = "other"
_PARTS = {"cross-attention": PRESETS["cross-attention"], **PRESETS}  # where two presets have a layer: of the narrower
# Other models' names of layers that SAT calls otherwise, so that no spelling leads to them.
FOREIGN = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"), "query_key_value"),
    **dict.fromkeys(("o_proj", "out_proj"), "dense"),
    "up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
}


def part_of(name: str) -> str:
    """Return the narrowest preset that has the layer of that name, for tables; "other" where none has it."""
    return next((part for part, regex in _PARTS.items() if part != "all-linear" and re.fullmatch(regex, name)), OTHER)


def layer_of(name: str) -> int | None:
    """Return the layer number in a name; None without one."""
    numbers = re.findall(r"\.([0-9]{1,9})(?=\.|$)", name)
    return int(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class Site:
    """A layer of the base model that can be adapted, seen whole: sizes do not depend on the model-parallel size."""

    name: str  # from the outermost model
    module: nn.Module
    kind: Kind
    in_features: int  # of the weight as a matrix, see `deltas.layers`
    out_features: int
    blocks: tuple[int, ...] = (1,)  # relative sizes of fused parts of the output, (1, 1, 1) for q, k, v

    @property
    def part(self) -> str:
        """The preset that the layer belongs to, see `part_of`."""
        return part_of(self.name)

    @property
    def tower(self) -> str:
        """The name that `layers_to_transform` uses: vit, language, or encoder and decoder on such a model.

        CogAgent's second vision encoder, whose mixin is called `encoder`, is cross-vision.
        """
        if self.name.startswith("mixins.eva.vit_model."):
            return "vit"
        if self.name.startswith("mixins.encoder.vit."):
            return "cross-vision"
        first = self.name.partition(".")[0]
        return "language" if first in ("transformer", "mixins") else first

    @property
    def layer(self) -> int | None:
        """The layer number in the name, see `layer_of`; None without one."""
        return layer_of(self.name)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The slots q, k, v where the output is their fusion (k, v in cross-attention), none elsewhere."""
        is_attention = re.search(r"key_value\w*(\.\d+)?$", self.name)
        return {2: SLOTS[1:], 3: SLOTS}.get(len(self.blocks), ()) if is_attention else ()

    def slot_rows(self, names: tuple[str, ...]) -> list[tuple[int, int]]:
        """Return the rows (start, stop) of the whole W that belong to each named slot, in the order of W.

        They are all rows if the site has no slots.
        """
        if not self.slot_names:
            return [(0, self.out_features)]
        unit = self.out_features // sum(self.blocks)
        edge = 0
        rows = []
        for name, size in zip(self.slot_names, self.blocks):
            if name in names:
                rows.append((edge, edge + unit * size))
            edge += unit * size
        return rows


@dataclass(frozen=True)
class Target:
    """A site that is adapted, and how."""

    site: Site
    rank: int  # in effect
    scale: float
    slots: tuple[str, ...]  # the adapted ones of site.slot_names

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The adapted rows of the whole W, slot by slot."""
        return self.site.slot_rows(self.slots)

    @property
    def slots_count(self) -> int:
        """How many pairs A, B the layer has: one per slot, one where there are none."""
        return max(1, len(self.slots))


@dataclass(frozen=True)
class BaseParameter:
    """A parameter of the base model by its place, since wrappers may exchange the tensor."""

    name: str
    module: nn.Module
    leaf: str

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter that is at this place at present."""
        return self.module._parameters[self.leaf]


@dataclass(frozen=True)
class Plan:
    """What a config selects: layers to adapt, and parameters of the base to train whole, both by name."""

    targets: dict[str, Target]
    trained: dict[str, BaseParameter] = field(default_factory=dict)


_MARKS = ("holds_adapters", "never_runs")
"""What modules say of themselves that are no part of what can be adapted: adapters, and parts that no pass uses."""


def own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of a SAT model without the SAT models inside it, adapters, and parts that never run."""
    for child_name, child in [("", model), *model.named_children()]:
        name = f"{prefix}.{child_name}".strip(".")
        if child is model:
            yield name, child
        elif not isinstance(child, BaseModel) and not any(getattr(child, mark, False) for mark in _MARKS):
            yield from own_modules(child, name)


def find_sites(model: nn.Module, prefix: str = "") -> dict[str, Site]:
    """Return every adaptable layer of one SAT model by name; a SAT model inside it (CogVLM's ViT) has its own mixin."""
    _, size = model_parallel_layout()
    sites = {}
    for name, module in own_modules(model, prefix):
        kind = kind_of(module)
        if kind is not None:
            shape = getattr(module.weight, "ds_shape", module.weight.shape)  # ds_shape: partitioned by ZeRO-3
            whole = torch.empty(sharding_of(module, "weight").full_shape(shape, size), device="meta")
            out_features, in_features = kind.matrix(whole).shape
            blocks = blocks_of(module) if kind.cut == "out" else (1,)
            sites[name] = Site(name, module, kind, in_features, out_features, blocks)
    return sites


def find_parameters(model: nn.Module, prefix: str = "") -> dict[str, BaseParameter]:
    """Return every parameter of one SAT model by name, with the same limits as `find_sites`."""
    return {
        f"{name}.{leaf}".strip("."): BaseParameter(f"{name}.{leaf}".strip("."), module, leaf)
        for name, module in own_modules(model, prefix)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def plan(sites: dict[str, Site], parameters: dict[str, BaseParameter], config: LoraConfig) -> Plan:
    """Return what `config` selects of sites and parameters, with the rank and slots of each layer.

    Raises ConfigError as `select` does; warns where a rank is lowered.
    """
    chosen, trained = select(sites, parameters, config)
    return Plan({name: aim(site, config) for name, site in chosen.items()}, trained)


def select(
    sites: dict[str, Site], parameters: dict[str, BaseParameter], config: LoraConfig
) -> tuple[dict[str, Site], dict[str, BaseParameter]]:
    """Return what `config` adapts of the sites, and what it trains whole of the parameters, both by name.

    Raises one ConfigError that lists every pattern that matches nothing and every contradiction.
    """
    problems: list[str] = []
    trained = _trained_whole(sites, parameters, config, problems)
    whole = {name for name, site in sites.items() if f"{name}.weight" in trained}
    chosen = matching("target_modules", config.target_modules, sites, problems) - whole
    chosen -= matching("exclude_modules", config.exclude_modules, sites, problems)
    layers = config.layers()
    if layers is not None:
        towers = {site.tower for site in sites.values()}
        for tower in sorted(tower for tower in layers.keys() - towers if tower is not None):
            problems.append(f"layers_to_transform: there is no tower {tower!r}, only {' and '.join(sorted(towers))}")
        chosen = {name for name in chosen if _in_layers(sites[name], layers)}
    named = {name for name in chosen if sites[name].slot_names}
    if set(config.qkv_slots) != set(SLOTS) and chosen and not named:
        problems.append(f"qkv_slots={''.join(config.qkv_slots)}: none of the chosen layers has slots q, k, v")
    chosen -= {name for name in named if not set(config.qkv_slots) & set(sites[name].slot_names)}
    if not chosen and not problems:
        problems.append("nothing is left after exclude_modules, layers_to_transform and qkv_slots")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name):
            if chosen and not any(ends_with(layer_name, pattern) for layer_name in chosen):
                problems.append(f"{name}: {_no_name(pattern, 'adapted layer', chosen)}")
    lookups = sorted(name for name in chosen if sites[name].kind.is_embedding)
    for field_name in ("use_dora", "freeze_a"):
        if lookups and getattr(config, field_name):
            problems.append(f"{field_name} does not work on an embedding: {', '.join(lookups)}")
    if config.bias != "none":
        owners = chosen if config.bias == "lora_only" else {name.rpartition(".")[0] for name in parameters}
        biases = {f"{owner}.bias" for owner in owners} & parameters.keys()
        if not biases and not problems:
            problems.append(f"bias={config.bias!r}: there is no bias to train")
        trained |= {name: parameters[name] for name in parameters if name in biases}
    if problems:
        raise ConfigError.of(problems, "LoRA targets: ")
    return {name: site for name, site in sites.items() if name in chosen}, trained


def aim(site: Site, config: LoraConfig) -> Target:
    """Return the target that `config` makes of a site; warns where it lowers the rank."""
    slots = tuple(slot for slot in site.slot_names if slot in config.qkv_slots)
    rows = min(stop - start for start, stop in site.slot_rows(slots))
    wanted_rank = config.rank_for(site.name)
    rank = bounded_rank(wanted_rank, site.in_features, rows)
    if rank < wanted_rank:
        warnings.warn(
            f"LoRA rank {wanted_rank} costs more than the full {rows} x {site.in_features} matrix; using {rank}",
            stacklevel=5,
        )
    if config.init_lora_weights == "orthogonal" and rank % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' wants an even rank; {site.name} is left with {rank}")
    return Target(site, rank, config.scale_for(site.name, rank), slots)


def bounded_rank(rank: int, in_features: int, out_features: int) -> int:
    """Return `rank`, halved until A and B together cost no more than the full matrix: r <= in out / (in + out + 1)."""
    while rank > 1 and rank * (in_features + out_features + 1) > in_features * out_features:
        rank //= 2
    return rank


def _in_layers(site: Site, layers: dict[str | None, frozenset[int]]) -> bool:
    if site.layer is None:
        return False
    return any(site.layer in layers.get(tower, ()) for tower in (None, site.tower))


def matching(field_name: str, patterns: str | tuple[str, ...], sites: dict[str, Site], problems: list[str]) -> set[str]:
    """Return the names of the sites that patterns select, in the forms of `target_modules`.

    To `problems` goes each pattern that matches none, or is no pattern, with `field_name`.
    """
    is_regex = isinstance(patterns, str)
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if pattern in PRESETS:
            regex = PRESETS[pattern]
        else:
            regex = pattern if is_regex else rf"(.*\.)?{re.escape(pattern)}"
        try:
            hits = {name for name in sites if matches(regex, name)}
        except re.error as error:
            problems.append(f"{field_name}: {pattern!r} is not a regular expression: {error}")
            continue
        except ConfigError as error:
            problems.append(f"{field_name}: {error}")
            continue
        if pattern == "all-linear":
            hits = {name for name in hits if sites[name].kind.is_linear}
        if not hits:
            shown = shortened(pattern)
            problems.append(f"{field_name}: {shown} matches no layer; nearest: {_nearest(pattern, sites)}")
        chosen |= hits
    return chosen


def named_whole(patterns: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """Return the names of parameters that modules_to_save means by its patterns, in the order of the names."""
    regexes = [rf"(.*\.)?{re.escape(pattern)}(\..+)?" for pattern in patterns]
    return [name for name in parameters if any(re.fullmatch(regex, name) for regex in regexes)]


def _trained_whole(
    sites: dict[str, Site], parameters: dict[str, BaseParameter], config: LoraConfig, problems: list[str]
) -> dict[str, BaseParameter]:
    """Return the parameters that modules_to_save names, or that lie in a module that it names."""
    chosen: dict[str, BaseParameter] = {}
    if not config.modules_to_save:
        return chosen
    quantized = [f"{name}.weight" for name, site in sites.items() if quantized_weight_of(site.module) is not None]
    for pattern in config.modules_to_save:
        hits = named_whole((pattern,), parameters)
        lacking = named_whole((pattern,), quantized)
        if lacking:
            problems.append(
                f"modules_to_save: {lacking[0]} is quantised and does not train; leave it whole, with keep_modules"
            )
        elif not hits:
            named = {part for name in parameters for part in (name, name.rpartition(".")[0])}
            problems.append(f"modules_to_save: {_no_name(pattern, 'module and no parameter', named)}")
        chosen |= {name: parameters[name] for name in hits}
    return chosen


def _no_name(pattern: str, what: str, names: Iterable[str]) -> str:
    """Return the words for a pattern that names nothing where names alone are taken, and no presets."""
    preset = ": it is a preset of target_modules, and names are wanted here" if pattern in PRESETS else ""
    return f"{pattern!r} matches no {what}{preset}; nearest: {_nearest(pattern, names, presets=())}"


def _nearest(pattern: str, names: Iterable[str], presets: Iterable[str] = PRESETS) -> str:
    suffixes = {re.sub(r"\.\d+$", "", name).rpartition(".")[2] for name in names}
    candidates = [*presets, *sorted(suffixes), *names]
    sat_name = FOREIGN.get(pattern.rpartition(".")[2], pattern)
    count = 4 if sat_name == pattern else 2
    near = difflib.get_close_matches(sat_name, candidates, n=count, cutoff=0.3) or [*presets][:3] + sorted(suffixes)[:3]
    fused = "; q, k and v are one layer, of which qkv_slots takes parts"
    return ", ".join(near) + (fused if sat_name == "query_key_value" != pattern else "")

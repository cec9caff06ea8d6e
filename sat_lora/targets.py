"""Which linears of a SAT model can be adapted, and which of them a config selects."""

import difflib
import re
from dataclasses import dataclass

from torch import nn

from sat_lora._sat import BaseModel, ColumnParallelLinear, RowParallelLinear
from sat_lora.config import SLOTS, LoraConfig
from sat_lora.errors import ConfigError
from sat_lora.sharding import blocks_of, model_parallel_layout, sharding_of

_LAYER = r"transformer\.layers\.\d+\."
_VIT = r"mixins\.eva\.vit_model\."
PRESETS = {
    "language-attention": _LAYER + r"(cross_)?attention\.\w+",
    "language-mlp": _LAYER + r"mlp\.\w+|mixins\.mlp\.gate_proj\.\d+",
    "vision-expert-attention": r"mixins\.rotary\.vision_(query_key_value|dense)_list\.\d+",
    "vision-expert-mlp": r"mixins\.mlp\.vision_\w+\.\d+",
    "vit-attention": _VIT + _LAYER + r"attention\.\w+",
    "vit-mlp": _VIT + _LAYER + r"mlp\.\w+",
    "projector": r"mixins\.eva\.linear_proj\.\w+",
    "lm-head": r"mixins\.lm\.lm_head",
    "all-linear": r"(?!.*\blm_head$).*",
}
OTHER = "other"


@dataclass(frozen=True)
class LinearSite:
    """A linear of the base model, seen whole: sizes do not depend on the model-parallel size."""

    name: str  # from the outermost model
    module: nn.Module
    kind: str  # "column", "row" or "plain"
    in_features: int
    out_features: int
    blocks: tuple[int, ...]  # relative sizes of fused parts of the output, (1, 1, 1) for q, k, v

    @property
    def part(self) -> str:
        """The preset that the linear belongs to, for tables; "other" on models that have no such names."""
        return next((p for p, regex in PRESETS.items() if p != "all-linear" and re.fullmatch(regex, self.name)), OTHER)

    @property
    def tower(self) -> str:
        """The name that `layers_to_transform` uses: "vit", or "language" for the rest."""
        return "vit" if self.name.startswith("mixins.eva.vit_model.") else "language"

    @property
    def layer(self) -> int | None:
        """The layer number in the name, if there is one."""
        numbers = re.findall(r"\.(\d+)(?=\.|$)", self.name)
        return int(numbers[-1]) if numbers else None

    @property
    def slot_names(self) -> tuple[str, ...]:
        """q, k, v (or k, v in cross-attention) where the output is fused, nothing otherwise."""
        return {2: SLOTS[1:], 3: SLOTS}.get(len(self.blocks), ())

    def slot_rows(self, names: tuple[str, ...]) -> list[tuple[int, int]]:
        """Rows of the whole weight that belong to each named slot, in the order of the weight."""
        unit, edge, rows = self.out_features // sum(self.blocks), 0, []
        for name, size in zip(self.slot_names or ("",), self.blocks):
            if name in names or not self.slot_names:
                rows.append((edge, edge + unit * size))
            edge += unit * size
        return rows


def find_linears(model: nn.Module, prefix: str = "") -> dict[str, LinearSite]:
    """Every adaptable linear of one SAT model by name; a SAT model inside it (CogVLM's ViT) has its own mixin."""
    _, size = model_parallel_layout()
    found = {}

    def visit(module: nn.Module, name: str):
        kind = next((k for k, cls in _KINDS.items() if isinstance(module, cls)), None)
        if kind is not None:
            shape = getattr(module.weight, "ds_shape", module.weight.shape)  # ds_shape: partitioned by ZeRO-3
            rows, columns = sharding_of(module, "weight").full_shape(shape, size)
            blocks = blocks_of(module) if kind == "column" else (1,)
            found[name] = LinearSite(name, module, kind, columns, rows, blocks)
        for child_name, child in module.named_children():
            if not isinstance(child, BaseModel):
                visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, prefix.rstrip("."))
    return found


_KINDS = {"column": ColumnParallelLinear, "row": RowParallelLinear, "plain": nn.Linear}


def select(sites: dict[str, LinearSite], config: LoraConfig) -> dict[str, LinearSite]:
    """The sites that `config` selects. ConfigError lists every pattern that matches nothing."""
    problems: list[str] = []
    chosen = _matching("target_modules", config.target_modules, sites, problems)
    chosen -= _matching("exclude_modules", config.exclude_modules, sites, problems)
    layers = config.layers()
    if layers is not None:
        chosen = {name for name in chosen if _in_layers(sites[name], layers)}
    slots = set(config.qkv_slots)
    chosen = {name for name in chosen if not sites[name].slot_names or slots & set(sites[name].slot_names)}
    if not chosen and not problems:
        problems.append("nothing is left after exclude_modules, layers_to_transform and qkv_slots")
    if problems:
        raise ConfigError("LoRA targets (--lora_targets, --lora_exclude): " + "; ".join(problems))
    return {name: site for name, site in sites.items() if name in chosen}


def _in_layers(site: LinearSite, layers: dict[str | None, frozenset[int]]) -> bool:
    if site.layer is None:
        return False
    return any(site.layer in layers.get(tower, ()) for tower in (None, site.tower))


def _matching(field: str, patterns: str | tuple[str, ...], names, problems: list[str]) -> set[str]:
    whole = isinstance(patterns, str)
    chosen: set[str] = set()
    for pattern in (patterns,) if whole else patterns:
        if pattern in PRESETS:
            regex = PRESETS[pattern]
        else:
            regex = pattern if whole else rf"(.*\.)?{re.escape(pattern)}"
        try:
            hits = {name for name in names if re.fullmatch(regex, name)}
        except re.error as error:
            problems.append(f"{field}: {pattern!r} is not a regular expression: {error}")
            continue
        if not hits:
            problems.append(f"{field}: {pattern!r} matches no linear; nearest: {_nearest(pattern, names)}")
        chosen |= hits
    return chosen


def _nearest(pattern: str, names) -> str:
    suffixes = {re.sub(r"\.\d+$", "", name).rpartition(".")[2] for name in names}
    candidates = [*PRESETS, *sorted(suffixes), *names]
    near = difflib.get_close_matches(pattern, candidates, n=4, cutoff=0.3) or [*PRESETS][:3] + sorted(suffixes)[:3]
    return ", ".join(near)

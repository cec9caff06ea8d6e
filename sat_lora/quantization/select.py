"""Which layers of a SAT model a Quantization selects, and why others stay whole."""

import re
from collections import Counter
from dataclasses import replace

from torch import nn

from sat_lora.errors import ConfigError
from sat_lora.lora.apply import find_all_parameters, find_all_sites
from sat_lora.lora.targets import PRESETS, Site, matching, named_whole
from sat_lora.parallel.sharding import model_parallel_layout, sharding_of
from sat_lora.quantization.config import ALL, Patterns, Quantization
from sat_lora.quantized.layers import quantized_weight_of
from sat_lora.quantized.schemes import BLOCKS, block_for

HEAD = re.compile(PRESETS["lm-head"])
SHOWN = 8  # layers in an error


def select_layers(model: nn.Module, quantization: Quantization, *, has_shapes: bool = True) -> dict[str, nn.Module]:
    """Return the layers that are quantised, by name.

    has_shapes: whether the model's shapes are those of the base. Raises one ConfigError that lists every pattern that
    matches nothing, and every layer that cannot be quantised though a pattern which is no preset names it, and why.
    """
    sites = find_all_sites(model)
    problems: list[str] = []
    chosen = matching("quantize_modules", quantization.modules, sites, problems)
    kept = matching("keep_modules", quantization.keep_modules, sites, problems)
    taken_away = chosen & kept
    chosen -= kept
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    trained = named_whole(quantization.trained, find_all_parameters(model))
    reasons = {}
    for name in sites:
        if name in chosen:
            reasons[name] = _reason_to_keep(sites[name], uses, is_trained=f"{name}.weight" in trained)
            if reasons[name] is None and has_shapes:
                reasons[name] = _reason_of_shape(sites[name].module)
    named = _named_one_by_one(quantization.modules, sites)
    refused = [name for name, reason in reasons.items() if reason is not None and name in named]
    problems += [f"quantize_modules: {name} {reasons[name]}; leave it out" for name in refused[:SHOWN]]
    if len(refused) > SHOWN:
        problems.append(f"quantize_modules: {len(refused) - SHOWN} more cannot be quantised")
    selected = {name: sites[name].module for name, reason in reasons.items() if reason is None}
    if not selected and not problems:
        problems.append(_why_nothing(reasons, is_any_kept=bool(taken_away)))
    if problems:
        raise ConfigError.of(problems)
    return selected


def as_encoded(model: nn.Module, quantization: Quantization) -> Quantization:
    """Return the Quantization as it encodes this model, which is still whole: with its number of model-parallel slices
    where the blocks of a slice are not those of the whole, for then the values are other ones.
    """
    _, size = model_parallel_layout()
    layers = select_layers(model, quantization, has_shapes=False) if size > 1 else {}
    weights = [(layer.weight.shape, sharding_of(layer, "weight")) for layer in layers.values()]
    is_even = all(block_for(shape[1]) == block_for(cut.full_shape(shape, size)[1]) for shape, cut in weights)
    return replace(quantization, slices=1 if is_even else size)


def _why_nothing(reasons: dict[str, str | None], *, is_any_kept: bool) -> str:
    """Return the problem that no layer is selected. reasons: why the chosen ones stay whole, by name; is_any_kept:
    whether keep_modules has taken others away.
    """
    causes = [f"{name} {reason}" for name, reason in reasons.items()]
    shown = causes[0] + (f", and {len(causes) - 1} more stay whole" if causes[1:] else "") if causes else ""
    if is_any_kept:
        return f"quantize_modules: nothing is left after keep_modules{shown and f'; {shown}'}; keep fewer layers"
    if not causes:
        return f"quantize_modules: it names no layer; give presets or patterns, such as {ALL}"
    return f"quantize_modules: nothing that it selects can be quantised: {shown}; select other linears"


def _named_one_by_one(patterns: Patterns, sites: dict[str, Site]) -> set[str]:
    """Return the names of the sites that a pattern selects which is no preset."""
    if isinstance(patterns, str):
        return set() if patterns in PRESETS else matching("quantize_modules", patterns, sites, [])
    return matching("quantize_modules", tuple(p for p in patterns if p not in PRESETS), sites, [])


def _reason_to_keep(site: Site, uses: Counter[int], *, is_trained: bool) -> str | None:
    """Return why a layer's weight cannot be quantised, as the rest of a sentence; None where nothing is in the way."""
    layer = site.module
    kind = site.kind
    if quantized_weight_of(layer) is not None:
        return "is quantised already"
    if not kind.is_product:
        return f"is a {type(layer).__name__}, and only linears are quantised"
    if type(layer) not in kind.layers or "weight" not in layer._parameters:
        return f"is a {type(layer).__name__}, which may use its weight in another way than a linear"
    if HEAD.fullmatch(site.name):
        return "is the output head, which stays whole"
    if is_trained:
        return "trains whole, by modules_to_save"
    if uses[id(layer._parameters["weight"])] > 1:
        return "shares its weight with another module"
    if hasattr(layer._parameters["weight"], "ds_id"):
        return "is partitioned by ZeRO-3 already"
    return None


def _reason_of_shape(layer: nn.Module) -> str | None:
    columns = layer.weight.shape[1]
    if block_for(columns) is not None:
        return None
    return f"has rows of {columns} elements on each rank, which blocks of {' or '.join(map(str, BLOCKS))} do not divide"

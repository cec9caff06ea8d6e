"""Several adapters of one base become one: a new adapter whose delta is the weighted sum of theirs, or nearly so.

    cat     sum_i w_i s_i B_i A_i, exactly; the ranks add up
    svd     the best approximation of that sum with a given rank
    linear  (sum_i c_i B_i) (sum_i c_i A_i) with c_i = sqrt(w_i s_i): cheap, and rough because of the cross terms
    ties    linear, with A and B each merged by TIES (arXiv 2306.01708)

Where an adapter lacks a layer or a slot, the others are combined: it adds nothing there, and has no vote in ties.

PEFT's `add_weighted_adapter` gives the same deltas by the same names, except that it takes every method for `linear`
where there is one adapter (here svd lowers its rank), gives every layer of an svd the largest rank that occurs
anywhere, and keeps the first adapter's `use_rslora`, which makes its result sqrt(r) times too strong.
"""

import difflib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial, reduce
from numbers import Real
from pathlib import Path

import torch
from safetensors.torch import save

from sat_lora.adapter_file import CONFIG, WEIGHTS, read_adapter
from sat_lora.atomic import replaced_folder
from sat_lora.combine_factors import cat, linear, svd, ties
from sat_lora.config import SLOTS, LoraConfig
from sat_lora.errors import AdapterError, ConfigError

METHODS, MAJORITY_SIGNS = ("cat", "linear", "svd", "ties"), ("total", "frequency")


def combine_adapters(
    folders: list[str | Path],
    out: str | Path,
    *,
    method: str,
    weights: list[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
) -> None:
    """Write OUT, a new adapter folder, from adapters of one base; for the methods see the top of this file.

    weights: one per folder, by default 1; a negative one subtracts. rank: svd's, by default at each layer the largest
    there. density: the share of the values in A and in B that ties keeps. majority_sign: ties elects signs by the sum
    of values ("total") or by number ("frequency").

    Computed in float32, or float64 for float64 adapters, and rounded once to the adapters' dtype. A layer's scale is
    its largest |w_i s_i|, so that cat keeps the bits of adapters where these are equal. ConfigError (arguments) and
    AdapterError (folders) list everything that is wrong.
    """
    check_arguments(folders, out, method, weights, rank, density, majority_sign)
    sources = read_sources(folders, [1.0] * len(folders) if weights is None else weights, method)
    arithmetic = {
        "cat": cat,
        "linear": linear,
        "svd": partial(svd, rank=rank),
        "ties": partial(ties, density=density, majority_sign=majority_sign),
    }[method]
    entries, tensors = {}, {}
    for name in sorted({name for source in sources for name in source.linears}):
        try:
            entries[name], own = combine_layer(name, [s for s in sources if name in s.linears], arithmetic)
        except torch.linalg.LinAlgError as error:  # values so large that their products overflow
            raise AdapterError(f"{name}: cannot be combined: {error}") from error
        tensors |= own
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    refuse(out, [f"{key}: the combination is not finite in {tensors[key].dtype}" for key in broken])
    config = combined_config([source.config for source in sources], entries)
    for name, entry in entries.items():
        entry["scale"] = config.scale_for(name, entry["r"])  # as a reader of the config gets it, to the last bit
    content = {"peft_type": "LORA", **config.to_dict(), "sat_lora": {**sources[0].own, "linears": entries}}
    try:
        with replaced_folder(out) as temporary:
            (temporary / WEIGHTS).write_bytes(save(dict(sorted(tensors.items())), metadata={"format": "pt"}))
            (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise AdapterError(f"{out}: the combined adapter could not be written: {error}") from error


@dataclass(frozen=True, eq=False)
class Source:
    """One adapter and its weight. `tensors` empties as they are used, to hold either them or their combination."""

    folder: str | Path
    weight: float
    config: LoraConfig
    own: dict
    linears: dict[str, dict]
    tensors: dict[str, torch.Tensor]


def keys_of(name: str, slot: str) -> tuple[str, str]:
    return tuple(".".join(filter(None, (name, slot, leaf))) for leaf in ("lora_A", "lora_B"))


def combine_layer(name: str, holders: list[Source], arithmetic) -> tuple[dict, dict[str, torch.Tensor]]:
    """(entry, tensors by key) of one layer, from the adapters that have it."""
    entries = [source.linears[name] for source in holders]
    seen = dict.fromkeys(slot for entry in entries for slot in entry["slots"])
    slots = tuple(s for s in SLOTS if s in seen) + tuple(s for s in seen if s not in SLOTS)
    strengths = [source.weight * entry["scale"] for source, entry in zip(holders, entries)]
    scale = max(map(abs, strengths)) or 1.0
    pairs = {}
    for slot in slots or ("",):
        triples = [
            (*map(source.tensors.pop, keys_of(name, slot)), strength / scale)
            for source, entry, strength in zip(holders, entries, strengths)
            if slot in (entry["slots"] or ("",))
        ]
        dtype = reduce(torch.promote_types, [factor.dtype for a, b, _ in triples for factor in (a, b)])
        wide = torch.promote_types(dtype, torch.float32)
        pairs[slot] = [t.to(dtype) for t in arithmetic([(a.to(wide), b.to(wide), s) for a, b, s in triples])]
    rank, tensors = max(a.shape[0] for a, _ in pairs.values()), {}
    for slot, (a, b) in pairs.items():  # one rank per layer: a slot that fewer adapters have is filled with zeros
        a, b = (torch.nn.functional.pad(t, by) for t, by in ((a, (0, 0, 0, rank - len(a))), (b, (0, rank - len(a)))))
        tensors |= zip(keys_of(name, slot), (a.contiguous(), b.contiguous()))
    values = dict(entries[0])
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and 0 < len(value) == len(entries[0]["slots"]):  # one item per slot
            items = {s: item for entry in reversed(entries) for s, item in zip(entry["slots"], entry.get(key, ()))}
            values[key] = [items[slot] for slot in slots if slot in items]
    return {**values, "r": rank, "scale": scale, "slots": slots}, tensors


def combined_config(configs: list[LoraConfig], entries: dict[str, dict]) -> LoraConfig:
    """The first config with every entry's rank and scale; patterns for the layers that differ from the most."""
    ranks = {name: entry["r"] for name, entry in entries.items()}
    alphas = {name: entry["scale"] * entry["r"] for name, entry in entries.items()}
    (r, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    # A pattern matches the end of a name too, and some names are the ends of others: hence the "^".
    changes = {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
    }
    selection = ("target_modules", "exclude_modules", "layers_to_transform", "qkv_slots")
    if any(getattr(config, name) != getattr(configs[0], name) for config in configs for name in selection):
        slots = tuple(slot for slot in SLOTS if any(slot in entry["slots"] for entry in entries.values()))
        named = "|".join(map(re.escape, entries))
        changes.update(zip(selection, (named, (), None, slots or configs[0].qkv_slots)))
    if hasattr(configs[0], "init_lora_weights"):  # how the first began says nothing of a sum, and may forbid its ranks
        changes["init_lora_weights"] = "kaiming"
    return replace(configs[0], **changes)


def check_arguments(folders, out, method, weights, rank, density, majority_sign) -> None:
    """ConfigError that lists every argument that is wrong."""
    problems = []
    if isinstance(folders, (str, Path)) or len(folders) < 1:
        problems.append(f"folders has to be a list of at least one adapter folder, got {folders!r}")
    elif weights is not None and (len(weights) != len(folders) or not all(map(_is_finite, weights))):
        problems.append(f"weights has to be one finite number for each of {len(folders)} folders, got {weights!r}")
    for name, value, known in (("method", method, METHODS), ("majority_sign", majority_sign, MAJORITY_SIGNS)):
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1, cutoff=0)[0]
            problems.append(f"there is no {name} {value!r}, did you mean {near!r}? known: {', '.join(known)}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        problems.append(f"rank has to be a whole number of at least 1, got {rank!r}")
    if density is not None and not (_is_finite(density) and 0 < density <= 1):
        problems.append(f"density has to be above 0 and at most 1, got {density!r}")
    if method == "ties" and density is None:
        problems.append("ties needs a density, the share of values that it keeps, for example 0.5")
    given = {"rank": (rank, "svd"), "density": (density, "ties"), "majority_sign": (majority_sign, "ties")}
    for name, (value, owner) in given.items():
        if value not in (None, "total") and method in METHODS and method != owner:
            problems.append(f"{name} is for {owner}, {method} does not use it")
    if Path(out).exists():
        problems.append(f"{out} exists; give a new folder")
    if problems:
        raise ConfigError("combine: " + "; ".join(problems))


def _is_finite(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def read_sources(folders, weights: list[float], method: str) -> list[Source]:
    """The adapters, each read once. AdapterError lists everything that keeps them from being combined."""
    sources, problems = [], []
    for folder, weight in zip(folders, weights):
        try:
            config, own, tensors = read_adapter(folder)
        except AdapterError as error:
            problems.append(str(error))
            continue
        sources.append(Source(folder, weight, config, own, own["linears"], tensors))
        problems += [f"{folder}: {problem}" for problem in _problems_of(own, tensors)]
        if own["base_fingerprint"] != sources[0].own["base_fingerprint"]:
            problems.append(f"{folder}: trained on a base with other names or shapes than {sources[0].folder}")
    for name in sorted({name for source in sources for name in source.linears}):
        entries = {source: source.linears[name] for source in sources if name in source.linears}
        ranks = [entry["r"] for entry in entries.values()]
        if method in ("linear", "ties") and len(set(ranks)) > 1:
            problems.append(f"{name}: {method} wants equal ranks, got {ranks}; svd and cat take any")
        if not all(math.isfinite(source.weight * entry["scale"]) for source, entry in entries.items()):
            problems.append(f"{name}: weight times scale is not finite")
        if len({bool(entry["slots"]) for entry in entries.values()}) > 1:
            problems.append(f"{name}: cut into slots in one adapter and not in another")
    sizes = {}
    for key, tensor in ((key, tensor) for source in sources for key, tensor in source.tensors.items()):
        size = tuple(tensor.shape)[-1:] if key.endswith("A") else tuple(tensor.shape)[:1]
        if sizes.setdefault(key, size) != size:
            problems.append(f"{key}: {sizes[key]} features in one adapter, {size} in another")
    refuse("combine", problems)
    return sources


def _problems_of(own: dict, tensors: dict[str, torch.Tensor]) -> list[str]:
    """What keeps one adapter from being combined with any."""
    layers = own["linears"].items()
    ranks = {key: e["r"] for name, e in layers for slot in e["slots"] or ("",) for key in keys_of(name, slot)}
    trained = set(own.get("trained") or ())
    more = tensors.keys() - ranks.keys() - trained
    magnitudes = {key for key in more if key.endswith(".lora_magnitude")}
    groups = {
        "DoRA magnitudes cannot be combined": magnitudes,
        "whole tensors of the base (modules_to_save, bias) cannot be combined": trained,
        "neither A nor B of an adapted layer": more - magnitudes,
        "missing": ranks.keys() - tensors.keys(),
    }
    problems = [
        f"{what}: {', '.join(sorted(keys)[:8])}{', ...' * (len(keys) > 8)}" for what, keys in groups.items() if keys
    ]
    if not layers:
        problems.append("adapts nothing")
    for key in sorted(ranks.keys() & tensors.keys()):
        tensor, rank = tensors[key], ranks[key]
        if tensor.dim() != 2 or tensor.shape[0 if key.endswith("A") else 1] != rank or rank < 1:
            problems.append(f"{key}: shape {tuple(tensor.shape)} does not go with rank {rank}")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: dtype {tensor.dtype}, a floating-point dtype is wanted")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key}: holds values that are not finite")
    return problems


def refuse(where, problems: list[str]) -> None:
    """AdapterError with the problems, if there are any."""
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise AdapterError(f"{where}: not combined, {len(problems)} problems:\n  {shown}")

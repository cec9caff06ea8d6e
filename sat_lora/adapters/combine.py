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

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from sat_lora.adapters.combine_checks import WHOLE, Source, by_layer, check_arguments, read_sources, refuse
from sat_lora.adapters.combine_factors import cat, linear, svd, ties
from sat_lora.adapters.format import LARGEST_SCALE, PAIR, LayerEntry, SavedAdapter, cut_slots, write_adapter
from sat_lora.adapters.loftq_base import ROUNDS
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.config import SLOTS, LoraConfig
from sat_lora.lora.deltas.delta import Delta
from sat_lora.terminal.notice import warn
from sat_lora.terminal.progress import Progress

Arithmetic = Callable[[list[Delta]], Delta]
Holders = tuple[str, list[Source]]
"""The name of a layer, and the adapters that have it."""


def combine_adapters(
    folders: list[str | Path],
    out: str | Path,
    *,
    method: str,
    weights: list[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    any_base: bool = False,
    progress: Progress[Holders] = iter,
) -> None:
    """Write OUT, a new adapter folder, from adapters of one base; for the methods see the top of this file.

    weights: one per folder, by default 1; a negative one subtracts. rank: svd's, by default at each layer the largest
    there. density: the share of the values in A and in B that ties keeps. majority_sign: ties elects signs by the sum
    of values ("total") or by number ("frequency"). any_base: the adapters may be of different bases with the same
    layers; the result names the first one's. progress: goes through the layers, as tqdm does.

    The sums are made in float32, or float64 for float64 adapters, and rounded once to the adapters' dtype. A layer's
    scale is its largest |w_i s_i|, so that cat keeps the bits of adapters where these are equal. Raises ConfigError
    (arguments) and AdapterError (folders), which list everything that is wrong.
    """
    check_arguments(folders, out, method, weights, rank, density, majority_sign)
    weights = [1.0] * len(folders) if weights is None else weights
    sources = read_sources(folders, weights, method, any_base=any_base)
    combined = combine_sources(sources, _arithmetic(method, rank, density, majority_sign), progress)
    try:
        write_adapter(out, combined)
    except OSError as error:
        raise AdapterError(f"{out}: the combined adapter could not be written: {error}") from error


def _arithmetic(method: str, rank: int | None, density: float | None, majority_sign: str) -> Arithmetic:
    """Return the arithmetic of a method, which takes the arguments that `check_arguments` has passed."""
    if method == "ties" and density is not None:
        return partial(ties, density=density, majority_sign=majority_sign)
    if method == "svd":
        return partial(svd, rank=rank)
    return {"cat": cat, "linear": linear}[method]


def combine_sources(sources: list[Source], arithmetic: Arithmetic, progress: Progress[Holders] = iter) -> SavedAdapter:
    """Return the combination of all layers as an adapter without a folder.

    Raises AdapterError if it is not finite, or too large to be read again.
    """
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, holders in progress(by_layer(sources).items()):
        try:
            layers[name], layer_tensors = combine_layer(name, holders, arithmetic)
        except torch.linalg.LinAlgError as error:  # values so large that their products overflow
            raise AdapterError(f"{name}: cannot be combined: {error}") from error
        tensors |= layer_tensors
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    refuse([f"{key}: the combination is not finite in {tensors[key].dtype}" for key in broken])
    too_strong = [name for name, entry in layers.items() if not abs(entry.scale * entry.r) <= LARGEST_SCALE]
    refuse([f"{name}: its scale would be {layers[name].scale:g}, which no adapter has" for name in too_strong])
    try:
        config = combined_config([source.saved.config for source in sources], layers)
    except ConfigError as error:
        raise AdapterError(f"not combined: {error}; give smaller weights") from error
    # The scale as a reader of the config gets it, to the last bit.
    layers = {name: replace(entry, scale=config.scale_for(name, entry.r)) for name, entry in layers.items()}
    fingerprint = sources[0].saved.base_fingerprint
    combined = SavedAdapter(config, fingerprint, layers, (), tensors, _base(sources), _quantization(sources))
    refuse([f"{name}: the delta leaves float32; give smaller weights" for name in layers if _overflows(combined, name)])
    return combined


def _overflows(adapter: SavedAdapter, name: str) -> bool:
    """Return whether |s| |B| |A|, which no entry of the delta exceeds, is beyond float32."""
    delta = adapter.delta_of(name)
    a, b = (torch.linalg.vector_norm(factor, dtype=torch.float64).item() for factor in (delta.a, delta.b))
    return not abs(delta.scale) * a * b <= LARGEST_SCALE


def _base(sources: list[Source]) -> BaseIdentity | None:
    """Return the first base that says which values it has, or else says anything; None without any."""
    bases = sorted((s.saved.base for s in sources if s.saved.base), key=lambda base: base.values is None)
    return bases[0] if bases else None


def _quantization(sources: list[Source]) -> Mapping[str, Any] | None:
    """Return how the base was quantised while the adapters trained, where all of them say the same; else None.

    LoftQ gives each adapter a base of its own, made with the pair in its file, which no sum holds: that is None too. A
    warning says so where some were trained beside quantised weights.
    """
    first, *others = (source.saved.base_quantization for source in sources)
    if first is not None and ROUNDS not in first and all(note == first for note in others):
        return first
    if first is not None or any(note is not None for note in others):
        warn(
            "the adapters have no quantised base in common that can be made again: some were trained beside whole "
            "weights, quantised in another way, or begun by loftq; the combination notes none, and "
            "`sat-lora merge --onto trained` does not take it"
        )
    return None


def combine_layer(
    name: str, holders: list[Source], arithmetic: Arithmetic
) -> tuple[LayerEntry, dict[str, torch.Tensor]]:
    """Return (entry, tensors by key) of one layer, from the adapters that have it."""
    scale = max(abs(source.scale_of(name)) for source in holders) or 1.0
    rows = {slot: rows for source in holders for slot, rows in source.rows(name).items()}
    order = sorted(rows, key=lambda slot: rows[slot])
    slots = tuple(slot for slot in order if slot != WHOLE)
    spans = tuple(rows[slot] for slot in order)
    dtype, deltas = deltas_by_slot(name, holders, scale)
    stacked = stack([arithmetic(deltas[slot]) for slot in order]).to(dtype)
    entry = LayerEntry(holders[0].saved.layers[name].kind, stacked.rank, scale, slots, spans)
    tensors = dict(zip(PAIR, (stacked.a, stacked.b)))
    return entry, cut_slots(name, slots, [stop - start for start, stop in spans], tensors)


def deltas_by_slot(name: str, holders: list[Source], scale: float) -> tuple[torch.dtype, dict[str, list[Delta]]]:
    """Return (widest dtype in one layer, {slot: the deltas of the adapters that have it}).

    The deltas are in float32 or wider, and their scales are divided by `scale`.
    """
    by_source = [source.deltas(name) for source in holders]
    factors = [factor for deltas in by_source for delta in deltas.values() for factor in (delta.a, delta.b)]
    dtype = reduce(torch.promote_types, [factor.dtype for factor in factors])
    wide = torch.promote_types(dtype, torch.float32)
    by_slot: dict[str, list[Delta]] = {}
    for deltas in by_source:
        for slot, delta in deltas.items():
            by_slot.setdefault(slot, []).append(replace(delta.to(wide), scale=delta.scale / scale))
    return dtype, by_slot


def stack(deltas: list[Delta]) -> Delta:
    """Return the delta of all slots, of the delta of each, all of scale 1.

    r is the largest rank: a layer has one, and a slot that fewer adapters have is filled up with zeros.
    """
    rank = max(delta.rank for delta in deltas)
    a = [pad(delta.a, (0, 0, 0, rank - delta.rank)) for delta in deltas]
    b = [pad(delta.b, (0, rank - delta.rank)) for delta in deltas]
    return Delta(torch.cat(a), torch.cat(b))


def combined_config(configs: list[LoraConfig], layers: dict[str, LayerEntry]) -> LoraConfig:
    """Return the first config with every layer's rank and scale, by patterns where they are not the most common."""
    ranks = {name: entry.r for name, entry in layers.items()}
    alphas = {name: entry.scale * entry.r for name, entry in layers.items()}
    (r, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    # A pattern matches the end of a name too, and some names are the ends of others: hence the "^".
    changes: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "init_lora_weights": "kaiming",  # how the first began says nothing of a sum, and may forbid its ranks
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
    }
    selection = ("target_modules", "exclude_modules", "layers_to_transform", "qkv_slots")
    if any(getattr(config, name) != getattr(configs[0], name) for config in configs for name in selection):
        slots = tuple(slot for slot in SLOTS if any(slot in entry.slots for entry in layers.values()))
        named = "|".join(map(re.escape, layers))
        changes.update(zip(selection, (named, (), None, slots or configs[0].qkv_slots)))
    return replace(configs[0], **changes)

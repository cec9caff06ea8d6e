"""An adapter inside a checkpoint of the whole model, as SAT saves one with a LoraMixin in it.

The mixin's tensors are called `mixins.lora.adapters.transformer/layers/0/attention/dense.A`, and beside them lies
`mixins.lora.description`, the JSON of config and layers as bytes. Checkpoints of older versions lack that, and with it
lora_alpha, which has to be told.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sat_lora.adapters.format import (
    MAGNITUDE,
    PAIR,
    SAT_WEIGHTS,
    LayerEntry,
    SavedAdapter,
    cut_slots,
    plain_config,
    write_adapter,
)
from sat_lora.cogvlm.checkpoints.base_weights import elements
from sat_lora.cogvlm.checkpoints.sat_folder import LORA2, map_weights
from sat_lora.cogvlm.layer_names import kind_named, sharding_named, slot_spans, slots_named
from sat_lora.errors import AdapterError, SatLoraError
from sat_lora.files.foreign import MEBIBYTE, parse_json
from sat_lora.files.step_folders import follow
from sat_lora.lora.apply import whole_name
from sat_lora.lora.base_identity import BaseIdentity, identity_of
from sat_lora.lora.config import LoraConfig
from sat_lora.lora.deltas.kinds import KINDS
from sat_lora.lora.mixin import DESCRIPTION
from sat_lora.parallel.sharding import REPLICATED, Sharding
from sat_lora.printable import printable

_TENSOR = re.compile(
    r"(?P<path>(?:(?P<owner>.+)\.)?mixins\.(?P<mixin>[^.]+)\.)adapters\.(?P<site>[^.]+)\.(?P<leaf>\w+)"
)
_LEAVES = {"matrix_A": "A", "matrix_B": "B"}  # those of `interop.sat_lora2`

LIMIT = 4 * MEBIBYTE  # of a description

State = Mapping[str, torch.Tensor]
LayerOf = dict[str, dict[str, str]]
"""The names of the tensors of each layer, by its whole name and by leaf."""


def is_whole_model(folder: Path) -> bool:
    """Return whether a folder holds the files of a SAT checkpoint."""
    return next(iter(folder.glob(SAT_WEIGHTS)), None) is not None


def adapter_of_whole_model(folder: Path, *, name: str = "lora", lora_alpha: float | None = None) -> SavedAdapter:
    """Return the adapter called `name` in the checkpoint's files in `folder`, at any model-parallel size.

    lora_alpha: as in training, for a checkpoint that does not say it. Raises AdapterError where there is no such
    adapter, the files do not fit each other, or lora_alpha is not known.
    """
    try:
        states = [map_weights(file) for file in sorted(folder.glob(SAT_WEIGHTS))]
        return _adapter(states, folder, name, lora_alpha)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, SatLoraError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        problem = problem.removeprefix(f"{folder}: ")
        raise AdapterError(f"{folder}: a whole model, of which the adapter cannot be read: {problem}") from error


def import_from_whole_model(folder: str | Path, out: str | Path, *, lora_alpha: float | None = None) -> None:
    """Write OUT, an adapter folder, from a SAT folder, or the folder of one of its steps, see `adapter_of_whole_model`.

    Raises AdapterError also where OUT cannot be written.
    """
    folder = follow(folder)
    if not is_whole_model(folder):
        folder = folder / "release"
    if not is_whole_model(folder):
        raise AdapterError(
            f"{folder.parent}: no {SAT_WEIGHTS} in it; give the folder that SAT saved, with latest in it"
        )
    saved = adapter_of_whole_model(folder, lora_alpha=lora_alpha)
    try:
        write_adapter(out, saved)
    except OSError as error:
        raise AdapterError(f"--out: {out} cannot be written: {error}") from error


def _adapter(states: Sequence[State], folder: Path, name: str, lora_alpha: float | None) -> SavedAdapter:
    if any(state.keys() != states[0].keys() for state in states):
        raise AdapterError("its model-parallel ranks hold different names")
    matches = [match for key in states[0] if (match := _TENSOR.fullmatch(key))]
    mixins = sorted({match["mixin"] for match in matches})
    if name not in mixins:
        other = f"; it has {', '.join(map(printable, mixins))}" if mixins else ""
        if any(LORA2.search(key) for key in states[0]):
            other = "; it is one of SAT's own lora2: `sat-lora import --from lora2` makes an adapter of it"
        raise AdapterError(f"no LoRA mixin called {name!r} is in it{other}")
    matches = [match for match in matches if match["mixin"] == name]
    paths = sorted({match["path"] for match in matches})
    described = {path: _description(states[0], path) for path in paths}
    keys: LayerOf = {}
    entries: dict[str, dict[str, Any]] = {}
    for match in matches:
        site = match["site"].replace("/", ".")
        layer = whole_name(match["owner"] or "", site)
        keys.setdefault(layer, {})[_LEAVES.get(match["leaf"], match["leaf"])] = match[0]
        about = described[match["path"]]
        if about is not None:
            entries[layer] = about["layers"][site]
    trained = sorted(
        whole_name(path[: -len(f"mixins.{name}.")].rstrip("."), own)
        for path, about in described.items()
        for own in (about["trained"] if about else [])
    )
    if len(entries) < len(keys):
        if lora_alpha is None:
            raise AdapterError(
                "it was written by a version that kept no lora_alpha beside the adapter: `sat-lora import --from sat "
                f"{printable(str(folder))} --lora-alpha ALPHA --out DIR` makes an adapter of it"
            )
        entries = {layer: _entry_by_name(layer, keys[layer], states, lora_alpha) for layer in keys}
    about = next((about for about in described.values() if about is not None), None)
    config = _config_by_shapes(keys, entries, states) if about is None else LoraConfig.from_dict(about["config"])
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer, leaves in keys.items():
        layers[layer], layer_tensors = _layer(layer, leaves, entries[layer], states)
        tensors |= layer_tensors
    base = {key: _base_sharding(key, states) for key in states[0] if not key.startswith(tuple(paths))}
    tensors |= {key: base[key].unshard([state[key] for state in states]).clone() for key in trained}
    shapes = {key: sharding.full_shape(states[0][key].shape, len(states)) for key, sharding in base.items()}

    def values_at(key: str, index: torch.Tensor) -> torch.Tensor:
        return elements(base[key].unshard([state[key] for state in states]), index)

    identity = identity_of(shapes, values_at)
    if trained:  # their originals are gone
        identity = BaseIdentity(identity.fingerprint, parameters=identity.parameters)
    return SavedAdapter(plain_config(config), identity.fingerprint, layers, tuple(trained), tensors, identity)


def _description(state: State, path: str) -> dict[str, Any] | None:
    """Return what the mixin of that name says of itself; None in a checkpoint that does not hold it."""
    content = state.get(path + DESCRIPTION)
    if content is None:
        return None
    if content.dtype != torch.uint8 or content.numel() > LIMIT:
        raise AdapterError(f"{path}{DESCRIPTION}: {content.numel()} values of {content.dtype} are no description")
    about = parse_json(bytes(content.flatten().tolist()))
    if not isinstance(about, dict):
        raise AdapterError(f"{path}{DESCRIPTION}: wanted an object, got {type(about).__name__}")
    return about


def _layer(
    name: str, keys: dict[str, str], about: dict[str, Any], states: Sequence[State]
) -> tuple[LayerEntry, dict[str, torch.Tensor]]:
    """Return the entry of a layer and its tensors by their names in an adapter file."""
    kind = KINDS[about["kind"]]
    entry = LayerEntry.from_dict(about)
    rows = [stop - start for start, stop in entry.rows]
    cut_rows = Sharding(0, tuple(rows) if entry.slots else tuple(about["blocks"])) if kind.cut == "out" else REPLICATED
    cuts = {"A": Sharding(1) if kind.cut == "in" else REPLICATED, "B": cut_rows, "magnitude": cut_rows}
    whole = {}
    for leaf, key in keys.items():
        whole[leaf] = cuts[leaf.removeprefix("origin_")].unshard([state[key] for state in states]).clone()
    a = whole["A"]
    b = whole["B"]
    rank = entry.r
    slots_count = max(1, len(entry.slots))
    if "origin_A" in whole:  # what PiSSA and OLoRA began with is subtracted in the pair
        pairs = [factor.view(slots_count, rank, -1) for factor in (a, whole["origin_A"])]
        a = torch.cat(pairs, 1).flatten(0, 1)
        b = torch.cat([b, -whole["origin_B"]], 1)
        entry = LayerEntry(entry.kind, 2 * rank, entry.scale, entry.slots, entry.rows)
    if tuple(b.shape) != (sum(rows), entry.r) or len(a) != slots_count * entry.r:
        raise AdapterError(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} are not of rank {rank}")
    stacked = dict(zip(PAIR, (a, b)))
    if "magnitude" in whole:
        stacked[MAGNITUDE] = whole["magnitude"]
    return entry, cut_slots(name, entry.slots, rows, stacked)


def _entry_by_name(name: str, keys: dict[str, str], states: Sequence[State], lora_alpha: float) -> dict[str, Any]:
    """Return what a layer's name and shapes say of it, for a checkpoint of CogVLM without descriptions."""
    weight = f"{name}.weight"
    local = [state[weight] for state in states]
    shape = sharding_named(weight, len(local[0])).full_shape(local[0].shape, len(states))
    rank = states[0][keys["B"]].shape[1]
    slots = slots_named(name)
    kind = kind_named(name, shape[0])
    if kind not in ("column", "row", "linear") or len(states[0][keys["A"]]) != max(1, len(slots)) * rank:
        raise AdapterError(
            f"{name}: only linear layers of a CogVLM, with all of q, k, v, can be read without a description"
        )
    spans = slot_spans(name, shape[0], shape[1]) if slots else {"": (0, shape[0])}
    about = {"kind": kind, "r": rank, "scale": lora_alpha / rank, "slots": [*slots], "blocks": [1]}
    return {**about, "rows": [*spans.values()]}


def _config_by_shapes(keys: LayerOf, entries: dict[str, dict[str, Any]], states: Sequence[State]) -> LoraConfig:
    first = next(iter(entries.values()))
    leaves = next(iter(keys.values()))
    names = "|".join(re.escape(name) for name in sorted(keys))
    return LoraConfig(
        r=first["r"],
        lora_alpha=first["scale"] * first["r"],
        use_dora="magnitude" in leaves,
        target_modules=f"({names})",
        rank_pattern={re.escape(name): about["r"] for name, about in entries.items() if about["r"] != first["r"]},
        init_lora_weights="pissa" if "origin_A" in leaves else "kaiming",
    )


def _base_sharding(key: str, states: Sequence[State]) -> Sharding:
    if len(states) == 1:
        return REPLICATED
    weight = states[0].get(f"{key.rpartition('.')[0]}.weight")
    columns = weight.shape[1] if weight is not None and weight.dim() == 2 else None
    return sharding_named(key, len(states[0][key]) * len(states) if states[0][key].dim() else 0, columns)

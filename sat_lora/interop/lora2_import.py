"""A checkpoint that was trained with SAT's own lora2 becomes an adapter and its base's names.

SAT keeps `<layer>.original.weight` and, for each of q, k, v, `<layer>.matrix_A.0` and `<layer>.matrix_B.0`. The scale,
lora_alpha / r, is not in the checkpoint.

At model-parallel size n each rank trains an A and a B of its own, which SAT does not keep equal, and `merge_lora`
writes s B A of each rank into the rank's part of the weight. That is what is imported: where the ranks' whole factors
are equal, as a pair of rank r; where they differ, as one of rank n r, block by block.

CogVLM's published script also trains some MLPs of the ViT whole: with the base to compare with, they come along.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from sat_lora.adapters.combine import combined_config
from sat_lora.adapters.format import PAIR, LayerEntry, SavedAdapter, cut_slots, write_adapter
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.load import map_weights, weight_files
from sat_lora.cogvlm.layer_names import kind_named, sharding_named, slots_named
from sat_lora.errors import AdapterError
from sat_lora.interop.peft_format import pattern_for
from sat_lora.lora.base_identity import fingerprint_of
from sat_lora.lora.config import LoraConfig
from sat_lora.lora.deltas.delta import Delta
from sat_lora.terminal.progress import Progress

_FACTOR = re.compile(r"(.+)\.matrix_([AB])\.(\d+)")


def import_from_lora2(
    checkpoint: str | Path,
    out: str | Path,
    *,
    lora_alpha: float = 1.0,
    base: str | Path | None = None,
    progress: Progress[tuple[str, set[int]]] = iter,
) -> None:
    """Write OUT, an adapter folder, from a SAT folder of CogVLM trained with lora2 at any model-parallel size.

    lora_alpha: as in training; SAT's default is 1, r comes from the shapes. base: SAT folder of the base; parameters
    that differ from it were trained whole and are taken along, without it they are taken to be the base's.
    progress: goes through the layers, as tqdm does.
    Raises CheckpointError for no SAT folder; AdapterError for no lora2 in it, or factors or a base that do not fit.
    """
    out = Path(out)
    if out.exists():
        raise AdapterError(f"--out: {out} exists; give a new folder")
    states = [map_weights(file) for file in weight_files(checkpoint)]
    if any(state.keys() != states[0].keys() for state in states):
        raise AdapterError(f"{checkpoint}: the model-parallel ranks hold different names; the checkpoint is not whole")
    factors: dict[str, set[int]] = {}
    for key in states[0]:
        match = _FACTOR.fullmatch(key)
        if match:
            factors.setdefault(match[1], set()).add(int(match[3]))
    if not factors:
        raise AdapterError(f"{checkpoint}: no matrix_A, matrix_B of SAT's lora2 in it; give the folder of that run")
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    shapes = _base_shapes(states)
    for name, numbers in progress(sorted(factors.items())):
        try:
            layers[name], layer_tensors = _layer(name, sorted(numbers), states, shapes[f"{name}.weight"], lora_alpha)
            tensors |= layer_tensors
        except (KeyError, RuntimeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    weights = None if base is None else BaseWeights(base)
    trained = {} if weights is None else _differences(states, shapes, weights)
    problems += [
        f"{name}.weight: LoRA is on it, and it differs from the base" for name in layers if f"{name}.weight" in trained
    ]
    tensors |= trained
    problems += [f"{key}: holds values that are not finite" for key, t in tensors.items() if not t.isfinite().all()]
    if problems:
        raise AdapterError(f"{checkpoint} cannot be imported:\n  " + "\n  ".join(problems[:20]))
    fields = LoraConfig(target_modules=pattern_for(layers), modules_to_save=tuple(trained))
    config = combined_config([fields], layers)
    try:
        # Without the base nobody knows what of the checkpoint was trained whole, so its values say nothing.
        identity = None if weights is None else weights.identity
        fingerprint = fingerprint_of(shapes)
        write_adapter(out, SavedAdapter(config, fingerprint, layers, tuple(trained), tensors, identity))
    except OSError as error:
        raise AdapterError(f"--out: {out} cannot be written: {error}") from error


def _base_shapes(states: list[dict]) -> dict[str, tuple[int, ...]]:
    """Return the whole shapes of the base by its own names."""
    shapes = {}
    for key, tensor in states[0].items():
        if torch.is_tensor(tensor) and not _FACTOR.fullmatch(key):
            name = key.replace(".original.", ".")
            rows = len(tensor) * len(states) if tensor.dim() else 0
            shapes[name] = sharding_named(name, rows).full_shape(tensor.shape, len(states))
    return shapes


def _differences(
    states: list[dict], shapes: dict[str, tuple[int, ...]], base: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the whole parameters that differ from the base's, by name.

    Raises AdapterError if the base has other names or shapes.
    """
    if {name: tuple(tensor.shape) for name, tensor in base.items() if torch.is_tensor(tensor)} != shapes:
        raise AdapterError("--base: it has other names or shapes than the checkpoint; give the one it was trained on")
    differing = {}
    for key in (key for key in states[0] if key.replace(".original.", ".") in shapes):
        name = key.replace(".original.", ".")
        weight = shapes.get(f"{name.rpartition('.')[0]}.weight", ())
        columns = weight[1] if len(weight) == 2 else None
        sharding = sharding_named(name, shapes[name][0] if shapes[name] else 0, columns)
        whole = sharding.unshard([state[key] for state in states])
        if not torch.equal(whole.to(base[name].dtype), base[name]):
            differing[name] = whole.clone(memory_format=torch.contiguous_format)
    return differing


def _layer(
    name: str, numbers: list[int], states: list[dict], shape: tuple[int, ...], alpha: float
) -> tuple[LayerEntry, dict[str, torch.Tensor]]:
    """Return (entry, tensors by key) of one layer. Raises ValueError if its factors do not fit."""
    slots = slots_named(name)
    if numbers != list(range(max(1, len(slots)))):
        raise ValueError(f"factors {numbers}, wanted {max(1, len(slots))} from 0 on")
    kind = kind_named(name, shape[0])
    if kind not in ("column", "row"):
        raise ValueError("not a parallel linear of CogVLM's attention")
    by_rank = [[[state[f"{name}.matrix_{leaf}.{n}"] for state in states] for leaf in "AB"] for n in numbers]
    rank = len(states[0][f"{name}.matrix_A.0"])
    deltas = [_join(a, b, kind) for a, b in by_rank]
    if len({len(delta.a) for delta in deltas}) > 1:  # a layer has one rank: no slot is joined more tightly than another
        deltas = [_stack(a, b, kind) for a, b in by_rank]
    rows = [len(delta.b) for delta in deltas]
    joined_rank = len(deltas[0].a)
    if sum(rows) != shape[0] or any(delta.a.shape != (joined_rank, shape[1]) for delta in deltas):
        raise ValueError(f"A {[tuple(delta.a.shape) for delta in deltas]}, B of {rows} rows, the weight is {shape}")
    edges = [sum(rows[:number]) for number in range(len(rows) + 1)]
    entry = LayerEntry(kind, joined_rank, alpha / rank, slots, tuple(itertools.pairwise(edges)))
    sides = [delta.a for delta in deltas], [delta.b for delta in deltas]
    return entry, cut_slots(name, slots, rows, {leaf: torch.cat(side) for leaf, side in zip(PAIR, sides)})


def _join(a: list[torch.Tensor], b: list[torch.Tensor], kind: str) -> Delta:
    """Return one A (r, in) and B (rows, r) if the uncut factor is the same on every rank, else as `_stack`."""
    whole = a if kind == "column" else b
    if any(not torch.equal(whole[0], other) for other in whole):
        return _stack(a, b, kind)
    return Delta(a[0], torch.cat(b)) if kind == "column" else Delta(torch.cat(a, 1), b[0])


def _stack(a: list[torch.Tensor], b: list[torch.Tensor], kind: str) -> Delta:
    """Return A (n r, in) and B (rows, n r): each rank's own product in the part of the weight that it held."""
    if kind == "column":
        return Delta(torch.cat(a), torch.block_diag(*b))
    return Delta(torch.block_diag(*a), torch.cat(b, 1))

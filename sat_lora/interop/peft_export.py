"""An adapter becomes one that the `peft` package loads onto Hugging Face's CogVLM."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from sat_lora.adapters.combine_checks import Source
from sat_lora.adapters.format import CONFIG, MAGNITUDE, PAIR, WEIGHTS, LayerEntry, SavedAdapter
from sat_lora.adapters.read import base_problem, read_adapter, tensor_problems
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name
from sat_lora.cogvlm.families import FAMILIES
from sat_lora.cogvlm.layer_names import has_bias, slots_named
from sat_lora.errors import AdapterError
from sat_lora.files.atomic import replaced_folder
from sat_lora.interop import peft_format
from sat_lora.lora.config import SLOTS
from sat_lora.lora.deltas.dora import row_norms
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.terminal.progress import Progress

IMAGE_CHANNELS = 3
_READ_ALONE = re.compile(r"position_embeddings$|^mixins\.encoder\..*\.[qkv]_proj$")
"""Layers whose weight the published code takes without calling the module."""


def export_to_peft(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    any_base: bool = False,
    progress: Progress[tuple[str, LayerEntry]] = iter,
) -> None:
    """Write OUT, a PEFT adapter folder whose delta on Hugging Face's CogVLM is that of the adapter.

    base: SAT folder of the base, needed where PEFT's file holds values that the adapter does not have: DoRA on some of
    q, k, v, and a module of which only some parameters were trained. any_base: take one that it was not trained on.
    progress: goes through the layers, as tqdm does.
    Raises one AdapterError that lists everything that PEFT cannot hold, and CheckpointError if base is no model folder.
    """
    out = Path(out)
    if out.exists():
        raise AdapterError(f"--out: {out} exists; give a new folder")
    saved = read_adapter(adapter)
    state = None if base is None else BaseWeights(base)
    expected = saved.expected({name: Source(adapter, 1.0, saved).in_features(name) for name in saved.layers})
    expected |= {name: tuple(saved.tensors[name].shape) for name in saved.trained if name in saved.tensors}
    problems = [*_problems(saved, state), *tensor_problems(saved.tensors, expected)]
    another = None if state is None or any_base else base_problem(saved, state.identity, adapter, base)
    problems += [f"--base: {another}"] if another else []
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise AdapterError(f"{adapter} cannot be a PEFT adapter:\n  {shown}")
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in progress(saved.layers.items()):
        tensors |= _layer_tensors(name, entry, saved.of_layer(name), state)
    modules = sorted({module for name in saved.trained if (module := _module_of(name)) is not None})
    for module in modules:
        for name in _parameters_of(module, saved.trained if state is None else state):
            tensor = saved.tensors[name] if state is None or name in saved.trained else state[name]
            tensors[peft_format.PREFIX + _hf_name(name)] = tensor.contiguous()
    try:
        with replaced_folder(out) as temporary:
            (temporary / WEIGHTS).write_bytes(save(dict(sorted(tensors.items())), metadata={"format": "pt"}))
            text = json.dumps(_peft_config(saved, [_hf_name(module) for module in modules]), indent=2)
            (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise AdapterError(f"--out: {out} cannot be written: {error}") from error


def _problems(saved: SavedAdapter, state: Mapping[str, torch.Tensor] | None) -> Iterator[str]:
    for name, entry in saved.layers.items():
        if hf_name(name) is None:
            yield f"{name}: Hugging Face's CogVLM has no such module; merge the adapter instead"
        elif _READ_ALONE.search(name):
            yield (
                f"{name}: the published Hugging Face code reads its weight without calling it; merge the adapter "
                "instead, or train one without such layers by --exclude_modules"
            )
        elif state is None and saved.config.use_dora and 0 < len(entry.slots) < len(slots_named(name)):
            yield f"{name}: PEFT's DoRA needs the row norms of q, k and v, {entry.slots} have one; give --base"
        elif state is None and entry.slots == SLOTS[:1] and _may_group_heads(saved):
            yield f"{name}: only q is adapted, and the adapter does not say how many rows k and v have; give --base"
    for name in saved.trained:
        module = _module_of(name)
        if hf_name(name) is None or module is None:
            yield f"{name}: a parameter outside of a module, which PEFT cannot save; merge the adapter instead"
        elif module in saved.layers:
            yield f"{name}: PEFT cannot save a parameter of a layer that has a LoRA; merge the adapter instead"
        elif state is None and not set(_parameters_of(module, saved.trained)) <= set(saved.trained):
            yield f"{name}: PEFT saves {module} whole, and its other parameter was not trained; give --base"


def _module_of(parameter: str) -> str | None:
    module, _, leaf = parameter.rpartition(".")
    return module if leaf in ("weight", "bias") and hf_name(module) is not None else None


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of what has one, see `_problems`."""
    foreign = hf_name(name)
    if foreign is None:
        raise AdapterError(f"{name}: Hugging Face's CogVLM has no such module or parameter")
    return foreign


def _parameters_of(module: str, present: Collection[str]) -> list[str]:
    """Return the parameters of a module; a bias that some families have there counts where it is present."""
    bias = f"{module}.bias"
    return [f"{module}.weight", bias] if has_bias(module) or bias in present else [f"{module}.weight"]


def _may_group_heads(saved: SavedAdapter) -> bool:
    """Return whether the base of an adapter may have fewer heads of keys than of queries, by its family."""
    title = None if saved.base is None else saved.base.family
    return any(family.groups_heads for family in FAMILIES.values() if title == family.title)


def _layer_tensors(
    name: str, entry: LayerEntry, stacked: dict, state: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors of one layer by name."""
    a, b = (stacked[leaf] for leaf in PAIR)
    leaves = peft_format.LEAVES
    if entry.slots:
        b = _block_diagonal(name, entry, b, a.shape[1], None if state is None else len(state[f"{name}.weight"]))
    magnitude = stacked.get(MAGNITUDE)
    if magnitude is not None and state is not None and 0 < len(entry.slots) < len(slots_named(name)):
        whole = row_norms(state[f"{name}.weight"], DeltaLayout(((0, len(b)),), len(b), entry.kind), None)
        whole = whole.to(magnitude.dtype).clone()
        for (start, stop), part in zip(entry.rows, magnitude.split([stop - start for start, stop in entry.rows])):
            whole[start:stop] = part
        magnitude = whole
    if entry.kind == "conv":
        channels = a.shape[1] // 4 if name.endswith("eva.conv") else IMAGE_CHANNELS
        side = math.isqrt(a.shape[1] // channels)
        a = a.view(len(a), channels, side, side)
        b = b.view(*b.shape, 1, 1)
        magnitude = None if magnitude is None else magnitude.view(1, -1, 1, 1)
    elif entry.kind in ("embedding", "vocab"):
        leaves = peft_format.EMBEDDING_LEAVES
    leaf_tensors = {**dict(zip(leaves, (a, b))), **({} if magnitude is None else {peft_format.MAGNITUDE: magnitude})}
    return {f"{peft_format.PREFIX}{hf_name(name)}.{leaf}": tensor.contiguous() for leaf, tensor in leaf_tensors.items()}


def _block_diagonal(name: str, entry: LayerEntry, b: torch.Tensor, columns: int, rows: int | None) -> torch.Tensor:
    """Return B (rows of all slots, r) as (out, slots * r), zero where no slot or another slot is.

    columns: of the layer's weight. rows: of it, None where the adapter has to say it: q has as many as columns, k and v
    have as many as each other.
    """
    sizes = [stop - start for start, stop in entry.rows]
    if rows is None:
        slots = slots_named(name)
        of_keys = next((size for slot, size in zip(entry.slots, sizes) if slot != SLOTS[0]), columns)
        rows = 2 * of_keys + (columns if len(slots) == len(SLOTS) else 0)
    whole = b.new_zeros(rows, len(entry.slots) * entry.r)
    for number, ((start, stop), part) in enumerate(zip(entry.rows, b.split(sizes))):
        whole[start:stop, number * entry.r : (number + 1) * entry.r] = part
    return whole


def _peft_config(saved: SavedAdapter, modules: list[str]) -> dict:
    ranks = {}
    alphas = {}
    for name, entry in saved.layers.items():
        module = _hf_name(name)
        ranks[module] = entry.r * max(1, len(entry.slots))
        alphas[module] = _alpha(entry.scale, ranks[module], saved.config.use_rslora)
    r, rank_pattern = peft_format.pattern_table(ranks)
    alpha, alpha_pattern = peft_format.pattern_table(alphas)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "task_type": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": peft_format.pattern_for(ranks),
        "modules_to_save": modules or None,
        "lora_dropout": saved.config.lora_dropout,
        "use_rslora": saved.config.use_rslora,
        "use_dora": saved.config.use_dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _alpha(scale: float, rank: int, use_rslora: bool) -> float:
    """Return the alpha that gives this scale: the nearest one, a whole number where that does."""
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scale * divisor
    return next((near for near in (float(round(alpha)), round(alpha, 12)) if near / divisor == scale), alpha)

"""A PEFT adapter of Hugging Face's CogVLM becomes one of ours."""

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from sat_lora.adapter_format import (
    CONFIG,
    MAGNITUDE,
    PAIR,
    WEIGHTS,
    LayerEntry,
    SavedAdapter,
    cut_slots,
    write_adapter,
)
from sat_lora.cogvlm.base_weights import BaseWeights
from sat_lora.combine import combined_config
from sat_lora.config import SLOTS, LoraConfig
from sat_lora.errors import AdapterError
from sat_lora.interop import peft_format
from sat_lora.interop.cogvlm_layers import is_fused, kind_named
from sat_lora.interop.hugging_face_names import sat_name
from sat_lora.kinds import KINDS

_LEAF = re.compile(r"(.+)\.(?:lora_(?:embedding_)?([AB])(?:\.weight)?|(lora_magnitude_vector)(?:\.weight)?)")
PEFT_ALPHA = 8  # PEFT's default
_UNDERSTOOD = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode",
    "megatron_core", "megatron_config", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config",
}  # fmt: skip


def import_from_peft(
    folder: str | Path, out: str | Path, *, base: str | Path, progress: Callable[[Collection], Iterable] = iter
) -> None:
    """Write OUT, an adapter folder with the delta of a PEFT adapter of Hugging Face's CogVLM.

    base: SAT folder of the base, for the shapes to fit; its weights are not read. A pair for q, k and v at once becomes
    one for each: blocks of B where it is block-diagonal, as `export_to_peft` writes it, else the same A three times.
    AdapterError lists everything that does not fit or is not supported. progress: goes through the layers, as tqdm
    does.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise AdapterError(f"--out: {out} exists; give a new folder")
    config, tensors = _read(folder)
    state = BaseWeights(base)
    groups, trained, problems = _sort_tensors(tensors)
    problems += _unsupported(config)
    layers, own = {}, {}
    for module, parts in progress(groups.items()):
        problem = _layer_problem(module, parts, state, bool(config.get("use_dora")))
        if problem:
            problems.append(problem)
        elif not problems:
            name = sat_name(module)
            layers[name], stacked = _layer(
                name, parts, len(state[f"{name}.weight"]), _scale(config, module, parts["A"])
            )
            rows = [stop - start for start, stop in layers[name].rows]
            own |= cut_slots(name, layers[name].slots, rows, stacked)
    for name, tensor in trained.items():
        if name not in state or state[name].shape != tensor.shape:
            shape = tuple(state[name].shape) if name in state else "no such parameter"
            problems.append(f"{name}: shape {tuple(tensor.shape)}, the base has {shape}")
    if not groups:
        problems.append("no layer has a LoRA")
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise AdapterError(f"{folder} cannot be imported, {len(problems)} problems:\n  {shown}")
    fields = LoraConfig(
        target_modules=peft_format.pattern_for(layers),
        modules_to_save=tuple(trained),
        lora_dropout=config.get("lora_dropout", 0.0),
        use_dora=bool(config.get("use_dora")),
    )
    base_identity = state.identity
    config = combined_config([fields], layers)
    saved = SavedAdapter(config, base_identity.fingerprint, layers, tuple(trained), own | trained, base_identity)
    try:
        write_adapter(out, saved)
    except OSError as error:
        raise AdapterError(f"--out: {out} cannot be written: {error}") from error


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder} is not a PEFT adapter folder: {', '.join(missing)} missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "sat_lora" in config or config.get("peft_type") != "LORA":
            raise ValueError("not a PEFT LoRA" if "sat_lora" not in config else "already an adapter of sat_lora")
        return config, load_file(folder / WEIGHTS)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{folder}: cannot be read as a PEFT adapter: {error}") from error


def _unsupported(config: dict) -> list[str]:
    found = {name: value for name, value in config.items() if name not in _UNDERSTOOD | _HARMLESS and value}
    found = {name: value for name, value in found.items() if (name, value) != ("bias", "none")}
    problems = [f"{name}={value!r} is not supported" for name, value in sorted(found.items())]
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        problems.append(
            f"init_lora_weights={config['init_lora_weights']!r} changed the base; "
            "save it by PEFT with path_initial_model_for_weight_conversion first"
        )
    try:
        patterns = config.get("alpha_pattern") or {}
        alphas = [float(config.get("lora_alpha", PEFT_ALPHA)), *map(float, patterns.values())]
        if not all(map(math.isfinite, alphas)):
            problems.append(f"lora_alpha and alpha_pattern have to be finite, got {alphas}")
        for pattern in patterns:
            re.compile(pattern)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        problems.append(f"lora_alpha or alpha_pattern cannot be read: {error}")
    return problems


def _sort_tensors(tensors: dict) -> tuple[dict[str, dict], dict[str, torch.Tensor], list[str]]:
    """({HF module: {"A", "B", magnitude}}, {SAT parameter: tensor}, problems)."""
    groups, trained, problems = {}, {}, []
    for key, tensor in tensors.items():
        name = key.removeprefix(peft_format.PREFIX)
        match = _LEAF.fullmatch(name)
        if not tensor.is_floating_point():
            problems.append(f"{key}: dtype {tensor.dtype}, a floating-point dtype is wanted")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key}: holds values that are not finite")
        if match and sat_name(match[1]):
            groups.setdefault(match[1], {})[match[2] or MAGNITUDE] = tensor
        elif not match and sat_name(name):
            trained[sat_name(name)] = tensor
        else:
            problems.append(f"{key}: CogVLM has no such module")
    return dict(sorted(groups.items())), trained, problems


def _layer_problem(module: str, parts: dict, state: dict, use_dora: bool) -> str | None:
    name = sat_name(module)
    if f"{name}.weight" not in state:
        return f"{module}: the base has no {name}.weight"
    wanted = {"A", "B", MAGNITUDE} if use_dora else {"A", "B"}
    if parts.keys() != wanted:
        return f"{module}: has {sorted(parts)}, wanted {sorted(wanted)}"
    weight = state[f"{name}.weight"]
    kind = kind_named(name, len(weight)) if weight.dim() > 1 else None
    if any(parts[leaf].dim() < 2 or parts[leaf].numel() == 0 for leaf in "AB"):
        return f"{module}: A {tuple(parts['A'].shape)} and B {tuple(parts['B'].shape)} are no matrices"
    if kind is None:
        return f"{module}: takes no adapter"
    out, columns = KINDS[kind].matrix(weight).shape
    a, b = (parts[leaf].flatten(1) for leaf in "AB")
    magnitude = parts.get(MAGNITUDE)
    if a.shape[1] != columns or b.shape != (out, len(a)) or (magnitude is not None and magnitude.numel() != out):
        return f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)}, the base's weight is {(out, columns)}"
    return None


def _scale(config: dict, module: str, a: torch.Tensor) -> float:
    """alpha / r of a module, by PEFT's rule for patterns."""
    patterns = config.get("alpha_pattern") or {}
    found = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, config.get("lora_alpha", PEFT_ALPHA)) / (
        math.sqrt(len(a)) if config.get("use_rslora") else len(a)
    )


def _layer(name: str, parts: dict, weight_rows: int, scale: float) -> tuple[LayerEntry, dict[str, torch.Tensor]]:
    """(entry, stacked tensors) of one layer."""
    a, b = (parts[leaf].flatten(1) for leaf in "AB")
    kind = kind_named(name, weight_rows)
    magnitude = {MAGNITUDE: parts[MAGNITUDE].flatten()} if MAGNITUDE in parts else {}
    if not is_fused(name):
        return LayerEntry(kind, len(a), scale, (), ((0, len(b)),)), {PAIR[0]: a, PAIR[1]: b, **magnitude}
    size = len(b) // len(SLOTS)
    spans = {slot: (number * size, (number + 1) * size) for number, slot in enumerate(SLOTS)}
    slots, blocks = _blocks(b, spans, all_slots=bool(magnitude))
    if blocks is None:
        slots, blocks, a = SLOTS, b, a.repeat(len(SLOTS), 1)
    entry = LayerEntry(kind, blocks.shape[1], scale, slots, tuple(spans[slot] for slot in slots))
    return entry, {PAIR[0]: a, PAIR[1]: blocks, **magnitude}


def _blocks(b: torch.Tensor, spans: dict, all_slots: bool) -> tuple[tuple[str, ...], torch.Tensor | None]:
    """(slots, their rows of B stacked) where B (out, slots * r) is block-diagonal over q, k, v or some of them."""
    for count in range(len(SLOTS), len(SLOTS) - 1 if all_slots else 0, -1):
        if b.shape[1] % count:
            continue
        rank = b.shape[1] // count
        for slots in itertools.combinations(SLOTS, count):
            places = [(spans[slot], slice(n * rank, (n + 1) * rank)) for n, slot in enumerate(slots)]
            rest = b.clone()
            for (start, stop), columns in places:
                rest[start:stop, columns] = 0
            if not rest.any():
                return slots, torch.cat([b[start:stop, columns] for (start, stop), columns in places])
    return (), None

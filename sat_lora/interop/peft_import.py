"""A PEFT adapter of Hugging Face's CogVLM becomes one of ours."""

import itertools
import math
import re
from pathlib import Path
from typing import TypeGuard

import torch

from sat_lora.adapters.combine import combined_config
from sat_lora.adapters.format import LARGEST_SCALE, MAGNITUDE, PAIR, LayerEntry, SavedAdapter, cut_slots, write_adapter
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.hugging_face_names import sat_name
from sat_lora.cogvlm.layer_names import kind_named, slot_spans
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.files.patterns import matches, pattern_problem
from sat_lora.interop import peft_format
from sat_lora.interop.peft_content import PeftContent, read_peft_folder
from sat_lora.lora.config import LoraConfig
from sat_lora.lora.deltas.kinds import KINDS
from sat_lora.printable import printable
from sat_lora.terminal.progress import Progress

# PEFT's defaults.
PEFT_RANK = 8
PEFT_ALPHA = 8
LARGEST_RANK = 2**31 - 1
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
    folder: str | Path, out: str | Path, *, base: str | Path, progress: Progress[tuple[str, dict]] = iter
) -> None:
    """Write OUT, an adapter folder with the delta of a PEFT adapter of Hugging Face's CogVLM.

    base: model folder of the base, for the shapes to fit; of its weights a few values are read. A pair for q, k and v
    at once becomes one for each: blocks of B where it is block-diagonal, as `export_to_peft` writes it, else the same A
    three times. progress: goes through the layers, as tqdm does.
    Raises one AdapterError that lists everything that does not fit or is not supported.
    """
    folder = Path(folder)
    out = Path(out)
    if out.exists():
        raise AdapterError(f"--out: {out} exists; give a new folder")
    folder, config, tensors = read_peft_folder(folder)
    state = BaseWeights(base)
    problems = _config_problems(config)
    content = PeftContent.of(tensors, config, state)
    problems += content.problems
    groups = dict(sorted(content.pairs.items()))
    trained = content.trained
    layers: dict[str, LayerEntry] = {}
    factors: dict[str, torch.Tensor] = {}
    for module, parts in progress(groups.items()):
        name = sat_name(module)
        problem = _layer_problem(module, name, parts, state.shapes, config)
        if problem:
            problems.append(problem)
        elif not problems and name is not None:
            weight_rows = state.shapes[f"{name}.weight"][0]
            layers[name], stacked = _layer(name, parts, weight_rows, _scale(config, module, parts["A"]))
            rows = [stop - start for start, stop in layers[name].rows]
            factors |= cut_slots(name, layers[name].slots, rows, stacked)
    for name, tensor in trained.items():
        if state.shapes.get(name) != tuple(tensor.shape):
            shape = state.shapes.get(name, "no such parameter")
            problems.append(f"{name}: shape {tuple(tensor.shape)}, the base has {shape}")
    if not groups:
        problems.append("no layer has a LoRA")
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise AdapterError(f"{folder} cannot be imported, {count}:\n  {shown}")
    fields = LoraConfig(
        target_modules=peft_format.pattern_for(layers),
        modules_to_save=tuple(trained),
        lora_dropout=_dropout(config),
        use_dora=bool(config.get("use_dora")),
    )
    base_identity = state.identity
    own_config = combined_config([fields], layers)
    saved = SavedAdapter(
        own_config, base_identity.fingerprint, layers, tuple(trained), factors | trained, base_identity
    )
    try:
        write_adapter(out, saved)
    except OSError as error:
        raise AdapterError(f"--out: {out} cannot be written: {error}") from error


def _config_problems(config: dict) -> list[str]:
    """Return, each named, the fields that are not supported, and values that the others cannot have."""
    foreign = {name: value for name, value in config.items() if name not in _UNDERSTOOD | _HARMLESS and value}
    foreign = {name: value for name, value in foreign.items() if (name, value) != ("bias", "none")}
    problems = [f"{printable(name)}={_shown(value)} is not supported" for name, value in sorted(foreign.items())]
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        problems.append(
            f"init_lora_weights={config['init_lora_weights']!r} changed the base; "
            "save it by PEFT with path_initial_model_for_weight_conversion first"
        )
    if not _is_rank(config.get("r", PEFT_RANK)):
        problems.append(f"r has to be a whole number of at least 1, got {_shown(config['r'])}")
    if not _is_number(config.get("lora_alpha", PEFT_ALPHA)):
        problems.append(f"lora_alpha has to be a finite number, got {_shown(config['lora_alpha'])}")
    for name, wanted, fits in (("rank_pattern", "ranks", _is_rank), ("alpha_pattern", "numbers", _is_number)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            problems.append(f"{name} has to be an object from patterns to {wanted}, got {_shown(patterns)}")
            continue
        problems += [f"{name}: {problem}" for pattern in patterns for problem in _regex_problems(pattern)]
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            problems += [f"{name}: {problem}" for problem in _regex_problems(config[name])]
    for name in ("use_rslora", "use_dora"):
        if config.get(name) not in (None, True, False):
            problems.append(f"{name} has to be true or false, got {_shown(config[name])}")
    return problems


def _regex_problems(pattern: str) -> list[str]:
    problem = pattern_problem(pattern)
    return [f"{_shown(pattern)} {problem}"] if problem else []


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def _is_number(value: object) -> TypeGuard[int | float]:
    return (type(value) is int or type(value) is float) and abs(value) <= LARGEST_SCALE


def _dropout(config: dict) -> float:
    """Return the dropout for whoever trains on; what cannot be there, PEFT's null or 1.0, becomes 0."""
    value = config.get("lora_dropout")
    return float(value) if _is_number(value) and 0 <= value < 1 else 0.0


def _shown(value: object) -> str:
    try:
        text = printable(repr(value))
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of very many digits"
    return text if len(text) <= 100 else text[:100] + " ..."


def _layer_problem(
    module: str, name: str | None, parts: dict, shapes: dict[str, tuple[int, ...]], config: dict
) -> str | None:
    """Return what keeps a module from being imported, as a line; None if nothing does. name: SAT's."""
    shape = shapes.get(f"{name}.weight")
    if name is None or shape is None:
        return f"{module}: the base has no {name}.weight"
    wanted = {"A", "B", MAGNITUDE} if config.get("use_dora") else {"A", "B"}
    if parts.keys() != wanted:
        return f"{module}: has {sorted(parts)}, wanted {sorted(wanted)}"
    kind = kind_named(name, shape[0]) if len(shape) > 1 else None
    if any(parts[leaf].dim() < 2 or parts[leaf].numel() == 0 for leaf in "AB"):
        return f"{module}: A {tuple(parts['A'].shape)} and B {tuple(parts['B'].shape)} are no matrices"
    if kind is None:
        return f"{module}: takes no adapter"
    out, columns = KINDS[kind].matrix(torch.empty(shape, device="meta")).shape
    a, b = (parts[leaf].flatten(1) for leaf in "AB")
    magnitude = parts.get(MAGNITUDE)
    if a.shape[1] != columns or b.shape != (out, len(a)) or (magnitude is not None and magnitude.numel() != out):
        return f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)}, the base's weight is {(out, columns)}"
    patterns = config.get("rank_pattern") or {}
    rank = config.get("r", PEFT_RANK)
    try:
        stated_rank = _by_pattern(patterns, module, rank) if isinstance(patterns, dict) else rank
    except (re.error, OverflowError, RecursionError):  # named with the config
        return None
    except ConfigError as error:
        return f"{module}: {error}"
    if _is_rank(stated_rank) and stated_rank != len(a):
        return f"{module}: its tensors have rank {len(a)}, r and rank_pattern say {stated_rank}"
    return None


def _by_pattern(patterns: dict, module: str, otherwise):
    """Return the value of the first pattern that fits a module, by PEFT's rule; else `otherwise`."""
    values = (value for key, value in patterns.items() if matches(rf"(.*\.)?({key})", module))
    return next(values, otherwise)


def _scale(config: dict, module: str, a: torch.Tensor) -> float:
    """Return the scale of a module: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", PEFT_ALPHA))
    return alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))


def _layer(name: str, parts: dict, weight_rows: int, scale: float) -> tuple[LayerEntry, dict[str, torch.Tensor]]:
    """Return (entry, stacked tensors) of one layer."""
    a, b = (parts[leaf].flatten(1) for leaf in "AB")
    kind = kind_named(name, weight_rows)
    if kind is None:
        raise AdapterError(f"{name}: takes no adapter")
    magnitude = {MAGNITUDE: parts[MAGNITUDE].flatten()} if MAGNITUDE in parts else {}
    spans = slot_spans(name, len(b), a.shape[1])
    if not spans:
        return LayerEntry(kind, len(a), scale, (), ((0, len(b)),)), {PAIR[0]: a, PAIR[1]: b, **magnitude}
    slots, blocks = _blocks(b, spans, all_slots=bool(magnitude))
    if blocks is None:
        slots = tuple(spans)
        blocks = b
        a = a.repeat(len(slots), 1)
    entry = LayerEntry(kind, blocks.shape[1], scale, slots, tuple(spans[slot] for slot in slots))
    return entry, {PAIR[0]: a, PAIR[1]: blocks, **magnitude}


def _blocks(b: torch.Tensor, spans: dict, all_slots: bool) -> tuple[tuple[str, ...], torch.Tensor | None]:
    """Return (slots, their rows of B stacked) where B (out, slots * r) is block-diagonal over q, k, v or some.

    They are () and None where it is not.
    """
    for count in range(len(spans), len(spans) - 1 if all_slots else 0, -1):
        if b.shape[1] % count:
            continue
        rank = b.shape[1] // count
        for slots in itertools.combinations(spans, count):
            places = [(spans[slot], slice(n * rank, (n + 1) * rank)) for n, slot in enumerate(slots)]
            outside = b.clone()
            for (start, stop), columns in places:
                outside[start:stop, columns] = 0
            if not outside.any():
                return slots, torch.cat([b[start:stop, columns] for (start, stop), columns in places])
    return (), None

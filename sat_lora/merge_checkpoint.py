"""Fold an adapter into a base checkpoint on the CPU, tensor by tensor: SAT or Hugging Face folder in, either out.

The base is mapped and the result is filled through a mapping, so the process itself holds one tensor at a time.
"""

import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch

from sat_lora.adapter_format import SavedAdapter, base_problem, read_adapter, tensor_problems
from sat_lora.atomic import replaced_folder
from sat_lora.cogvlm.base_weights import BaseWeights
from sat_lora.cogvlm.hugging_face_folder import make_hugging_face_weights
from sat_lora.cogvlm.sat_folder import make_sat_weights
from sat_lora.errors import AdapterError, CheckpointError, MergeError
from sat_lora.foreign import printable
from sat_lora.functional import DeltaLayout
from sat_lora.kinds import KINDS
from sat_lora.merging import merged_weight

_OF_WEIGHTS = {"latest", "model_config.json", "model.safetensors.index.json"}  # beside files with these endings
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt"}


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "sat",
    model_parallel_size: int = 1,
    trust: bool = False,
    any_base: bool = False,
    progress: Callable[[Collection], Iterable] = iter,
) -> None:
    """Write OUT, the base with scale * B A added to each adapted weight: in float32, kept in the base's dtype.

    to: "sat", cut for `model_parallel_size` ranks, or "hf", a Hugging Face folder of safetensors. The base may be
    either, and cut for any number of ranks. progress: goes through the tensors' names, as tqdm does.
    CheckpointError or AdapterError: a folder is wrong or cannot be written, or the adapter was trained on another base;
    MergeError: a merged weight is not finite. OUT is not there then. trust: see `map_weights`. any_base: take a base
    that the adapter was not trained on, if its layers are there.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"--out: {out} exists; give a new folder")
    weights = BaseWeights(base, trust=trust)
    saved = read_adapter(adapter)
    another = None if any_base else base_problem(saved, weights.identity, adapter, base)
    if another:
        raise AdapterError(f"--adapter: {another}")
    refuse_misfits(weights.shapes, saved, adapter)
    try:
        with replaced_folder(out) as temporary:
            if to == "hf":
                parts = [make_hugging_face_weights(temporary, weights.config, weights.layout)]
            else:
                parts = make_sat_weights(temporary, weights.config, weights.layouts_for(model_parallel_size))
            for name in progress(weights.layout):
                whole = merged_tensor(name, weights, saved)
                for rank, part in enumerate(parts):
                    if name in part:
                        part[name].copy_(weights.shard(name, whole, rank, len(parts)))
                        _refuse_non_finite(name, part[name], adapter)
            for path in Path(base).iterdir():  # the tokenizer and whatever else lies beside the weights
                if path.is_file() and path.name not in _OF_WEIGHTS and path.suffix not in _WEIGHT_SUFFIXES:
                    shutil.copyfile(path, temporary / path.name)
    except (OSError, RuntimeError) as error:  # torch meets a full disk with a RuntimeError
        raise CheckpointError(f"--out: {out} cannot be written: {error}") from error


def merged_tensor(name: str, weights: BaseWeights, saved: SavedAdapter) -> torch.Tensor:
    """A tensor of the base as it is with the adapter, in float32 or wider if that changes it."""
    layer = name.removesuffix(".weight")
    if name in saved.trained:
        return saved.tensors[name]
    if layer == name or layer not in saved.layers:
        return weights[name]
    entry, weight, tensors = saved.layers[layer], weights[name], saved.of_layer(layer)
    kind = KINDS[entry.kind]
    layout = DeltaLayout(entry.rows, kind.matrix(weight).shape[0], entry.kind)
    delta = (tensors["lora_A"], tensors["lora_B"], entry.scale)
    return merged_weight(weight, kind, layout, delta, tensors.get("lora_magnitude"))


def refuse_misfits(shapes: dict[str, tuple[int, ...]], saved: SavedAdapter, source: str | Path) -> None:
    """AdapterError, with every way in which the adapter does not fit a base of these whole shapes."""
    wanted = [*saved.trained, *(f"{name}.weight" for name in saved.layers)]
    problems = [f"no {printable(name)}" for name in wanted if name not in shapes]
    problems += [f"{printable(n)}: unknown kind {e.kind!r}" for n, e in saved.layers.items() if e.kind not in KINDS]
    if not problems:
        matrices = {
            name: KINDS[entry.kind].matrix(torch.empty(shapes[f"{name}.weight"], device="meta")).shape
            for name, entry in saved.layers.items()
        }
        expected = saved.expected({name: matrix[1] for name, matrix in matrices.items()})
        expected |= {name: shapes[name] for name in saved.trained}
        problems = tensor_problems(saved.tensors, expected)
        for name, entry in saved.layers.items():
            if any(not 0 <= start < stop <= matrices[name][0] for start, stop in entry.rows):
                problems.append(f"{name}: rows {entry.rows}, the weight has {matrices[name][0]}")
    if problems:
        raise AdapterError(f"{source} does not fit the base: {'; '.join(sorted(problems)[:20])}")


def _refuse_non_finite(name: str, merged: torch.Tensor, source: str | Path) -> None:
    if merged.is_floating_point():
        bad = sum(int((~torch.isfinite(rows)).sum()) for rows in merged.view(-1).split(1 << 24))
        if bad:
            raise MergeError(
                f"{source}: {name}: {bad} merged values are not finite in {merged.dtype}; nothing was merged"
            )

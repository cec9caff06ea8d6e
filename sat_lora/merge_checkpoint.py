"""Fold an adapter into a base checkpoint on the CPU: SAT folder in, SAT folder out."""

from pathlib import Path

import torch

from sat_lora.adapter_format import SavedAdapter, fingerprint_of, read_adapter, tensor_problems
from sat_lora.atomic import replaced_folder
from sat_lora.cogvlm.sat_folder import SatFolder, save_weights
from sat_lora.errors import AdapterError, CheckpointError, MergeError
from sat_lora.functional import DeltaLayout
from sat_lora.kinds import KINDS
from sat_lora.merging import merged_weight, refuse_non_finite


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path, *, trust: bool = False) -> None:
    """Write OUT, the base with scale * B A added to each adapted weight: in float32, kept in the base's dtype.

    The base's weights are mapped, not read; only adapted weights are copied. CheckpointError or AdapterError: a folder
    is wrong or cannot be written, the base is cut for model parallelism, or the adapter was trained on another one;
    MergeError: a merged weight is not finite. trust: see `map_weights`.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"--out: {out} exists; give a new folder")
    folder = SatFolder(base, trust=trust)
    files, config = folder.files(), folder.config()
    if len(files) > 1:
        raise CheckpointError(f"--base: {base} is cut for {len(files)} model-parallel ranks; give the whole checkpoint")
    state = folder.map(0)
    saved = read_adapter(adapter)
    if saved.base_fingerprint != fingerprint_of({n: tuple(t.shape) for n, t in state.items() if torch.is_tensor(t)}):
        raise AdapterError(
            f"--adapter: {adapter} was trained on a base with other names or shapes than {files[0]}; give its own base"
        )
    state |= merged_tensors(state, saved, adapter)
    try:
        with replaced_folder(out) as temporary:
            save_weights(temporary, config, state)
            for path in Path(base).iterdir():  # the tokenizer and whatever else lies beside the weights
                if path.is_file() and path.name not in ("latest", "model_config.json"):
                    (temporary / path.name).write_bytes(path.read_bytes())
    except (OSError, RuntimeError) as error:  # torch.save meets a full disk with a RuntimeError
        raise CheckpointError(f"--out: {out} cannot be written: {error}") from error


def merged_tensors(state: dict, saved: SavedAdapter, source: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a base's state that an adapter changes, as they are with it, in their own dtypes."""
    problems = [f"no {name}" for name in [*saved.trained, *(f"{n}.weight" for n in saved.layers)] if name not in state]
    problems += [f"{n}: unknown kind {e.kind!r}" for n, e in saved.layers.items() if e.kind not in KINDS]
    if not problems:
        matrices = {n: KINDS[e.kind].matrix(state[f"{n}.weight"]) for n, e in saved.layers.items()}
        expected = saved.expected({name: matrix.shape[1] for name, matrix in matrices.items()})
        expected |= {name: tuple(state[name].shape) for name in saved.trained}
        problems = tensor_problems(saved.tensors, expected)
        for name, entry in saved.layers.items():
            if any(not 0 <= start < stop <= matrices[name].shape[0] for start, stop in entry.rows):
                problems.append(f"{name}: rows {entry.rows}, the weight has {matrices[name].shape[0]}")
    if problems:
        raise AdapterError(f"{source} does not fit the base: {'; '.join(sorted(problems)[:20])}")
    changed = {name: saved.tensors[name].to(state[name].dtype) for name in saved.trained}
    for name, entry in saved.layers.items():
        weight, kind, tensors = state[f"{name}.weight"], KINDS[entry.kind], saved.of_layer(name)
        layout = DeltaLayout(entry.rows, matrices[name].shape[0], entry.kind)
        delta = (tensors["lora_A"], tensors["lora_B"], entry.scale)
        merged = merged_weight(weight, kind, layout, delta, tensors.get("lora_magnitude")).to(weight.dtype)
        try:
            refuse_non_finite(f"{name}.weight", merged)
        except MergeError as error:
            raise MergeError(f"{source}: {error}") from error
        changed[f"{name}.weight"] = merged
    return changed

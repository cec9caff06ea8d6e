"""Fold an adapter into a base checkpoint on the CPU: SAT folder in, SAT folder out."""

from pathlib import Path

import torch

from sat_lora.adapter_file import fingerprint_of, join_slots, read_adapter
from sat_lora.atomic import replaced_folder
from sat_lora.cogvlm.checkpoint import map_weights, read_config, save_weights, weight_files
from sat_lora.errors import AdapterError, CheckpointError


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write OUT, the base with scale * B A added to each adapted weight: in float32, kept in the base's dtype.

    The base's weights are mapped, not read; only adapted weights are copied. CheckpointError or AdapterError: a folder
    is wrong or cannot be written, the base is cut for model parallelism, or the adapter was trained on another one.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"--out: {out} exists; give a new folder")
    files, config = weight_files(base), read_config(base)
    if len(files) > 1:
        raise CheckpointError(f"--base: {base} is cut for {len(files)} model-parallel ranks; give the whole checkpoint")
    state = map_weights(files[0])
    _, own, tensors = read_adapter(adapter)
    if own["base_fingerprint"] != fingerprint_of({n: tuple(t.shape) for n, t in state.items() if torch.is_tensor(t)}):
        raise AdapterError(
            f"--adapter: {adapter} was trained on a base with other names or shapes than {files[0]}; give its own base"
        )
    for name, entry in own["linears"].items():
        slots, scale = entry["slots"], entry["scale"]
        keys = [f"{slot}.{leaf}" if slot else leaf for slot in slots or ("",) for leaf in ("lora_A", "lora_B")]
        weight_name = f"{name}.weight"
        missing = [key for key in keys if f"{name}.{key}" not in tensors]
        if missing:
            raise AdapterError(f"{adapter}: {name} lacks {', '.join(missing)}")
        if weight_name not in state:
            raise AdapterError(f"{adapter} adapts {name}, but {files[0]} has no {weight_name}")
        pair = join_slots({key: tensors[f"{name}.{key}"] for key in keys}, slots)
        state[weight_name] = add_to_weight(weight_name, state[weight_name], *pair, scale, slots)
    try:
        with replaced_folder(out) as temporary:
            save_weights(temporary, config, state)
            for path in Path(base).iterdir():  # the tokenizer and whatever else lies beside the weights
                if path.is_file() and path.name not in ("latest", "model_config.json"):
                    (temporary / path.name).write_bytes(path.read_bytes())
    except (OSError, RuntimeError) as error:  # torch.save meets a full disk with a RuntimeError
        raise CheckpointError(f"--out: {out} cannot be written: {error}") from error


def add_to_weight(name: str, weight: torch.Tensor, a, b, scale: float, slots: tuple[str, ...]) -> torch.Tensor:
    """weight (out, in) + scale * B A, slot by slot, rounded once to the weight's dtype."""
    merged = weight.float().clone()
    rank = a.shape[0] // max(1, len(slots))
    if slots and merged.shape[0] % 3:
        raise AdapterError(f"{name}: {merged.shape[0]} rows do not divide into q, k and v")
    ranges = {slot: i * merged.shape[0] // 3 for i, slot in enumerate("qkv")}
    row = 0
    for number, slot in enumerate(slots or ("",)):
        rows = merged.shape[0] // 3 if slots else merged.shape[0]
        start = ranges[slot] if slots else 0
        pair_a, pair_b = a[number * rank : (number + 1) * rank].float(), b[row : row + rows].float()
        if pair_b.shape[0] != rows or pair_a.shape[1] != merged.shape[1]:
            raise AdapterError(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit {tuple(merged.shape)}")
        merged[start : start + rows].addmm_(pair_b, pair_a, alpha=scale)
        row += rows
    merged = merged.to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise AdapterError(f"{name}: the merged weight is not finite")
    return merged

"""The adapter on disk.

FOLDER/adapter_model.safetensors   `<linear>.lora_A` (r, in) and `<linear>.lora_B` (out, r); for q/k/v slots
                                   `<linear>.q.lora_A` and so on. Whole tensors, whatever the parallel layout was.
FOLDER/adapter_config.json         the LoraConfig, and under `sat_lora` the format version, the rank, scale and slots
                                   of every linear, and the fingerprint of the base model
"""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import nn

from sat_lora._sat import BaseModel, mpu
from sat_lora.adapter import LoraAdapter
from sat_lora.atomic import replaced_folder
from sat_lora.config import LoraConfig
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.mixin import LoraMixin, adapter_shape, lora_mixins, place_mixins, sat_models
from sat_lora.sharding import model_parallel_layout, sharding_of
from sat_lora.targets import LinearSite, find_linears

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapters_of(model: nn.Module, name: str = "lora") -> dict[str, LoraAdapter]:
    """The adapters of every LoraMixin called `name` in the model, by the name of their linear."""
    return {site: mixin.adapter_for(site) for mixin in _mixins_called(model, name) for site in mixin.sites}


def _mixins_called(model: nn.Module, name: str) -> list[LoraMixin]:
    return [mixin for path, mixin in lora_mixins(model).items() if path.rpartition(".")[2] == name]


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and whole shapes of the base model's state; the same for every parallel layout."""
    _, size = model_parallel_layout()
    shapes = {}

    def visit(module: nn.Module, prefix: str):
        if isinstance(module, LoraMixin):
            return
        own = {
            **module._parameters,
            **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set},
        }
        for leaf, tensor in own.items():
            if tensor is not None:
                shape = sharding_of(module, leaf).full_shape(getattr(tensor, "ds_shape", tensor.shape), size)
                shapes[prefix + leaf] = shape
        for child_name, child in module.named_children():
            visit(child, f"{prefix}{child_name}.")

    visit(model, "")
    return fingerprint_of(shapes)


def fingerprint_of(shapes: dict[str, tuple[int, ...]]) -> str:
    """The fingerprint of a base with these names and whole shapes."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def whole_tensors(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """A and B of one adapter on the CPU, gathered over ZeRO-3 and model parallelism, cut into slots.

    Every rank has to call it. Keys: "lora_A", "lora_B", or "q.lora_A", ... where the linear has slots.
    """
    parameters = [adapter.A, adapter.B]
    gathered = nullcontext()
    if hasattr(adapter.A, "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        a, b = (_over_model_parallel(p.detach(), adapter.shardings[leaf]) for p, leaf in zip(parameters, "AB"))
    if a.numel() == 0 or b.numel() == 0:
        raise AdapterError(f"{adapter.name}: gathered to an empty tensor; nothing was saved")
    return split_slots(a, b, adapter.slots, adapter.rank, [stop - start for start, stop in adapter.slot_rows])


def _over_model_parallel(local: torch.Tensor, sharding) -> torch.Tensor:
    _, size = model_parallel_layout()
    if size == 1 or sharding.dim is None:
        return local.cpu().clone()
    shards = [torch.empty_like(local) for _ in range(size)]
    torch.distributed.all_gather(shards, local.contiguous(), group=mpu.get_model_parallel_group())
    return sharding.unshard(shards).cpu()


def split_slots(a, b, slots: tuple[str, ...], rank: int, rows: list[int]) -> dict[str, torch.Tensor]:
    """Stacked A (slots * r, in) and B (rows, r) as the tensors of the file."""
    if not slots:
        return {"lora_A": a.contiguous(), "lora_B": b.contiguous()}
    parts = zip(slots, a.split(rank), b.split(rows))
    return {f"{s}.{k}": t.contiguous() for s, pa, pb in parts for k, t in (("lora_A", pa), ("lora_B", pb))}


def join_slots(tensors: dict[str, torch.Tensor], slots: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of `split_slots`."""
    if not slots:
        return tensors["lora_A"], tensors["lora_B"]
    return tuple(torch.cat([tensors[f"{slot}.{leaf}"] for slot in slots]) for leaf in ("lora_A", "lora_B"))


def save_adapter(model: nn.Module, folder: str | Path, *, name: str = "lora") -> None:
    """Write the adapter called `name`. Every rank has to call it; rank 0 writes, and all return when it is there."""
    adapters = adapters_of(model, name)
    if not adapters:
        raise AdapterError(f"{folder}: not saved, the model has no LoRA mixin called {name!r}")
    configs = [mixin.config for mixin in _mixins_called(model, name)]
    if any(config != configs[0] for config in configs):
        raise AdapterError(
            f"{folder}: not saved, the LoRA mixins called {name!r} have different configs and a file holds one; "
            "give them different names, or one config with rank_pattern and alpha_pattern"
        )
    tensors = {f"{site}.{key}": t for site, adapter in adapters.items() for key, t in whole_tensors(adapter).items()}
    config = {
        "peft_type": "LORA",
        **configs[0].to_dict(),
        "sat_lora": {
            "format_version": FORMAT_VERSION,
            "base_fingerprint": base_fingerprint(model),
            "linears": {s: {"r": a.rank, "scale": a.scale, "slots": a.slots} for s, a in sorted(adapters.items())},
        },
    }
    failure = [None]
    distributed = torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        try:
            with replaced_folder(folder) as temporary:
                (temporary / WEIGHTS).write_bytes(save(dict(sorted(tensors.items())), metadata={"format": "pt"}))
                (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            failure = [f"{folder}: the adapter could not be written: {error}"]
    if distributed:
        torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise AdapterError(failure[0])


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict, dict[str, torch.Tensor]]:
    """(config, what the file says under `sat_lora`, tensors by name on the CPU) of an adapter folder."""
    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else "no such folder"
        raise AdapterError(
            f"{folder} is not an adapter folder: {', '.join(missing)} missing; found: {found or 'nothing'}"
        )
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        own = values.pop("sat_lora")
        values.pop("peft_type", None)
        version, linears, _ = own["format_version"], own["linears"], own["base_fingerprint"]
        own["linears"] = {
            n: {"r": int(e["r"]), "scale": float(e["scale"]), "slots": tuple(e["slots"])} for n, e in linears.items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG}: not an adapter config of sat_lora: {error!r}") from error
    if version != FORMAT_VERSION:
        raise AdapterError(f"{folder / CONFIG}: format version {version!r}, this sat_lora reads {FORMAT_VERSION}")
    try:
        config = LoraConfig.from_dict(values)
    except ConfigError as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from error
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    return config, own, tensors


def check_tensors(linears: dict, tensors: dict[str, torch.Tensor], sites: dict[str, LinearSite]) -> list[str]:
    """What keeps the tensors of a file from fitting these linears; empty if they fit."""
    problems, expected = [], {}
    for name, entry in linears.items():
        site, slots, rank = sites.get(name), entry["slots"], entry["r"]
        if site is None:
            problems.append(f"the model has no linear {name}")
            continue
        if set(slots) - set(site.slot_names) or bool(slots) != bool(site.slot_names):
            problems.append(f"{name}: slots {slots}, the linear has {site.slot_names}")
            continue
        rows = [stop - start for start, stop in site.slot_rows(slots)]
        for slot, out in zip(slots or ("",), rows):
            prefix = f"{name}.{slot}." if slot else f"{name}."
            expected[prefix + "lora_A"] = (rank, site.in_features)
            expected[prefix + "lora_B"] = (out, rank)
    problems += [f"missing {key}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {key}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        tensor = tensors[key]
        if tuple(tensor.shape) != expected[key]:
            problems.append(f"{key}: shape {tuple(tensor.shape)}, the model wants {expected[key]}")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: dtype {tensor.dtype}, a floating-point dtype is wanted")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key}: holds values that are not finite")
    return sorted(problems)


def load_adapter(model: BaseModel, folder: str | Path, *, name: str = "lora") -> None:
    """Put a saved adapter on the model, at any model-parallel size: new mixins called `name`, or into those there.

    Strict: all problems are listed in one AdapterError, and the model is left as it was.
    """
    config, own, tensors = read_adapter(folder)
    problems = []
    if own["base_fingerprint"] != base_fingerprint(model):
        problems.append("the base model has other names or shapes than the one this adapter was trained on")
    if not own["linears"]:
        problems.append("the file adapts no linear")
    sites: dict[str, LinearSite] = {}
    for path, inner in sat_models(model).items():
        sites.update(find_linears(inner, path))
    problems += check_tensors(own["linears"], tensors, sites)
    present = adapters_of(model, name)
    there = {n: (e["r"], e["scale"], e["slots"]) for n, e in own["linears"].items()}
    if present:
        here, whose = {n: (a.rank, a.scale, a.slots) for n, a in present.items()}, "the model's adapter"
    else:
        here, whose = {n: adapter_shape(sites[n], config) if n in sites else there[n] for n in there}, "its config"
    for linear in here.keys() | there.keys():
        if here.get(linear) != there.get(linear):
            got, wanted = there.get(linear), here.get(linear)
            problems.append(f"{linear}: (rank, scale, slots) {got} in the file, {wanted} by {whose}")
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise AdapterError(f"{folder} does not fit, {len(problems)} problems:\n  {shown}")
    if not present:
        place_mixins(model, config, set(there), name)
        present = adapters_of(model, name)
    rank, size = model_parallel_layout()
    with torch.no_grad():
        for site, adapter in present.items():
            prefix = f"{site}."
            own_tensors = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            for leaf, whole in zip("AB", join_slots(own_tensors, adapter.slots)):
                getattr(adapter, leaf).copy_(adapter.shardings[leaf].shard(whole, rank, size))

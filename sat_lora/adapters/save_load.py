"""From a model to an adapter folder and back, at any ZeRO stage and model-parallel size. See `format`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from sat_lora.adapters.card import Section
from sat_lora.adapters.format import MAGNITUDE, PAIR, LayerEntry, SavedAdapter, cut_slots, plain_config, write_adapter
from sat_lora.adapters.loftq_base import note_rounds
from sat_lora.adapters.read import base_problem, read_adapter, tensor_problems
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.apply import (
    adapters_of,
    find_all_parameters,
    find_all_sites,
    mixins_called,
    place_mixins,
    whole_name,
)
from sat_lora.lora.live_base import identity_of_model, whole_shape
from sat_lora.lora.mixin import lora_mixins, refuse_engine
from sat_lora.lora.targets import BaseParameter, Plan, Site, Target
from sat_lora.parallel.sharding import Sharding, gathered, model_parallel_layout, over_model_parallel
from sat_lora.parallel.wrapped import is_engine, is_in_engine, unwrapped
from sat_lora.printable import printable
from sat_lora.quantization.config import Quantization
from sat_lora.quantized.layers import quantized_weight_of

Copy = Callable[[torch.Tensor], torch.Tensor]
"""Makes a copy of a tensor that will change."""


def on_the_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU, also of a tensor that is there already."""
    return tensor.detach().to("cpu", copy=True)


def whole_tensors(name: str, adapter: LoraAdapter, copy: Copy = on_the_cpu) -> dict[str, torch.Tensor]:
    """Return the tensors of one adapter for the file, its layer called `name`, as copies. Every rank has to call it."""
    with gathered(adapter.parameters()):
        delta = adapter.delta()
        local = {"A": delta.a.detach(), "B": delta.b.detach()}
        if adapter.magnitude_or_none is not None:
            local["magnitude"] = adapter.magnitude.detach()
        leaves = dict(zip("AB", PAIR), magnitude=MAGNITUDE)
        stacked = {
            leaves[leaf]: copy(over_model_parallel(tensor, adapter.shardings[leaf])) for leaf, tensor in local.items()
        }
    if any(tensor.numel() == 0 for tensor in stacked.values()):
        raise AdapterError(f"{name}: gathered to an empty tensor; nothing was saved")
    return cut_slots(name, adapter.slots, [stop - start for start, stop in adapter.target.rows], stacked)


def trained_of(model: nn.Module, name: str = "lora") -> dict[str, tuple[nn.Parameter, Sharding]]:
    """Return the base parameters that LoraMixins called `name` train whole, with their cuts, by name."""
    return {
        whole_name(owner, key): (parameter, mixin.trained.shardings[key])
        for owner, mixin in mixins_called(model, name).items()
        for key, parameter in mixin.trained.tensors.items()
    }


def save_adapter(model: nn.Module, folder: str | Path, *, name: str = "lora") -> None:
    """Write the adapter called `name`. Every rank has to call it; rank 0 writes, and all return when it is there.

    model: or DeepSpeed's engine around it, at any ZeRO stage. Raises AdapterError on every rank.
    """
    saved = gather_adapter(model, folder, name=name)
    failure: list[str | None] = [None]
    distributed = torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        try:
            write_gathered(folder, saved)
        except AdapterError as error:
            failure = [str(error)]
    if distributed:
        torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise AdapterError(failure[0])


def gather_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "lora", copy: Copy = on_the_cpu
) -> SavedAdapter:
    """Return the adapter called `name`, for `write_gathered`. Every rank has to call it.

    copy: makes a copy of a tensor, which the model goes on to change. Raises AdapterError, on every rank, if
    `folder` cannot hold it.
    """
    model = unwrapped(model, user="save_adapter")
    mixins = list(mixins_called(model, name).values())
    if not mixins:
        others = sorted({path.rpartition(".")[2] for path in lora_mixins(model)})
        advice = f"it has {', '.join(map(repr, others))}: give name=" if others else "add_lora(model, ...) makes one"
        raise AdapterError(f"{folder}: not saved, the model has no LoRA mixin called {name!r}; {advice}")
    if any(mixin.config != mixins[0].config for mixin in mixins):
        raise AdapterError(
            f"{folder}: not saved, the LoRA mixins called {name!r} have different configs and a file holds one; "
            "give them different names, or one config with rank_pattern and alpha_pattern"
        )
    if any(not mixin.enabled and mixin.trained.tensors for mixin in mixins):
        raise AdapterError(f"{folder}: not saved, {name!r} is disabled and its base parameters are the originals")
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, LayerEntry] = {}
    for site, adapter in adapters_of(model, name).items():
        tensors |= whole_tensors(site, adapter, copy)
        rank = adapter.delta_rank
        layers[site] = LayerEntry(adapter.kind.name, rank, adapter.scale, adapter.slots, tuple(adapter.target.rows))
    trained = {}
    for key, (parameter, sharding) in trained_of(model, name).items():
        with gathered([parameter]):
            trained[key] = copy(over_model_parallel(parameter.detach(), sharding))
    config = plain_config(mixins[0].config)
    base = identity_of_model(model)
    quantization: Quantization | None = getattr(model, "base_quantization", None)
    about = None if quantization is None else {**quantization.to_dict(), **note_rounds(mixins[0].config)}
    return SavedAdapter(config, base.fingerprint, layers, tuple(trained), {**tensors, **trained}, base, about)


def write_gathered(folder: str | Path, saved: SavedAdapter, sections: Sequence[Section] = ()) -> None:
    """Write what `gather_adapter` gave on rank 0, which needs no other rank. Raises AdapterError if it cannot.

    sections: of the model card.
    """
    try:
        write_adapter(folder, saved, sections)
    except OSError as error:
        raise AdapterError(f"{folder}: the adapter could not be written: {error}") from error


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "lora", fixed_order: bool = False, any_base: bool = False
) -> None:
    """Put a saved adapter on the model, at any model-parallel size: new mixins called `name`, or into those there.

    Ranks, scales and slots are those of the file; fixed_order: of new mixins, see `add_lora`. any_base: also on another
    base than it was trained on, if its layers are there. Under ZeRO-3 or model parallelism every rank has to call it.
    model: or DeepSpeed's engine around it, if its adapters were there when it was made: the optimizer's own copy of the
    values is then that of the file, and its moments stay.
    Raises one AdapterError that lists all problems, and leaves the model as it was. Raises ConfigError for a model that
    is in an engine: the optimizer would put its own values back.
    """
    engine = model if is_engine(model) else None
    model = unwrapped(model, user="load_adapter")
    if engine is None and is_in_engine(model):
        raise ConfigError(
            "load_adapter: the model is in DeepSpeed's engine, whose optimizer keeps the values that train and would "
            "put them back; give the engine in place of the model, or load before deepspeed.initialize"
        )
    base = identity_of_model(model)  # before anything can fail on one rank: all of them speak here
    saved = read_adapter(folder)
    sites = find_all_sites(model)
    parameters = find_all_parameters(model)
    present = adapters_of(model, name)
    problems = _problems(saved, sites, parameters)
    another = None if any_base else base_problem(saved, base, folder)
    problems += [another] if another else []
    if present:
        problems += _differences(saved, present, set(trained_of(model, name)))
        if any(mixin.merged or not mixin.enabled for mixin in mixins_called(model, name).values()):
            problems.append(f"the model's {name!r} is merged or disabled; unmerge() and enable() it first")
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        advice = _rank_to_give(saved, present)
        raise AdapterError(
            f"{folder} does not fit{advice}, {len(problems)} problem{'s' * (len(problems) > 1)}:\n  {shown}"
        )
    if not present and engine is not None:
        refuse_engine(engine)
    if not present:
        targets = {n: Target(sites[n], e.r, e.scale, e.slots) for n, e in saved.layers.items()}
        trained = {n: parameters[n] for n in saved.trained}
        place_mixins(model, saved.config, Plan(targets, trained), name, fixed_order=fixed_order)
    layout = model_parallel_layout()
    with torch.no_grad():
        for site, adapter in adapters_of(model, name).items():
            with gathered(adapter.parameters(), write=True):
                adapter.load_tensors(dict(zip(("A", "B", "magnitude"), saved.of_layer(site).values())))
        for key, (parameter, sharding) in trained_of(model, name).items():
            with gathered([parameter], write=True):
                parameter.copy_(sharding.shard(saved.tensors[key], *layout))
    set_masters = getattr(getattr(engine, "optimizer", None), "refresh_fp32_params", None)
    if set_masters is not None:
        set_masters()


def _problems(saved: SavedAdapter, sites: dict[str, Site], parameters: dict[str, BaseParameter]) -> list[str]:
    """Return what keeps a saved adapter from fitting the model's base, in a sorted list."""
    problems = []
    if not saved.layers and not saved.trained:
        problems.append("the file adapts nothing")
    for name, entry in saved.layers.items():
        site = sites.get(name)
        if site is None:
            problems.append(f"the model has no layer {printable(name)}")
        elif set(entry.slots) - set(site.slot_names) or bool(entry.slots) != bool(site.slot_names):
            problems.append(f"{name}: slots {entry.slots}, the layer has {site.slot_names}")
        elif (entry.kind, list(entry.rows)) != (site.kind.name, site.slot_rows(entry.slots)):
            problems.append(f"{name}: {entry.kind} rows {entry.rows}, the layer is {site.kind.name} with other rows")
    for name in saved.trained:
        site = sites.get(name.removesuffix(".weight"))
        if site is not None and f"{site.name}.weight" == name and quantized_weight_of(site.module) is not None:
            problems.append(f"{name} is trained whole, and quantised in the model; leave it whole, with keep_modules")
        elif name not in parameters:
            problems.append(f"the model has no parameter {printable(name)}")
    expected = saved.expected({name: sites[name].in_features for name in saved.layers if name in sites})
    for place in (parameters[name] for name in saved.trained if name in parameters):
        expected[place.name] = whole_shape(place.module, place.leaf, place.tensor)
    problems += tensor_problems(saved.tensors, expected)
    return sorted(problems)


def _rank_to_give(saved: SavedAdapter, present: dict[str, LoraAdapter]) -> str:
    """Return how the model's LoRA would fit, as a part of a sentence, where all adapters are of one other rank."""
    ranks = {entry.r for entry in saved.layers.values()}
    own_ranks = {adapter.delta_rank for adapter in present.values()}
    if len(ranks) != 1 or len(own_ranks) != 1 or ranks == own_ranks:
        return ""
    scales = {entry.scale for entry in saved.layers.values()}
    alpha = f", lora_alpha={min(ranks) * min(scales):g}" if len(scales) == 1 else ""
    return f" (its rank is {min(ranks)}, the model's {min(own_ranks)}: add LoRA with r={min(ranks)}{alpha})"


def _differences(saved: SavedAdapter, present: dict[str, LoraAdapter], trained: set[str]) -> list[str]:
    """Return where a saved adapter is not what the model's mixins hold, in a list."""
    in_model = {n: (a.delta_rank, a.scale, a.slots) for n, a in present.items()}
    in_file = {n: (e.r, e.scale, e.slots) for n, e in saved.layers.items()}
    problems = [
        f"{printable(name)}: (rank, scale, slots) {in_file.get(name)} in the file, {in_model.get(name)} by the model's "
        "adapter"
        for name in sorted(in_model.keys() | in_file.keys())
        if in_model.get(name) != in_file.get(name)
    ]
    once = trained ^ set(saved.trained)
    problems += [f"{printable(name)} is trained whole in only one of file and model" for name in once]
    has_dora = any(adapter.magnitude_or_none is not None for adapter in present.values())
    if has_dora != saved.config.use_dora:
        problems.append(f"use_dora is {saved.config.use_dora} in the file, {has_dora} in the model")
    return problems

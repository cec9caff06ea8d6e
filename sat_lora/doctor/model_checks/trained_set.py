"""What trains: as the config says, and the same on every rank."""

import re
import warnings
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from sat_lora.doctor.model_checks.passes import LossOf
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.lora.apply import adapters_of, find_all_parameters, find_all_sites
from sat_lora.lora.config import LoraConfig
from sat_lora.lora.mixin import lora_mixins
from sat_lora.lora.optimizer_groups import groups_of
from sat_lora.lora.targets import PRESETS, select
from sat_lora.parallel.distributed import gather_lists
from sat_lora.quantized.quantized_weight import QuantizedWeight


@looks_for("trainable-set", "tower-not-adapted", "dtype-or-device")
def trained_set_findings(model: nn.Module) -> list[Finding]:
    """Return where requires_grad, dtype and device are not what the LoraMixins' configs ask for."""
    mixins = lora_mixins(model)
    if not mixins:
        return []
    trainable_ids = {id(parameter) for mixin in mixins.values() for parameter in mixin.trainable()}
    findings = []
    for wrong, state in (
        (
            [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in trainable_ids],
            "trains, unasked for",
        ),
        ([n for n, p in model.named_parameters() if not p.requires_grad and id(p) in trainable_ids], "does not train"),
    ):
        if wrong:
            seen = f"{wrong[0]} {state}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            findings.append(Finding(code="trainable-set", seen=seen, parameter=wrong[0]))
    for name in sorted({path.rpartition(".")[2] for path in mixins}):
        config = next(mixin.config for path, mixin in mixins.items() if path.rpartition(".")[2] == name)
        findings += _compare_with_config(model, name, config)
    return findings


def _compare_with_config(model: nn.Module, name: str, config: LoraConfig) -> list[Finding]:
    """Return where the adapters called `name` are not on the layers that `config` selects."""
    adapters = adapters_of(model, name)
    sites = find_all_sites(model)
    chosen, _ = select(sites, find_all_parameters(model), config)
    findings = []
    for missing in [layer for layer in chosen if layer not in adapters][:1]:
        count = len([layer for layer in chosen if layer not in adapters])
        seen = f"the config asks for an adapter on {missing}, which has none" + (f"; {count} in all" * (count > 1))
        findings.append(Finding(code="trainable-set", seen=seen, module=missing))
    target_modules = (config.target_modules,) if isinstance(config.target_modules, str) else config.target_modules
    for tower in (preset for preset in target_modules if preset in PRESETS and preset != "all-linear"):
        if not any(re.fullmatch(PRESETS[tower], layer) for layer in adapters):
            seen = f"{tower} was asked for, and no layer of it has an adapter"
            findings.append(Finding(code="tower-not-adapted", seen=seen, option="--target_modules"))
    for layer, adapter in adapters.items():
        weight = sites[layer].module.weight
        dtype = getattr(torch, config.adapter_dtype) if config.adapter_dtype else weight.dtype
        for leaf, parameter in adapter.named_parameters():
            got = (parameter.dtype, parameter.device)
            expected = (dtype, weight.device)
            if got != expected:
                seen = f"{leaf} is {got[0]} on {got[1]}, wanted {expected[0]} on {expected[1]}"
                findings.append(Finding(code="dtype-or-device", seen=seen, parameter=f"{layer}, {leaf}", module=layer))
                return findings  # the others are most likely the same
    return findings


@looks_for("quantized-parameter")
def quantized_parameter_findings(model: nn.Module) -> list[Finding]:
    """Return the finding on quantised weights that are parameters, where DeepSpeed's engine would take hold of them."""
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedWeight)]
    if not names:
        return []
    seen = f"{names[0]} is a parameter, and quantised" + (f"; {len(names)} in all" if len(names) > 1 else "")
    return [Finding(code="quantized-parameter", seen=seen, parameter=names[0], module=names[0].rpartition(".")[0])]


@looks_for("trainable-differs", "parameter-order")
def agreement_findings(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Finding]:
    """Return where ranks do not train the same, in one order, and group it alike.

    Every rank has to call it and gets the same. optimizer: None takes the groups that `parameter_groups` makes.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = groups_of(model, trained, lr=1.0) if optimizer is None else optimizer.param_groups
    trained = [
        (name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype), bool(getattr(p, "model_parallel", False)))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    grouped = [(number, names.get(id(p), "?")) for number, group in enumerate(groups) for p in group["params"]]
    by_rank = gather_lists([(trained, grouped)]) if torch.distributed.is_initialized() else [(trained, grouped)]
    return compare_ranks([trained for trained, _ in by_rank], [grouped for _, grouped in by_rank])


def compare_ranks(trained: Sequence[list[tuple]], grouped: Sequence[list[tuple]]) -> list[Finding]:
    """Return where ranks differ in what trains, or in its order.

    trained: of each rank, (name, shape, dtype, sharded) of what trains, in order. grouped: of each rank, (number of the
    group, name) in order.
    """
    findings = []
    for rank, entries in enumerate(trained):
        if sorted(entries) != sorted(trained[0]):
            only = sorted({*entries} - {*trained[0]}), sorted({*trained[0]} - {*entries})
            some = (only[0] or only[1])[0]
            seen = (
                f"rank {rank} trains {len(entries)} parameters, rank 0 {len(trained[0])}; "
                + "; ".join(f"only on rank {r}: {_words(extra)}" for r, extra in zip((rank, 0), only) if extra)
            )  # fmt: skip
            findings.append(Finding(code="trainable-differs", seen=seen, ranks=(rank,), parameter=some[0]))
            continue
        orders = [[name for name, *_ in listed] for listed in (entries, trained[0])]
        subject = "the model's parameters"
        if orders[0] == orders[1]:
            orders = [grouped[rank], grouped[0]]
            subject = "the optimizer's groups"
        place = next((place for place, pair in enumerate(zip(*orders)) if pair[0] != pair[1]), None)
        if place is not None:
            own_name, first = (
                listed[place] if isinstance(listed[place], str) else listed[place][1] for listed in orders
            )
            seen = f"{subject}: place {place + 1} is {own_name} on rank {rank} and {first} on rank 0"
            findings.append(Finding(code="parameter-order", seen=seen, ranks=(rank,), parameter=own_name))
    return findings


@looks_for("fresh-adapter")
def fresh_adapter_findings(model: nn.Module, loss_of: LossOf, batch: dict) -> list[Finding]:
    """Return a finding if adapters that have not trained yet change the loss of a batch."""
    mixins = [mixin for mixin in lora_mixins(model).values() if mixin.enabled and not mixin.merged]
    if not mixins:
        return []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        # Checkpointed layers run here as well, and torch warns that nothing asks for a gradient.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        adapted = float(loss_of(model, batch))
        for mixin in mixins:
            mixin._state.enabled = False  # the hooks alone: what is trained whole stays in place, also under ZeRO-3
        base = float(loss_of(model, batch))
        for mixin in mixins:
            mixin._state.enabled = True
    for module, mode in modes.items():
        module.training = mode
    eps = max(torch.finfo(parameter.dtype).eps for parameter in model.parameters() if parameter.is_floating_point())
    if abs(adapted - base) <= 4 * eps * max(abs(base), 1.0) or base != base:
        return []
    seen = f"the loss of a batch is {base:.6g} with the base alone and {adapted:.6g} with the fresh adapter"
    return [Finding(code="fresh-adapter", seen=seen)]


def _words(entries: list[tuple]) -> str:
    counted = [(name, len([*same])) for name, same in groupby(entries, key=lambda entry: entry[0])]
    first = entries[0]
    return f"{first[0]} {first[1]} {first[2]}" + (f" and {len(counted) - 1} more" if len(counted) > 1 else "")

"""Trainable parameters that no gradient reaches, and what stands between them and the loss."""

from collections.abc import Callable, Sequence

from torch import nn

from sat_lora.doctor.model_checks.passes import Call, Passes
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.lora.apply import adapters_of, mixins_called
from sat_lora.lora.mixin import lora_mixins


@looks_for("unreachable", "checkpoint-without-grad")
def reachability_findings(model: nn.Module, passes: Sequence[Passes]) -> list[Finding]:
    """Return what none of the batches trains on this rank, `unreachable` or `checkpoint-without-grad`, by cause."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    silent = [name for name in trainable if not any(name in record.arrivals for record in passes)]
    if not silent:
        return []
    if not any(record.has_graph for record in passes):
        return [
            Finding(
                code="unreachable",
                seen=f"the loss asks for no gradient at all, so none of {len(trainable)} parameters learns; something "
                "at the end of the model runs under no_grad or is detached",
                parameter=silent[0],
                module=_where_the_graph_ends(passes[0]),
            )
        ]
    users = users_of(model)
    causes: dict[tuple[str, str, str], list[str]] = {}
    for name in silent:
        causes.setdefault(_cause(name, users, passes), []).append(name)
    return [
        Finding(
            code=code,
            seen=f"{seen}; no gradient comes to {len(names)} of {len(trainable)} parameters, the first {names[0]}"
            + (f", the last {names[-1]}" if len(names) > 1 else ""),
            parameter=names[0],
            module=module,
        )
        for (code, module, seen), names in causes.items()
    ]


def users_of(model: nn.Module) -> dict[str, str]:
    """Return the module whose call uses each parameter: an adapter's layer, else the owner."""
    users = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
    names = {path.rpartition(".")[2] for path in lora_mixins(model)}
    for name in sorted(names):
        paths = {id(adapter): layer for layer, adapter in adapters_of(model, name).items()}
        for path, mixin in ((p, m) for p, m in lora_mixins(model).items() if m in mixins_called(model, name).values()):
            for key, adapter in mixin.adapters.items():
                for leaf, _ in adapter.named_parameters():
                    users[f"{path}.adapters.{key}.{leaf}"] = paths[id(adapter)]
    return users


def _cause(name: str, users: dict[str, str], passes: Sequence[Passes]) -> tuple[str, str, str]:
    """Return (code, module, what was seen) of a parameter that no gradient reaches."""
    module = users[name]
    # Parameters of a container that is never called itself, a ParameterList say, are used by the module around it.
    while module and not any(module in candidate.calls for candidate in passes):
        module = module.rpartition(".")[0]
    record = next((candidate for candidate in passes if module in candidate.calls), None)
    if record is None or not module:
        return "unreachable", users[name], f"{users[name]} runs with none of the batches"
    calls = record.calls[module]
    if not any(call.with_grad for call in calls):
        region = _outermost(record, module, lambda call: call.checkpointed and not call.with_grad)
        if all(call.checkpointed for call in calls):
            seen = f"{region} runs in a checkpointed region whose inputs ask for no gradient, and is never run again"
            return "checkpoint-without-grad", region, seen
        return "unreachable", region, f"{region} runs under no_grad"
    if module not in record.answered:
        following = _next_answered(record, module)
        return "unreachable", module, f"no gradient comes back to the output of {module}{following}"
    if name in record.reached:
        return "unreachable", module, f"a path leads to {name}, but no gradient came; a hook may have stopped it"
    return "unreachable", module, f"a gradient comes to the output of {module}, but what {name} adds to it is detached"


def _outermost(record: Passes, module: str, holds: Callable[[Call], bool]) -> str:
    """Return the outermost module around `module` whose calls were all like that."""
    best = module
    name = module
    while name:
        name = name.rpartition(".")[0]
        if name in record.calls and all(holds(call) for call in record.calls[name]):
            best = name
    return best


def _next_answered(record: Passes, module: str) -> str:
    order = [*record.calls]
    place = order.index(module)
    after = next((name for name in order[place + 1 :] if name in record.answered and not module.startswith(name)), None)
    return f"; the next module that gets one is {after}" if after else ""


def _where_the_graph_ends(record: Passes) -> str | None:
    """Return the first module to end after the last one whose output asked for a gradient."""
    order = [name for name in record.calls if name]
    last = max((place for place, name in enumerate(order) if record.calls[name][0].has_graph), default=-1)
    return order[last + 1] if last + 1 < len(order) else None

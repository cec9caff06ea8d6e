"""Model parallelism: what ranks hold whole is equal, flags tell the truth, and layers compute what one process does.

These checks know no kind of LoRA: they look at values, so that a foreign one, SAT's lora2 say, is found out too.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sat_lora._sat import RowParallelLinear, mpu
from sat_lora.doctor.model_checks.passes import Passes
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.lora.mixin import lora_mixins
from sat_lora.lora.targets import layer_of
from sat_lora.parallel.distributed import gather_lists
from sat_lora.parallel.sharding import model_parallel_layout, sharding_of
from sat_lora.quantized.layers import quantized_weights
from sat_lora.quantized.quantized_weight import QuantizedWeight

PARTITIONED = -1.0
"""The mark of codes that no other rank holds."""


@looks_for("replicas-differ", "sharding-flag", "parallel-rule")
def parallelism_findings(model: nn.Module, passes: Sequence[Passes]) -> list[Finding]:
    """Return what model-parallel ranks hold or compute otherwise than they should.

    Every model-parallel rank has to call it, with gradients still in place, and gets the same.
    """
    if model_parallel_layout()[1] == 1:
        return []
    return [*flag_findings(model), *_drifted(model), *_unequal_gradients(model), *_broken_rule(model, passes)]


@contextmanager
def deltas_that_show(model: nn.Module, std: float = 0.02) -> Iterator[None]:
    """Give trainable parameters that are all zero seeded values inside: a fresh B hides what its layer does wrong.

    Ranks draw the same where they hold a parameter whole. Afterwards they are zero again.
    """
    rank = model_parallel_layout()[0]
    filled = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.numel() and not parameter.any():
                seed = zlib.crc32(name.encode()) + (rank if getattr(parameter, "model_parallel", False) else 0)
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(noise * std)
                filled.append(parameter)
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter in filled:
                parameter.zero_()


@looks_for("replicas-differ")
def quantized_replica_findings(model: nn.Module) -> list[Finding]:
    """Return the finding on quantised weights whose codes or scales are not the same on all ranks that hold them.

    DeepSpeed gives every rank the parameters of the first one; of buffers it takes no notice. Every rank has to call
    it, and gets the same.
    """
    marks = code_marks(model)
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return []
    return compare_codes(gather_lists([(model_parallel_layout()[0], marks)]))


def code_marks(model: nn.Module) -> dict[str, tuple[bool, float]]:
    """Return of each quantised weight, by name, (whether it is cut over the model-parallel ranks, a number of its codes
    and scales), see `compare_codes`.
    """
    return {
        f"{name}.weight": (sharding_of(model.get_submodule(name), "weight").dim is not None, _codes_mark(weight))
        for name, weight in quantized_weights(model)
    }


def compare_codes(by_rank: Sequence[tuple[int, Mapping[str, tuple[bool, float]]]]) -> list[Finding]:
    """Return the finding on quantised weights that differ.

    by_rank: of each rank, its model-parallel rank and by name (whether the weight is cut over those, a number of its
    codes and scales).
    """
    names = dict.fromkeys(name for _, marks in by_rank for name in marks)
    differing: dict[str, list[int]] = {}
    for name in names:
        first: dict[int, float | None] = {}
        is_cut = any(marks[name][0] for _, marks in by_rank if name in marks)
        for rank, (part, marks) in enumerate(by_rank):
            mark = marks[name][1] if name in marks else None
            if first.setdefault(part if is_cut else 0, mark) != mark:
                differing.setdefault(name, []).append(rank)
    if not differing:
        return []
    name, ranks = next(iter(differing.items()))
    lacking = [rank for rank, (_, marks) in enumerate(by_rank) if name not in marks]
    seen = f"it is not quantised on rank {', '.join(map(str, lacking))}" if lacking else "its codes or scales differ"
    seen += " from those of the first rank that holds it" * (not lacking)
    seen += f"; {len(differing)} weights in all" * (len(differing) > 1)
    return [Finding(code="replicas-differ", seen=seen, ranks=tuple(ranks), parameter=name)]


def flag_findings(model: nn.Module) -> list[Finding]:
    """Return findings on flags that do not say how an adapter is cut, or of which two differ."""
    findings: list[Finding] = []
    if model_parallel_layout()[1] == 1:
        return findings
    is_cut_by_name = {}
    for path, mixin in lora_mixins(model).items():
        for key, adapter in mixin.adapters.items():
            for leaf, _ in adapter.named_parameters():
                is_cut_by_name[f"{path}.adapters.{key}.{leaf}"] = adapter.shardings[leaf].dim is not None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        flags = {flag: bool(getattr(parameter, flag, False)) for flag in ("model_parallel", "tensor_model_parallel")}
        is_cut = is_cut_by_name.get(name, flags["model_parallel"])
        wrong = [flag for flag, value in flags.items() if value != is_cut]
        if wrong:
            seen = f"it is {'cut over the ranks' if is_cut else 'whole on every rank'}, and {' and '.join(wrong)} "
            seen += f"say{'s' if len(wrong) == 1 else ''} {not is_cut}"
            findings.append(Finding(code="sharding-flag", seen=seen, parameter=name, module=name.rpartition(".")[0]))
    return findings


def _drifted(model: nn.Module) -> list[Finding]:
    """Return the finding on parameters without the flag that are not bit for bit the same on all ranks of a group."""
    whole = {
        n: [_mark(p)] for n, p in model.named_parameters() if not getattr(p, "model_parallel", False) and p.numel()
    }
    differences = [*_differences(whole)]
    return [
        Finding(
            code="replicas-differ",
            seen="its values differ over the ranks"
            + (f"; {len(differences)} parameters in all" if len(differences) > 1 else ""),
            ranks=ranks,
            parameter=name,
        )
        for name, _, ranks in differences[:1]
    ]


def _unequal_gradients(model: nn.Module, tolerance: float = 1e-3) -> list[Finding]:
    """Return the finding on gradients of whole parameters that differ over the ranks: the next step parts them."""
    norms = {
        name: [float(parameter.grad.double().norm())]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not getattr(parameter, "model_parallel", False)
    }
    differences = [*_differences(norms, tolerance)]
    return [
        Finding(
            code="replicas-differ",
            seen=f"the norms of its gradients differ, so its values will: {norms_by_rank}"
            + (f"; {len(differences)} parameters in all" if len(differences) > 1 else ""),
            ranks=ranks,
            parameter=name,
        )
        for name, norms_by_rank, ranks in differences[:1]
    ]


def _broken_rule(model: nn.Module, passes: Sequence[Passes], tolerance: float = 1e-3) -> list[Finding]:
    """Return the finding on the first output, in the order of the forward pass, that ranks should have alike.

    Such are those of row-parallel layers, with what wraps them, and of transformer layers.
    """
    modules = dict(model.named_modules())
    for record in passes:
        sums = {name: [*calls[0].sums] for name, calls in record.calls.items() if _gives_whole(name, modules)}
        for name, sums_by_rank, ranks in _differences(sums, tolerance):
            seen = f"every rank should have the same output; sums of magnitudes with {record.kind}: {sums_by_rank}"
            return [Finding(code="parallel-rule", seen=seen, ranks=ranks, module=name)]
    return []


def _gives_whole(name: str, modules: dict[str, nn.Module]) -> bool:
    module = modules[name]
    rows = isinstance(module, RowParallelLinear) or any(isinstance(m, RowParallelLinear) for m in module.children())
    is_linear = rows and not any(isinstance(m, nn.ModuleList | nn.ModuleDict) for m in module.children())
    return is_linear or (layer_of(name + ".") is not None and name.rpartition(".")[0].endswith("transformer.layers"))


def _mark(parameter: torch.Tensor) -> float:
    """Return a number that any changed bit changes, in all likelihood."""
    data = parameter.detach().cpu().contiguous()
    return float(zlib.crc32(data.view(torch.uint8).numpy()))


def _codes_mark(weight: QuantizedWeight) -> float:
    """Return such a number of the codes and scales of a weight; one for all that are partitioned, of which each rank
    has bytes of its own, and all use the same.
    """
    if weight.partition is not None:
        return PARTITIONED
    return _mark(weight.codes) + 2**32 * _mark(weight.scales)


def _differences(values: dict[str, list[float]], tolerance: float = 0.0) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (name, words, world ranks) of values that all ranks of the model-parallel group have and that differ."""
    group = mpu.get_model_parallel_group()
    everyone: list[dict[str, list[float]]] = [{}] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, values, group=group)
    ranks = torch.distributed.get_process_group_ranks(group)
    for name in (name for name in values if all(name in rank_values for rank_values in everyone)):
        rows = torch.tensor([rank_values[name] for rank_values in everyone], dtype=torch.float64)
        if float((rows - rows[0]).abs().max()) > tolerance * float(rows.abs().max()):
            yield name, ", ".join(f"rank {rank} {row[-1]:.6g}" for rank, row in zip(ranks, rows)), tuple(ranks)

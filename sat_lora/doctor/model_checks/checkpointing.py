"""Whether what is recomputed in backward is what ran in forward."""

from collections.abc import Sequence

import torch
from torch import nn

from sat_lora.doctor.model_checks.passes import Call, Passes
from sat_lora.findings.finding import Finding, looks_for


@looks_for("recompute-differs", "switched-between-passes")
def checkpointing_findings(model: nn.Module, passes: Sequence[Passes]) -> list[Finding]:
    """Return `recompute-differs` or `switched-between-passes`, of the first batch with one.

    A region without gradients is for `reachability`.
    """
    findings = [finding for record in passes for finding in _switched(record)]
    if findings:
        return findings[:1]  # what is recomputed differs for that reason
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    tolerance = 4 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return [finding for record in passes for finding in _recomputed_otherwise(record, tolerance)][:1]


def _switched(record: Passes) -> list[Finding]:
    before = record.switches[0]
    for later, when in zip(record.switches[1:], _moments(record)):
        changed = [name for name in before.keys() | later.keys() if before.get(name) != later.get(name)]
        if changed:
            name = min(changed)
            return [
                Finding(
                    code="switched-between-passes",
                    seen=f"{name} was {before.get(name)} before forward and {later.get(name)} {when}"
                    + (f", and {len(changed) - 1} more" if len(changed) > 1 else ""),
                    module=name.rpartition(".")[0] if "hooks" not in name else name.partition("'")[0],
                )
            ]
    return []


def _moments(record: Passes) -> list[str]:
    recomputed = ["when a layer was recomputed"] if len(record.switches) > 2 else []
    return [*recomputed, "after backward"]


def _recomputed_otherwise(record: Passes, tolerance: float) -> list[Finding]:
    """Return the finding on the first module that gave another output when it was recomputed.

    Modules are in the order in which they end, so that it is the innermost. Regions are recomputed from the last to the
    first, so outputs are paired by size.
    """
    for name, calls in record.calls.items():
        forward = [call for call in calls if call.checkpointed and not call.in_backward]
        again = [call for call in calls if call.in_backward]
        if not again:
            continue
        if len(forward) != len(again):
            seen = f"{name} ran {len(forward)} times in forward and {len(again)} times when it was recomputed"
            return [Finding(code="recompute-differs", seen=seen, module=name)]
        for pair in zip(sorted(forward, key=_by_size), sorted(again, key=_by_size)):
            if not _same(*pair, tolerance):
                seen = (
                    f"{name}: the sum of its output's magnitudes was {pair[0].sums[1]:.9g} in forward and "
                    f"{pair[1].sums[1]:.9g} when it was recomputed"
                )
                return [Finding(code="recompute-differs", seen=seen, module=name)]
    return []


def _by_size(call: Call) -> tuple[bool, float]:
    size = call.sums[1]
    return size != size, size  # NaN last


def _same(call: Call, other: Call, tolerance: float) -> bool:
    size = max(call.sums[1], other.sums[1])
    return all(abs(a - b) <= tolerance * size or (a != a and b != b) for a, b in zip(call.sums, other.sums))

"""Values that are not finite: the first module that makes one, forward or backward, and on which rank."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from sat_lora.doctor.model_checks.passes import LossOf, Passes
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.parallel.distributed import gather_lists
from sat_lora.training.steps.nonfinite import first_nonfinite


@looks_for("not-finite")
def value_findings(
    model: nn.Module,
    loss_of: LossOf,
    batches: dict[str, dict],
    passes: Sequence[Passes],
    *,
    backward: Callable[[torch.Tensor], None] | None = None,
) -> list[Finding]:
    """Return what is not finite on this rank, of the first kind of batch where some rank's loss or gradients are not.

    Every rank has to call it: all repeat the passes of that kind, for those that share a model or its weights.
    """
    for record in passes:
        problem = _what_is_bad(record)
        if not any(gather_lists([problem]) if torch.distributed.is_initialized() else [problem]):
            continue

        def repeat(batch=batches[record.kind]) -> None:
            loss = loss_of(model, batch)
            if loss.requires_grad:
                (backward or torch.Tensor.backward)(loss)

        origin = first_nonfinite(model, repeat)
        if problem is None:
            return []
        seen = f"with {record.kind} the {problem} is not finite"
        if origin is None:
            return [Finding(code="not-finite", seen=f"{seen}, but everything was when it was repeated")]
        seen += f", first in {origin.place}"
        return [Finding(code="not-finite", seen=seen, module=origin.module, parameter=origin.parameter)]
    return []


def _what_is_bad(record: Passes) -> str | None:
    if record.loss - record.loss != 0:  # NaN or infinite
        return "loss"
    return "gradient" if record.nonfinite else None

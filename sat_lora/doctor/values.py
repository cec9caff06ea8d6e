"""Values that are not finite: the first module that makes one, forward or backward, and on which rank."""

from collections.abc import Sequence

from torch import nn

from sat_lora.doctor.findings import Finding
from sat_lora.doctor.passes import LossOf, Passes
from sat_lora.training.nonfinite import first_nonfinite


def value_findings(model: nn.Module, loss_of: LossOf, batches: dict[str, dict], passes: Sequence[Passes]) -> list:
    """Of the first batch on this rank whose loss or gradients are not finite; its passes are run again to look closer.

    Ranks that share a model have to call it together, and do: they see the same.
    """
    for record in passes:
        if record.loss - record.loss == 0 and not record.nonfinite:  # neither NaN nor infinite
            continue

        def repeat(batch=batches[record.kind]) -> None:
            loss = loss_of(model, batch)
            if loss.requires_grad:
                loss.backward()

        origin = first_nonfinite(model, None, repeat)
        what = "loss" if record.loss - record.loss != 0 else "gradient"
        seen = f"with {record.kind} the {what} is not finite"
        if origin is None:
            return [Finding(code="not-finite", seen=f"{seen}, but not when it was repeated")]
        return [
            Finding(
                code="not-finite",
                seen=f"{seen}, first in {origin.words}",
                module=origin.module,
                parameter=origin.parameter,
            )
        ]
    return []

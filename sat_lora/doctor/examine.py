"""The checks of a model with adapters that need no engine: one forward and backward pass per kind of batch."""

from collections.abc import Callable

import torch
from torch import nn

from sat_lora.doctor.model_checks.checkpointing import checkpointing_findings
from sat_lora.doctor.model_checks.gradients import gradient_findings
from sat_lora.doctor.model_checks.parallelism import deltas_that_show, parallelism_findings
from sat_lora.doctor.model_checks.passes import LossOf, record_passes
from sat_lora.doctor.model_checks.reachability import reachability_findings
from sat_lora.doctor.model_checks.trained_set import agreement_findings, fresh_adapter_findings, trained_set_findings
from sat_lora.doctor.model_checks.values import value_findings
from sat_lora.doctor.run_checks.optimization import optimizer_findings
from sat_lora.findings.finding import Finding, joined
from sat_lora.parallel.distributed import gather_lists
from sat_lora.training.steps.random_state import random_state, set_random_state


def examine(
    model: nn.Module,
    batches: dict[str, dict],
    loss_of: LossOf,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    bucket_size: int = 500_000_000,
    fresh: bool = True,
    backward: Callable[[torch.Tensor], None] | None = None,
) -> list[Finding]:
    """Return what is wrong with how `model` trains, on all ranks; every rank calls it and gets the same findings.

    model: not wrapped by an engine yet, in training mode. batches: this rank's, by kind; every rank has the same kinds.
    loss_of: from model and batch to the loss. fresh: the adapters have not trained yet. bucket_size: DeepSpeed's
    reduce_bucket_size, in elements. backward: called with the loss in place of its own. Afterwards parameters,
    gradients and random states are what they were.
    """
    before = random_state()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        findings = trained_set_findings(model)
        if optimizer is not None:
            findings += optimizer_findings(model, optimizer)
        if fresh:
            findings += fresh_adapter_findings(model, loss_of, next(iter(batches.values())))
        passes = []
        parallel = []
        with deltas_that_show(model):
            for kind, batch in batches.items():
                model.zero_grad(set_to_none=True)
                passes.append(record_passes(model, loss_of, batch, kind, backward=backward))
                parallel += parallelism_findings(model, passes[-1:])
            findings += value_findings(model, loss_of, batches, passes, backward=backward)
        findings += reachability_findings(model, passes)
        findings += checkpointing_findings(model, passes)
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        set_random_state(before)
    shared = [*agreement_findings(model, optimizer), *gradient_findings(model, passes, bucket_size=bucket_size)]
    return joined(_gathered([*findings, *parallel, *shared]))


def _gathered(findings: list[Finding]) -> list[list[Finding]]:
    if not torch.distributed.is_initialized():
        return [findings]
    return gather_lists([findings])

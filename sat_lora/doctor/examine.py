"""The checks of a model with adapters that need no engine: one forward and backward pass per kind of batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from sat_lora.doctor.model_checks.checkpointing import checkpointing_findings
from sat_lora.doctor.model_checks.gradients import gradient_findings
from sat_lora.doctor.model_checks.parallelism import (
    deltas_that_show,
    parallelism_findings,
    quantized_replica_findings,
)
from sat_lora.doctor.model_checks.passes import LossOf, record_passes
from sat_lora.doctor.model_checks.reachability import reachability_findings
from sat_lora.doctor.model_checks.trained_set import (
    agreement_findings,
    fresh_adapter_findings,
    quantized_parameter_findings,
    trained_set_findings,
)
from sat_lora.doctor.model_checks.values import value_findings
from sat_lora.doctor.run_checks.optimization import optimizer_findings
from sat_lora.errors import ConfigError
from sat_lora.findings.finding import Finding, joined
from sat_lora.parallel.distributed import gather_lists, run_on_all_ranks
from sat_lora.parallel.wrapped import is_engine, is_in_engine, require_trainable, unwrapped
from sat_lora.printable import printable
from sat_lora.training.steps.nonfinite import discard_step
from sat_lora.training.steps.random_state import random_state, set_random_state

TENSORS = {"input_ids", "labels", "attention_mask", "position_ids"}
"""Names of tensors in a batch, which are no kinds of batches."""


def examine(
    model: nn.Module,
    batches: Mapping[str, Any] | Sequence[Any],
    loss_of: LossOf,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    bucket_size: int = 500_000_000,
    fresh: bool = True,
) -> list[Finding]:
    """Return what is wrong with how `model` trains, on all ranks; every rank calls it and gets the same findings.

    model: in training mode, best before deepspeed.initialize, since no rank waits for another in a backward pass then;
    or DeepSpeed's engine, whose steps are thrown away. batches: this rank's, by kind or in a list; every rank has the
    same kinds. loss_of: from model and batch to the loss, a scalar. fresh: the adapters have not trained yet.
    bucket_size: DeepSpeed's reduce_bucket_size, in elements. Afterwards parameters, gradients and random states are
    what they were. Raises ConfigError on every rank where nothing trains, or no batch is given.
    """
    by_kind = _on_all_ranks(lambda: _checked(model, batches))
    engine = model if is_engine(model) else None
    inner = unwrapped(model, user="examine")
    if engine is None:
        return _examine(inner, by_kind, loss_of, None, optimizer=optimizer, bucket_size=bucket_size, fresh=fresh)

    def backward(loss: torch.Tensor) -> None:
        engine.backward(loss)
        with discard_step(engine):
            engine.step()

    counts = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "micro_steps")}
    try:
        with mock.patch.object(engine, "lr_scheduler", None):
            return _examine(
                inner,
                by_kind,
                lambda _, batch: loss_of(engine, batch),
                backward,
                optimizer=optimizer,
                bucket_size=bucket_size,
                fresh=fresh,
            )
    finally:
        for name, count in counts.items():
            setattr(engine, name, count)


def _examine(
    model: nn.Module,
    batches: dict[str, Any],
    loss_of: LossOf,
    backward: Callable[[torch.Tensor], None] | None,
    *,
    optimizer: torch.optim.Optimizer | None,
    bucket_size: int,
    fresh: bool,
) -> list[Finding]:
    """Return the findings on a model that is no engine. backward: called with the loss in place of its own."""
    loss_of = _scalar(loss_of)
    before = random_state()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        findings = [*trained_set_findings(model), *quantized_parameter_findings(model)]
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
    shared = quantized_replica_findings(model)
    shared += [*agreement_findings(model, optimizer), *gradient_findings(model, passes, bucket_size=bucket_size)]
    return joined(_gathered([*findings, *parallel, *shared]))


def _checked(model: nn.Module, batches: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Return the batches by kind. Raises ConfigError for what cannot be examined."""
    inner = unwrapped(model, user="examine")
    require_trainable(inner, user="examine")
    if is_in_engine(inner) and not is_engine(model):
        raise ConfigError(
            "examine: the model is in DeepSpeed's engine, whose hooks take its gradients; give the engine in place of "
            "the model, or examine it before deepspeed.initialize"
        )
    if is_engine(model) and model.gradient_accumulation_steps() != 1:
        raise ConfigError(
            f"examine: the engine accumulates {model.gradient_accumulation_steps()} micro-batches, and each batch here "
            "is a step of its own; examine the model before deepspeed.initialize"
        )
    if not isinstance(batches, Mapping | list | tuple):
        raise ConfigError(
            f'examine: got a {type(batches).__name__} for the batches; give them by kind, {{"images": batch}}, or in a '
            "list"
        )
    if not batches:
        raise ConfigError("examine: there are no batches; give at least one of each kind that a run may meet")
    if isinstance(batches, Mapping):
        if not TENSORS.isdisjoint(batches):
            raise ConfigError(
                f"examine: the batches are one batch, with {', '.join(map(str, batches))} in it; give it by its kind, "
                '{"images": batch}, or in a list'
            )
        return {str(kind): batch for kind, batch in batches.items()}
    return {f"batch {number}": batch for number, batch in enumerate(batches)}


def _scalar(loss_of: LossOf) -> LossOf:
    """Return `loss_of`, which raises ConfigError where what it returns is no loss."""

    def scalar_loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
        loss = loss_of(model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
            raise ConfigError(
                f"examine: loss_of returned a {type(loss).__name__}{shape}; wanted the loss, a tensor with one number"
            )
        return loss

    return scalar_loss_of


def _on_all_ranks(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `step` returns, where every rank has the same kinds; a mistake of any rank is raised on all."""
    if not torch.distributed.is_initialized():
        return step()
    batches = run_on_all_ranks(step)
    kinds = gather_lists([tuple(batches)])
    if len({*kinds}) > 1:
        texts = "; ".join(f"rank {rank} has {', '.join(of_rank)}" for rank, of_rank in enumerate(kinds))
        raise ConfigError(f"examine: every rank needs the same kinds of batches, and {printable(texts)}")
    return batches


def _gathered(findings: list[Finding]) -> list[list[Finding]]:
    if not torch.distributed.is_initialized():
        return [findings]
    return gather_lists([findings])

"""One training step and one validation."""

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sat_lora._sat import mpu
from sat_lora.parallel.distributed import World, gather_lists
from sat_lora.training.metrics.answers import AnswersOf, Metric
from sat_lora.training.steps.broken_samples import broken_in
from sat_lora.training.steps.loss import (
    answer_loss_sum,
    count_answer_tokens,
    on_device,
    sum_over_data_parallel,
    sum_over_ranks,
)
from sat_lora.training.steps.nonfinite import Origin, discard_step, first_nonfinite, nonfinite_gradients
from sat_lora.training.steps.observers import NOBODY, Observers
from sat_lora.training.steps.random_state import random_state, set_random_state

ON_THE_HOST = ("image_embed_mask", "vision_expert_mask", "labels")
"""Tensors that only say where something is: reading one on a GPU, the host would wait for all that it has
still to do.
"""


def to_device(batch: dict, device: torch.device) -> dict:
    """Return the tensors of a collated batch by name, on `device` but for ON_THE_HOST; what is no tensor is
    left out.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return {name: t if name in ON_THE_HOST else t.to(device, non_blocking=True) for name, t in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks agree on after a step."""

    loss: float | None  # mean per answer token over all ranks and micro-batches; None where there is none
    nonfinite: str | None = None  # what was not finite, and where it began; then nothing has moved
    stop: signal.Signals | None = None  # the signal that some rank has received
    counts: tuple[float, ...] = ()  # each number that ranks gave, summed over all of them


def train_step(
    engine,
    micro_batches: list[dict],
    world: World,
    tokens: torch.Tensor | float,
    *,
    checks_gradients: bool = True,
    signals: Mapping[signal.Signals, int] | None = None,
    counts: Sequence[float] = (),
    observers: Observers = NOBODY,
) -> StepResult:
    """Take one optimizer step, unless the loss or a gradient is not finite on any rank: then no rank moves. Return what
    all ranks agree on.

    tokens: answer tokens of the step over all ranks, on the device if they are a tensor: the host does not wait for
    them. Each micro-batch's loss is a sum divided by it. DeepSpeed then averages over micro-batches and data-parallel
    ranks, so it is multiplied by both: the gradient is that of the joined batch, however the tokens are spread.
    checks_gradients: False looks at the loss alone (fp16, where DeepSpeed skips gradients that overflow). signals: how
    many of each this rank has received. counts: other numbers of this rank, whose sums all ranks have to know.
    observers: are told of the phases.
    The host waits for the device once, for the loss, and for all that ranks have to agree on with it.
    """
    answers = on_device(tokens, world.device)
    tokens = answers.clamp(min=1)
    weight = (len(micro_batches) * world.data_parallel_size / tokens).float()
    signals = signals or {}
    random_before = random_state()
    total = _accumulate(engine, micro_batches, world, weight, observers)
    observers.on_phase("reduce")
    shares_loss = mpu.get_model_parallel_rank() == 0  # ranks that share a sample have the same loss
    own = [
        total if shares_loss else 0.0,
        ~total.isfinite(),
        nonfinite_gradients(engine) if checks_gradients else 0.0,
        *signals.values(),
        *counts,
    ]
    sums = sum_over_ranks(*own, device=world.device)
    loss, bad_losses, bad_gradients, *rest, answers, tokens = torch.cat([sums, answers[None], tokens[None]]).tolist()
    received = rest[: len(signals)]
    summed_counts = rest[len(signals) :]
    nonfinite = None
    if bad_losses or bad_gradients:
        with discard_step(engine):
            engine.step()
            set_random_state(random_before)
            source = first_nonfinite(engine.module, lambda: _repeat(engine, micro_batches, world, weight))
        nonfinite = _describe("loss" if bad_losses else "gradient", gather_lists([source]))
    else:
        observers.on_phase("optimizer")
        engine.step()
    stop = next((number for number, count in zip(signals, received) if count), None)
    # A loss of nothing would look like a perfect one.
    mean = loss / tokens if answers or nonfinite else None
    return StepResult(loss=mean, nonfinite=nonfinite, stop=stop, counts=tuple(summed_counts))


def _accumulate(
    engine, micro_batches: list[dict], world: World, weight: torch.Tensor, observers: Observers = NOBODY
) -> torch.Tensor:
    """Run all passes of a step, up to the `engine.step()` that moves the optimizer; return the sum of their losses, a
    float32 scalar on the device.

    weight: the factor of each loss, a scalar.
    """
    total = torch.zeros((), device=world.device)
    for number, batch in enumerate(micro_batches):
        if number:
            engine.step()  # between micro-batches it only counts them
        observers.on_phase("forward", micro_batch=number)
        batch = to_device(batch, world.device)
        loss = answer_loss_sum(engine, batch)
        observers.on_phase("backward")
        engine.backward(loss * weight)
        total += loss.detach()
    return total


def _repeat(engine, micro_batches: list[dict], world: World, weight: torch.Tensor) -> None:
    """Run a step whose gradients are thrown away, see `discard_step`."""
    _accumulate(engine, micro_batches, world, weight)
    engine.step()


def _describe(what: str, sources: list[Origin | None]) -> str:
    """Return a clause that says what is not finite and where it began, from `first_nonfinite` of every rank."""
    places = [(source.order, rank, source.place) for rank, source in enumerate(sources) if source is not None]
    if not places:
        return f"the {what} is not finite, but when the step was repeated everything was"
    _, rank, place = min(places)
    return f"the {what} is not finite, first in {place} on rank {rank}"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What all ranks have measured together in a pass over the validation batches."""

    loss: float | None  # mean per answer token, None without any
    metrics: dict[str, float]  # by name, without those that had nothing to measure
    broken: list[tuple[str, str, str]]  # (path, reason, sample) of those that could not be read


@torch.no_grad()
def validate(
    engine,
    batches: Iterable[dict],
    world: World,
    metrics: Mapping[str, Metric] | None = None,
    observers: Observers = NOBODY,
) -> Validation:
    """Return what a pass over the `batches` of all ranks measures, the same on each rank. Every rank has the same
    number of batches.

    metrics: what to measure beside the loss, the same on every rank; without any, logits are dropped as they come.
    """
    engine.eval()
    metrics = metrics or {}
    total = on_device(0.0, world.device)
    tokens = 0
    broken: list[tuple[str, str, str]] = []
    ratios = torch.zeros(len(metrics), 2, dtype=torch.float64, device=world.device)
    for batch in batches:
        observers.on_phase("evaluate")
        tokens += count_answer_tokens(batch["labels"])
        broken += broken_in([batch])
        on_logits = AnswersOf() if metrics else None
        total += answer_loss_sum(engine, to_device(batch, world.device), on_logits)
        if on_logits is not None:
            answers = on_logits.answers(batch["labels"])
            for sums, metric in zip(ratios, metrics.values()):
                ratio = metric(answers)
                sums += torch.stack([on_device(ratio.total, world.device), on_device(ratio.count, world.device)])
    engine.train()
    loss_sum, all_tokens, failures, *sums = sum_over_data_parallel(
        total, tokens, len(broken), *ratios.flatten(), device=world.device
    )
    measured = zip(metrics, sums[::2], sums[1::2])
    return Validation(
        loss=loss_sum / all_tokens if all_tokens else None,
        metrics={name: part / count for name, part, count in measured if count},
        broken=gather_lists(broken) if failures else [],
    )

"""What is wrong with the gradients of a step, asked between backward and the optimizer, in any training loop.

watch = GradientWatch(model)  # or the engine
for batch in batches:
    ...
    watch.check()  # after backward, before the step
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sat_lora.doctor.model_checks.gradients import Arrivals, arrival_findings
from sat_lora.errors import ConfigError, TrainingError
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.parallel.distributed import gather_lists
from sat_lora.parallel.wrapped import is_engine, require_trainable, unwrapped
from sat_lora.training.steps.nonfinite import nonfinite_gradients

BUCKET = 500_000_000  # elements, DeepSpeed's own default


@dataclass(frozen=True)
class Seen:
    """What one rank has seen since the last look."""

    arrivals: Arrivals
    problem: str | None = None
    """Why the rank cannot tell anything."""
    nonfinite: tuple[str, ...] = ()
    """The parameters whose gradient holds a NaN or infinity, in the order in which they came."""
    sum_is_finite: bool = True
    """Whether what the optimizer is going to step is finite: sums over micro-batches and ranks."""


@dataclass
class _Look:
    """The gradients that have come since the last look."""

    names: list[str] = field(default_factory=list)
    is_finite: dict[str, torch.Tensor] = field(default_factory=dict)
    """A boolean scalar of each parameter, on its device: nothing waits for it before it is asked for."""


class GradientWatch:
    """Tells, between backward and the optimizer's step, which gradients are not finite, lack, or come in another order.

    It puts a hook on every trainable parameter, which sees the gradient of this rank's own batch, before ranks sum them
    and before ZeRO takes them away. As a context it takes its hooks away at the end; `close` does so too.
    """

    def __init__(self, model: nn.Module, *, bucket_size: int = BUCKET):
        """Watch the gradients of `model`, or of the model in DeepSpeed's engine, which may be made afterwards.

        bucket_size: DeepSpeed's `reduce_bucket_size`, in elements. Raises ConfigError where nothing trains.
        """
        self._engine: Any = model if is_engine(model) else None
        self._model = unwrapped(model, user="GradientWatch")
        self._bucket_size = bucket_size
        self._look = _Look()
        self._is_closed = False
        self._watched: dict[str, nn.Parameter] = {}
        self._remove: list[Callable[[], None]] = []
        for name, parameter in require_trainable(self._model, user="GradientWatch"):
            self._watched[name] = parameter
            self._remove.append(parameter.register_hook(partial(self._note, name)).remove)

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        look = self._look
        is_finite = gradient.isfinite().all()
        look.names.append(name)
        look.is_finite[name] = is_finite & look.is_finite[name] if name in look.is_finite else is_finite

    def findings(self) -> list[Finding]:
        """Return what is wrong with the gradients since the last look, the same on all ranks: every rank calls it.

        The codes are those of docs/doctor.md: `not-finite`; `gradient-missing` and `gradient-order`, where ranks
        differ; `unreachable`, where a parameter got no gradient on any rank. Call it once after the backward passes of
        a step and before the step. Under fp16 infinities are DeepSpeed's way to find its loss scale, and no fault.
        Raises ConfigError on every rank where there was no backward pass, after `close`, and where other parameters
        train than at the beginning.
        """
        own = self._seen()
        ranks = gather_lists([own]) if torch.distributed.is_initialized() else [own]
        problem = next((seen.problem for seen in ranks if seen.problem is not None), None)
        if problem is None and not any(seen.arrivals.names for seen in ranks):
            problem = "no gradient has come since the last look; call it once after backward and before the step"
        if problem is not None:
            raise ConfigError(f"GradientWatch: {problem}")
        arrivals = [seen.arrivals for seen in ranks]
        of_ranks = arrival_findings(self._model, arrivals, bucket_size=self._bucket_size)
        return [*_not_finite(ranks), *of_ranks, *self._nowhere(arrivals)]

    def check(self) -> None:
        """Raise TrainingError, with every finding, where there is one. Otherwise as `findings`."""
        findings = self.findings()
        if findings:
            raise TrainingError("\n".join(str(finding) for finding in findings))

    def close(self) -> None:
        """Take the hooks away. A second call changes nothing."""
        self._is_closed = True
        for remove in self._remove:
            remove()
        self._remove.clear()

    def __enter__(self) -> "GradientWatch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _seen(self) -> Seen:
        """Return what this rank has seen, and begin anew."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        look = self._look
        self._look = _Look()
        arrivals = Arrivals(rank, "this step's batch", tuple(dict.fromkeys(look.names)))
        problem = self._problem()
        if problem is not None:
            return Seen(arrivals, problem)
        nonfinite = tuple(name for name, is_finite in look.is_finite.items() if not bool(is_finite))
        sum_is_finite = self._engine is None or not bool(nonfinite_gradients(self._engine))
        return Seen(arrivals, None, nonfinite, sum_is_finite)

    def _problem(self) -> str | None:
        """Return why nothing can be told; None if it can."""
        if self._is_closed:
            return "it is closed; make another"
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        differing = [name for name in (trained | self._watched) if trained.get(name) is not self._watched.get(name)]
        if differing:
            return (
                f"other parameters train now than when it was made ({differing[0]} and {len(differing) - 1} more); "
                "make it after add_lora and after whatever else freezes or unfreezes"
            )
        try:
            unwrapped(self._engine or self._model, user="")
        except ConfigError:
            return "the engine has been closed; make another with the new engine"
        return None

    @looks_for("unreachable")
    def _nowhere(self, arrivals: list[Arrivals]) -> list[Finding]:
        """Return the finding on parameters to which no rank's backward pass has come."""
        everywhere = {name for rank_arrivals in arrivals for name in rank_arrivals.names}
        absent = [name for name in self._watched if name not in everywhere]
        if not absent:
            return []
        seen = f"no gradient came on any rank to {len(absent)} of {len(self._watched)} parameters, the first "
        seen += f"{absent[0]}, the last {absent[-1]}" if len(absent) > 1 else absent[0]
        return [Finding(code="unreachable", seen=seen, parameter=absent[0], module=absent[0].rpartition(".")[0])]


@looks_for("not-finite")
def _not_finite(ranks: list[Seen]) -> list[Finding]:
    """Return the finding on the first gradient that is not finite, or on a sum of finite ones that is not."""
    bad = [(seen.arrivals.rank, name) for seen in ranks for name in seen.nonfinite]
    if bad:
        _, first = bad[0]
        count = len({name for _, name in bad})
        more = f", and {count - 1} more after it" if count > 1 else ""
        return [
            Finding(
                code="not-finite",
                seen=f"the gradient of {first} holds a NaN or infinity{more}",
                ranks=tuple(sorted({rank for rank, _ in bad})),
                parameter=first,
                module=first.rpartition(".")[0],
            )
        ]
    overflowing = tuple(seen.arrivals.rank for seen in ranks if not seen.sum_is_finite)
    if overflowing:
        seen = "every rank's gradients are finite, and their sum over micro-batches and ranks is not"
        return [Finding(code="not-finite", seen=seen, ranks=overflowing)]
    return []

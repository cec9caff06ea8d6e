"""What watches a run: logs, the screen, a watchdog's trace, whatever else a project keeps of its runs.

The loop tells what happens and knows nobody who listens. A new listener is a subclass of `Observer`, put into the
`Observers` of the run. Stop signals are no observer: the loop asks for them, so that all ranks agree on them in a step.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sat_lora.printable import printable


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is measured of the steps since the last figures, at every --log-interval-th step and at the last."""

    grad_norm: float | None
    """The norm before clipping; None where DeepSpeed does not tell it (ZeRO 0 in fp32), and where there was no loss."""
    samples_per_second: float
    """The samples of all ranks."""
    peak_memory_mib: float
    """The most memory of this rank, see `peak_memory_mib`."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step that is done."""

    step: int
    """The number of the step, counted from 1."""
    loss: float | None
    """The mean per answer token over all ranks and micro-batches; None where none of the samples could be used."""
    lr: float
    """The learning rate of the step."""
    skipped: str | None = None
    """What was not finite in a step that moved nothing; None where it moved."""
    figures: Figures | None = None
    """What was measured; None at a step that is not logged."""


class Answers(Protocol):
    """What a run answers to some validation samples."""

    def lines(self) -> Iterator[str]:
        """Yield a line of JSON for each sample."""

    def pictures(self) -> Iterator[tuple[str, bytes, tuple[int, int]]]:
        """Yield (text, PNG, its width and height) of some samples."""


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """A pass over the validation data."""

    step: int
    """Steps done before it."""
    loss: float | None
    """The mean per answer token; None where none of the samples has an answer."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics by name, those that were asked for beside the loss, see `training.metrics`."""
    judged_by: str = "loss"
    """The loss, or the metric that says which validation is the best."""
    is_best: bool = False
    """Whether none of this run was as good."""
    answers: Answers | None = None
    """What was answered to --eval-samples; None without."""


class Observer:
    """The base of what is told of the events in a run. Each rank has its own; a subclass has the methods that it needs.

    No observer may call a collective, or change what it is given: the loop does not wait for observers to agree. A
    method that raises is said once and ends nothing, see `Observers`.
    """

    name = ""
    """What is said to fail if a method raises; empty: the class, by its name."""

    def on_start(self, total_steps: int, start_step: int) -> None:
        """Hear that the loop begins, after `start_step` of `total_steps` steps."""

    def on_phase(self, phase: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        """Hear that a phase begins, one of `rank_files.PHASES`.

        step: counted from 1. micro_batch: within the step, from 0. None: as before. It is called several times a step:
        whatever is done here has to take microseconds.
        """

    def on_broken(self, broken: Sequence[tuple[str, ...]], step: int) -> None:
        """Hear of samples of all ranks that cannot be used: (path, reason, sample) of each; see `collate`."""

    def on_step(self, report: StepReport) -> None:
        """Hear that a step is done."""

    def on_validation(self, report: ValidationReport) -> None:
        """Hear that a validation is done."""

    def on_save(self, step: int, adapter: Path, checkpoint: Path) -> None:
        """Hear that a save is on the disk, in these folders. It is called on rank 0 alone, by the thread that has
        written the save, while the steps go on.
        """

    def on_end(self, error: BaseException | None) -> None:
        """Hear that the run ends, by that error if there is one."""


EVENTS = tuple(name for name in vars(Observer) if name.startswith("on_"))


class Observers(Observer):
    """Several observers as one: each event comes to all of them, in the order in which they are given.

    An observer that raises is named once, by `say`, and the others and the run go on; it is told of later events again.
    As a context, it tells them how the block has ended. say: shows a line.
    """

    def __init__(self, observers: Iterable[Observer] = (), say: Callable[[str], None] = lambda line: None):
        self._say = say
        self._failed: set[str] = set()
        members = tuple(observers)
        # A member without a method of its own for an event is not called: a step's events have to cost next to nothing.
        self._members = {
            event: [member for member in members if getattr(type(member), event) is not getattr(Observer, event)]
            for event in EVENTS
        }
        self._on_phase = [(member, member.on_phase) for member in self._members["on_phase"]]

    def on_start(self, total_steps: int, start_step: int) -> None:
        self._tell("on_start", total_steps, start_step)

    def on_phase(self, phase: str, *, step: int | None = None, micro_batch: int | None = None) -> None:
        for member, on_phase in self._on_phase:
            try:
                on_phase(phase, step=step, micro_batch=micro_batch)
            except Exception as error:
                self._has_failed(member, error)

    def on_broken(self, broken: Sequence[tuple[str, ...]], step: int) -> None:
        self._tell("on_broken", broken, step)

    def on_step(self, report: StepReport) -> None:
        self._tell("on_step", report)

    def on_validation(self, report: ValidationReport) -> None:
        self._tell("on_validation", report)

    def on_save(self, step: int, adapter: Path, checkpoint: Path) -> None:
        self._tell("on_save", step, adapter, checkpoint)

    def on_end(self, error: BaseException | None) -> None:
        self._tell("on_end", error)

    def _tell(self, event: str, *content: Any) -> None:
        """Call the method `event` of all observers that have it."""
        for member in self._members[event]:
            try:
                getattr(member, event)(*content)
            except Exception as error:  # of a full disk, a terminal that has gone, a service that does not answer
                self._has_failed(member, error)

    def _has_failed(self, member: Observer, error: Exception) -> None:
        """Say that an observer cannot do its work, once for each name."""
        name = member.name or type(member).__name__
        if name in self._failed:
            return
        self._failed.add(name)
        reason = printable(error if isinstance(error, OSError) else f"{type(error).__name__}: {error}")
        with contextlib.suppress(Exception):  # the screen may be what fails
            self._say(f"warning: {name} cannot be written: {reason}; the run goes on without it")

    def __enter__(self) -> "Observers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.on_end(error)


NOBODY = Observers()
"""No observers at all."""

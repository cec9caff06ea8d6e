"""The training loop over a DeepSpeed engine. It is watched by `Observers`, of which it knows none."""

import itertools
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sat_lora.errors import TrainingError
from sat_lora.lora.optimizer_groups import set_learning_rate
from sat_lora.parallel.distributed import World, gather_lists, run_on_all_ranks
from sat_lora.parallel.stop_signals import Stopped, StopSignals
from sat_lora.training.answers.samples import SampleQuestions
from sat_lora.training.metrics.answers import Metric
from sat_lora.training.metrics.generated import settled_name
from sat_lora.training.metrics.registry import LOSS
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.runs.step_progress import peak_memory_mib
from sat_lora.training.saving import BackgroundWriter, finish_saving, start_saving
from sat_lora.training.settings.config import Saving, TrainConfig
from sat_lora.training.steps.broken_samples import BrokenSamples
from sat_lora.training.steps.checkpoint import RunState, samples_per_step
from sat_lora.training.steps.loss import count_answer_tokens, sum_on_device
from sat_lora.training.steps.nonfinite import discard_step
from sat_lora.training.steps.observers import NOBODY, Figures, Observers, StepReport, ValidationReport
from sat_lora.training.steps.step import StepResult, train_step, validate


def train(
    engine,
    loader: Iterable[dict],
    valid: Iterable[dict] | None,
    config: TrainConfig,
    run: RunFolder,
    world: World,
    state: RunState,
    *,
    dataset_size: int,
    metrics: Mapping[str, Metric] | None = None,
    questions: SampleQuestions | None = None,
    lower_is_better: bool = True,
    observers: Observers = NOBODY,
) -> None:
    """Train from step `state.step` to `config.schedule.steps`; evaluate, save and report on the way and at the end.
    Every rank has to call it; `state` is changed as steps are done.

    Saves are written beside the steps that follow, one at a time; all are on the disk when it returns or is stopped.

    loader: micro-batches of this rank without end, from where `state` left off. valid: a pass over the validation
    batches of this rank, as many on every rank; None if there are none. dataset_size: training samples in an epoch.
    metrics: what a validation measures beside the loss. questions: what it has answered. lower_is_better: of what
    --metric names. After --early-stopping validations that were not better it returns, with all saved: `ends_early`
    says whether. observers: are told of all that happens but the end, which is
    for whoever has made them to tell.
    Raises on every rank, at the same step: DataError where too many samples are broken; Stopped where a rank received
    SIGTERM or SIGINT, the step was finished and everything saved; AdapterError or CheckpointError where a save could
    not be written, at the next step or save, or at the end; TrainingError where more than --skip-nonfinite steps were
    not finite, of which none moved anything.
    """
    observers.on_start(config.schedule.steps, state.step)
    engine.train()
    with StopSignals() as signals, BackgroundWriter() as writer:
        loop = _Loop(
            engine=engine,
            batches=iter(loader),
            valid=valid,
            config=config,
            run=run,
            world=world,
            state=state,
            known=BrokenSamples(dataset_size, config.data.max_broken_share),
            metrics=metrics or {},
            questions=questions,
            lower_is_better=lower_is_better,
            observers=observers,
            signals=signals,
            writer=writer,
            first_step=state.step,
            saved=state.step or None,
        )
        loop.validate_if_owed()
        for step in range(state.step, config.schedule.steps):
            if ends_early(config.saving, state):
                break
            loop.step(step)
        observers.on_phase("write")
        finish_saving(writer)


def ends_early(saving: Saving, state: RunState) -> bool:
    """Return whether --early-stopping ends the run here."""
    return 0 < saving.early_stopping <= state.not_better


class _Pace:
    """A measure of the samples that are trained on in a second, validations and the beginnings of saves left out."""

    def __init__(self) -> None:
        self._samples = 0
        self._since = time.perf_counter()

    def add(self, samples: int) -> None:
        """Count samples, of all ranks."""
        self._samples += samples

    def take(self) -> float:
        """Return the samples per second since the last call."""
        now = time.perf_counter()
        pace = self._samples / (now - self._since)
        self._samples = 0
        self._since = now
        return pace

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


@dataclass(kw_only=True)
class _Loop:
    """What the steps of a run share. Every rank has one, and calls each method when the others do."""

    engine: Any
    batches: Iterator[dict]
    valid: Iterable[dict] | None
    config: TrainConfig
    run: RunFolder
    world: World
    state: RunState
    known: BrokenSamples
    metrics: Mapping[str, Metric]
    questions: SampleQuestions | None
    lower_is_better: bool
    observers: Observers
    signals: StopSignals
    writer: BackgroundWriter
    first_step: int
    """Steps that were done before this start."""
    saved: int | None
    """The step of the newest save, which holds the state that the next step begins from or an earlier one; None before
    the first.
    """
    pace: _Pace = field(default_factory=_Pace)

    @property
    def step_samples(self) -> int:
        """The samples of a step, over all ranks."""
        return samples_per_step(self.config.schedule, self.world.data_parallel_size)

    def validate_if_owed(self) -> None:
        """Validate where the run was stopped without time for it, and save where the loss is the lowest."""
        if self.state.owes_validation and self.valid is not None:
            self.state.owes_validation = False
            is_best = self._validate(self.valid)
            if is_best or ends_early(self.config.saving, self.state):
                self._start_saving()

    def step(self, number: int) -> None:
        """Take step `number`, counted from 0, and do what is due after it. Raises the errors of `train`."""
        rate = self._set_rate(number)
        self.observers.on_phase("data", step=number + 1)
        micro_batches = self._next_micro_batches()
        self.observers.on_phase("reduce")
        broken = self.known.new_in(micro_batches)
        result = self._train_step(
            micro_batches, signals=self.signals.counts, counts=[len(broken), self.writer.has_failed]
        )
        self.state.step = number + 1
        self.observers.on_phase("save")
        failures, failed_saves = result.counts
        if failed_saves:
            finish_saving(self.writer)
        self._check_broken(broken if failures else None)
        if result.nonfinite is None:
            self.state.good_step = self.saved
        else:
            self._skip(result.nonfinite)
        self.pace.add(self.step_samples)
        self.observers.on_step(self._report(result, rate))
        with self.pace.paused():
            self._validate_and_save(result.stop)

    @property
    def _is_last(self) -> bool:
        return self.state.step == self.config.schedule.steps

    def _is_due(self, interval: int) -> bool:
        """Return whether the steps done are a multiple of the interval; an interval of 0 is never due."""
        return interval > 0 and self.state.step % interval == 0

    def _set_rate(self, number: int) -> float:
        """Give the optimizer the learning rate of step `number`, and return it."""
        schedule = self.config.schedule
        rate = self.config.optimizer.lr * schedule.factor(number, schedule.steps)
        set_learning_rate(self.engine.optimizer.param_groups, rate)
        return rate

    def _next_micro_batches(self) -> list[dict]:
        """Return this rank's micro-batches of the next step."""
        return list(itertools.islice(self.batches, self.config.schedule.gradient_accumulation_steps))

    def _train_step(self, micro_batches: list[dict], **more) -> StepResult:
        """Return the result of a step on these micro-batches. more: further arguments of `train_step`."""
        return train_step(
            self.engine,
            micro_batches,
            self.world,
            _answer_tokens(micro_batches, self.world),
            checks_gradients=not self.config.precision.fp16,  # there DeepSpeed's loss scaling does
            observers=self.observers,
            **more,
        )

    def _check_broken(self, own: list[tuple[str, str, str]] | None) -> None:
        """Raise DataError where too many samples are broken. own: samples that this rank has newly met; None: no rank
        has met any.
        """
        if own is not None:
            broken = gather_lists(own)
            self.known.add(broken)
            self.observers.on_broken(broken, self.state.step)
        is_whole_run = self._is_last and self.first_step == 0
        self.known.check((self.state.step - self.first_step) * self.step_samples, is_last=is_whole_run)

    def _skip(self, nonfinite: str) -> None:
        """Count a step that moved nothing. Raises TrainingError where there were too many."""
        self.state.skipped += 1
        if self.state.skipped <= self.config.optimizer.skip_nonfinite:
            return
        finish_saving(self.writer)
        with discard_step(self.engine):
            again = self._train_step(self._next_micro_batches())
        is_blown_up = again.nonfinite is not None
        raise TrainingError(_end_of(nonfinite, self.run, self.world, self.state, self.saved, is_blown_up))

    def _report(self, result: StepResult, rate: float) -> StepReport:
        """Return the report of a step, with figures where it is logged."""
        figures = None
        if self._is_last or self._is_due(self.config.saving.log_interval):
            norm = self.engine.get_global_grad_norm()
            figures = Figures(
                grad_norm=None if norm is None or result.loss is None else float(norm),
                samples_per_second=self.pace.take(),
                peak_memory_mib=peak_memory_mib(),
            )
        return StepReport(step=self.state.step, loss=result.loss, lr=rate, skipped=result.nonfinite, figures=figures)

    def _validate_and_save(self, stop: signal.Signals | None) -> None:
        """Validate and save where that is due after a step. Raises Stopped where some rank has received a signal."""
        state = self.state
        saving = self.config.saving
        validates = self.valid is not None and (self._is_last or self._is_due(saving.eval_interval))
        state.owes_validation = validates and stop is not None  # who takes the machine may not wait for it
        is_best = False
        if self.valid is not None and validates and not state.owes_validation:
            is_best = self._validate(self.valid)
        ends = self._is_last or ends_early(self.config.saving, state)
        if ends or is_best or stop is not None or self._is_due(saving.save_interval):
            self.observers.on_phase("write")
            self._start_saving()
            self.saved = state.step
        if stop is not None:
            finish_saving(self.writer)
            raise Stopped(stop, state.step)

    def _start_saving(self) -> None:
        """Begin a save, see `start_saving`."""
        start_saving(
            self.engine,
            self.run,
            self.world,
            self.state,
            self.writer,
            self.observers,
            step_samples=self.step_samples,
            keep=self.config.saving.keep,
        )

    def _validate(self, valid: Iterable[dict]) -> bool:
        """Measure the validation loss, and return whether what --metric names is the best so far. What is not finite
        never is.
        """
        state = self.state
        observers = self.observers
        observers.on_phase("write")
        finish_saving(self.writer)  # its data workers are forked, which a thread at work may not outlive well
        observers.on_phase("evaluate")
        measured: dict[str, float] = {}
        loss, broken = validation_loss(self.engine, valid, self.world, self.metrics, observers, measured)
        observers.on_broken(broken, state.step)
        answers = None
        if self.questions is not None:
            answers = self.questions.ask(self.engine.module, observers)
            measured.update(answers.measured)
        judged_by = self.config.saving.metric
        if judged_by not in (LOSS, *self.metrics):
            judged_by = settled_name(judged_by)
        value = loss if judged_by == LOSS else measured.get(judged_by)
        is_best = self._is_best(value)
        if is_best:
            state.best_loss = value if judged_by == LOSS else None
            state.best_value = None if judged_by == LOSS else value
            state.best_step = state.step
        state.not_better = 0 if is_best else state.not_better + 1
        report = ValidationReport(
            step=state.step, loss=loss, metrics=measured, judged_by=judged_by, is_best=is_best, answers=answers
        )
        observers.on_validation(report)
        return is_best

    def _is_best(self, value: float | None) -> bool:
        """Return whether no validation before had such a value of what --metric names."""
        before = self.state.best_loss if self.config.saving.metric == LOSS else self.state.best_value
        if value is None or not math.isfinite(value):
            return False
        return before is None or (value < before if self.lower_is_better else value > before)


def validation_loss(
    engine,
    batches: Iterable[dict],
    world: World,
    metrics: Mapping[str, Metric],
    observers: Observers,
    measured: dict[str, float],
) -> tuple[float | None, list[tuple[str, str, str]]]:
    """Return (the loss of `validate`, its broken samples), and put what its metrics measured into `measured`.

    It has a name of its own for people's drivers, which wrap the loss of a validation here.
    """
    validation = validate(engine, batches, world, metrics, observers)
    measured.update(validation.metrics)
    return validation.loss, validation.broken


def _answer_tokens(micro_batches: Sequence[dict], world: World) -> torch.Tensor:
    """Return how many answer tokens a step has over all ranks, float64 on the device. Every rank has to call it."""
    (tokens,) = sum_on_device(sum(count_answer_tokens(batch["labels"]) for batch in micro_batches), device=world.device)
    return tokens


def _end_of(nonfinite: str, run: RunFolder, world: World, state: RunState, saved: int | None, is_blown_up: bool) -> str:
    """Return the message at the end of a run whose steps are not finite. Every rank has to call it.

    saved: the step of the newest save. is_blown_up: whether the next batch fails as well. Where no step since that save
    was finite, the save is then blown up too, and the pointers go back to the one before it.
    """
    text = f"step {state.step}: {nonfinite}; nothing was changed by this step"
    if saved is None:
        return f"{text}, and nothing is saved yet: start again with --overwrite and a lower --lr"
    text += f", and {run.adapters} holds the last adapters that were saved. "
    go_on = f"--resume {run.path} and a lower --lr, or with --skip-nonfinite {state.skipped} to leave out such steps"
    good_step = state.good_step
    if not is_blown_up or saved == good_step:
        return f"{text}Go on from the last checkpoint with {go_on}"
    if good_step is None:
        return (
            f"{text}But that of step {saved} is blown up, and there is none before it: start again with a lower --lr "
            f"(--skip-nonfinite {state.skipped} would leave out one step more, and change nothing)"
        )
    run_on_all_ranks(lambda: run.go_back_to(good_step) if world.is_main else None)
    return (
        f"{text}But that of step {saved} is blown up; adapter/latest and checkpoints/latest name step "
        f"{good_step} again, the last that was well. Go on from there with {go_on}"
    )

"""The training loop over a DeepSpeed engine."""

import itertools
import math
import time
from collections.abc import Iterable

import torch

from sat_lora.errors import TrainingError
from sat_lora.lora.optimizer_groups import set_learning_rate
from sat_lora.parallel.distributed import World, gather_lists, together
from sat_lora.parallel.stop_signals import Stopped, StopSignals
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.runs.step_progress import peak_memory_mib
from sat_lora.training.saving import BackgroundWriter, finish_saving, start_saving
from sat_lora.training.settings.config import TrainConfig
from sat_lora.training.steps.broken_samples import BrokenSamples
from sat_lora.training.steps.checkpoint import RunState
from sat_lora.training.steps.loss import count_answer_tokens, sum_on_device
from sat_lora.training.steps.nonfinite import held
from sat_lora.training.steps.step import train_step, validation_loss
from sat_lora.watchdog.trace import NO_TRACE, NoTrace


def train(
    engine,
    loader: Iterable[dict],
    valid: Iterable[dict] | None,
    options: TrainConfig,
    run: RunFolder,
    world: World,
    state: RunState,
    *,
    dataset_size: int,
    trace: NoTrace = NO_TRACE,
) -> None:
    """From step `state.step` to `options.schedule.steps`; evaluates, saves and reports on the way and at the end.

    Saves are written beside the steps that follow, one at a time; all are on the disk when it returns or is stopped.

    loader: micro-batches of this rank without end, from where `state` left off. valid: a pass over the validation
    batches of this rank, as many on every rank; None if there are none.
    dataset_size: training samples in an epoch. trace: is told of steps and phases.
    DataError, on every rank at the same step: too many samples are broken.
    Stopped, on every rank: one of them received SIGTERM or SIGINT; the step was finished and everything saved.
    AdapterError or CheckpointError, on every rank: a save could not be written; at the next step or save, or the end.
    TrainingError, on every rank: more than --skip-nonfinite steps were not finite; none of them moved anything.
    """
    total, accumulate = options.schedule.steps, options.schedule.gradient_accumulation_steps
    batches, known = iter(loader), BrokenSamples(dataset_size, options.data.max_broken_share)
    step_samples = options.schedule.batch_size * accumulate * world.data_parallel_size
    samples, steps_before, clock = 0, state.step, time.perf_counter()
    saved = state.step or None  # the newest save, which holds the state that this step begins from or an earlier one
    engine.train()
    with StopSignals() as signals, BackgroundWriter() as writer:
        if state.owes_validation and valid is not None:
            state.owes_validation = False
            if _validate(engine, valid, run, world, state, writer, trace):
                start_saving(engine, options, run, world, state, writer)
        for step in range(state.step, total):
            rate = options.optimizer.lr * options.schedule.factor(step, total)
            set_learning_rate(engine.optimizer.param_groups, rate)
            trace.at("data", step=step + 1)
            micro_batches = list(itertools.islice(batches, accumulate))
            trace.at("reduce")
            broken = known.new_in(micro_batches)
            tokens = _answer_tokens(micro_batches, world)
            result = train_step(
                engine,
                micro_batches,
                world,
                tokens,
                checks_gradients=not options.precision.fp16,  # there DeepSpeed's loss scaling does
                signals=signals.counts,
                counts=[len(broken), writer.has_failed],
                trace=trace,
            )
            state.step = step + 1
            trace.at("save")
            failures, failed_saves = result.counts
            if failed_saves:
                finish_saving(writer)
            if failures:
                known.add(broken := gather_lists(broken))
                run.report_broken(broken, state.step)
            known.check((state.step - steps_before) * step_samples)
            if result.nonfinite is not None:
                state.skipped += 1
                if state.skipped > options.optimizer.skip_nonfinite:
                    finish_saving(writer)
                    following = list(itertools.islice(batches, accumulate))
                    with held(engine):
                        again = train_step(
                            engine,
                            following,
                            world,
                            _answer_tokens(following, world),
                            checks_gradients=not options.precision.fp16,
                            trace=trace,
                        )
                    is_blown_up = again.nonfinite is not None
                    raise TrainingError(_end_of(result.nonfinite, run, world, state, saved, is_blown_up))
                run.log_skipped(state.step, result.nonfinite)
            else:
                state.good_step = saved
            if result.loss is None:
                run.say(f"step {state.step}: no loss, none of its samples can be used")
            samples += step_samples
            last = state.step == total
            if last or state.step % options.saving.log_interval == 0:
                norm = engine.get_global_grad_norm()
                run.log_step(
                    state.step,
                    loss=result.loss,
                    lr=rate,
                    grad_norm=None if norm is None or result.loss is None else float(norm),
                    samples_per_second=samples / (time.perf_counter() - clock),
                    peak_memory_mib=peak_memory_mib(),
                )
                samples, clock = 0, time.perf_counter()
            else:
                run.advance(state.step, loss=result.loss, lr=rate)
            paused = time.perf_counter()
            validates = valid is not None and (last or _due(state.step, options.saving.eval_interval))
            state.owes_validation = validates and result.stop is not None  # who takes the machine may not wait for it
            is_best = False
            if valid is not None and validates and not state.owes_validation:
                is_best = _validate(engine, valid, run, world, state, writer, trace)
            if last or is_best or result.stop is not None or _due(state.step, options.saving.save_interval):
                trace.at("write")
                start_saving(engine, options, run, world, state, writer)
                saved = state.step
            if result.stop is not None:
                finish_saving(writer)
                raise Stopped(result.stop, state.step)
            clock += time.perf_counter() - paused
        trace.at("write")
        finish_saving(writer)


def _validate(
    engine,
    valid: Iterable[dict],
    run: RunFolder,
    world: World,
    state: RunState,
    writer: BackgroundWriter,
    trace: NoTrace,
) -> bool:
    """Log the validation loss, and what could not be read; whether it is the lowest so far.

    One that is not finite never is.
    """
    trace.at("write")
    finish_saving(writer)  # the data workers of a validation are forked, which a thread at work may not outlive well
    trace.at("evaluate")
    loss, broken = validation_loss(engine, valid, world, trace)
    run.report_broken(broken, state.step)
    if loss is None:
        run.say(f"step {state.step}: no validation loss, none of the validation samples has an answer")
        return False
    run.log_validation(state.step, loss)
    is_best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
    if is_best:
        state.best_loss, state.best_step = loss, state.step
    return is_best


def _answer_tokens(micro_batches: list[dict], world: World) -> torch.Tensor:
    """Those of a step, over all ranks, on the device; every rank has to call it."""
    (tokens,) = sum_on_device(sum(count_answer_tokens(batch["labels"]) for batch in micro_batches), device=world.device)
    return tokens


def _end_of(nonfinite: str, run: RunFolder, world: World, state: RunState, saved: int | None, is_blown_up: bool) -> str:
    """What is said at the end of a run whose steps are not finite. Every rank has to call it.

    saved: the newest save. is_blown_up: whether the next batch fails as well. Where no step since that save was finite,
    it is then blown up too, and the pointers go back to the one before it.
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
    together(lambda: run.go_back_to(good_step) if world.is_main else None)
    return (
        f"{text}But that of step {saved} is blown up; adapter/latest and checkpoints/latest name step "
        f"{good_step} again, the last that was well. Go on from there with {go_on}"
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

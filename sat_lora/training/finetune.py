"""One fine-tuning run, from its config to the saved adapter."""

from dataclasses import replace
from functools import partial

import torch

from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.data.answer_lengths import CutAnswers
from sat_lora.data.batches.sources import FIRST_OF_SHARDS, Source
from sat_lora.data.overview.examine import evenly
from sat_lora.errors import ConfigError
from sat_lora.files.step_folders import BEST, read_pointer, steps_in
from sat_lora.lora.summary import describe, describe_text
from sat_lora.parallel.distributed import World, init_distributed, run_on_all_ranks
from sat_lora.printable import printable
from sat_lora.terminal.notice import logger, warn
from sat_lora.training.answers.samples import SampleQuestions
from sat_lora.training.evaluation import answer_test_data, evaluation_table, write_evaluation
from sat_lora.training.loop import ends_early, train
from sat_lora.training.marks import marks_of_options
from sat_lora.training.metrics.generated import DEFAULT_METRICS, load_metric, settled_name
from sat_lora.training.metrics.registry import LOSS, METRICS, metrics_named
from sat_lora.training.prepare import (
    PreparedRun,
    Run,
    Sources,
    build_run,
    dataset_maker,
    on_first_rank,
    open_data,
    prepare,
)
from sat_lora.training.resume import base_of_state, check_data, facts_of_run, notes, state_to_resume
from sat_lora.training.run_summary import check_vocabulary, look_at, more_to_say, run_summary
from sat_lora.training.runs.card_sections import add_evaluation
from sat_lora.training.runs.results import EVALUATION, results_problems
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.runs.run_lock import RunLock
from sat_lora.training.runs.space import check_space, size_of
from sat_lora.training.runs.traced import traced
from sat_lora.training.same_base import base_of_run
from sat_lora.training.settings.config import NONE, Checks, Saving, Schedule, Start, TrainConfig
from sat_lora.training.settings.deepspeed_config import decisions
from sat_lora.training.settings.demo import Demo
from sat_lora.training.settings.schedule import schedule_problems, total_steps
from sat_lora.training.steps.checkpoint import RunState, load_checkpoint, newest_checkpoint, read_state
from sat_lora.training.steps.observers import Observers
from sat_lora.training.steps.release import end_training, free_memory
from sat_lora.watchdog.rank_files import clear
from sat_lora.watchdog.replay import LIMIT, steps_to_replay
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.watchdog import watched_alone, watched_trace


def finetune(config: TrainConfig, demo: Demo | None = None) -> PreparedRun:
    """Check, load, train and evaluate; return the prepared run, with the number of steps. Every rank has to call it.

    The demo's data are made first, on rank 0 alone, where they are not there yet. The run folder is locked meanwhile,
    and one that holds results is refused. Raises a SatLoraError on every rank for a user's mistake, before
    the weights are read, and the errors of `train`.
    """
    init_distributed(config.parallel.distributed_backend, marks_of_options(config))
    doing, option = ("resuming", "--resume") if config.start.resume else ("training", "--save")
    instead = "go on with another run" if config.start.resume else "give another --save or --experiment-name"
    with RunLock(config.run_folder, doing=doing, option=option, instead=instead) as lock:
        return _finetune(config, demo, lock)


def _finetune(config: TrainConfig, demo: Demo | None, lock: RunLock) -> PreparedRun:
    """Do what `finetune` says, with the run folder locked and a watchdog beside it, and return the finished run."""
    limit = LIMIT if config.start.replay else config.checks.watchdog_limit
    with watched_alone(limit) as trace:
        Observers(traced(trace)).on_phase("check")
        prepared, run, data = _check(config, demo, lock)
    world = prepared.world
    # What is wrong with a start is known by now: only one that is right replaces what the watchdog has of another.
    trace = _trace(config.checks, run, world)
    with watched_trace(trace, limit):
        _train_and_evaluate(prepared, run, trace, data)
    return prepared


def _check(config: TrainConfig, demo: Demo | None, lock: RunLock) -> tuple[PreparedRun, RunFolder, Sources]:
    """Look at config, disk, data and base, and say what will be trained: all that comes before the weights are read.

    Return the prepared run, the run's folder and the data.
    """
    problems = results_problems(config, say=partial(print, flush=True)) if torch.distributed.get_rank() == 0 else []
    prepared = prepare(config, demo, problems=problems)
    world = prepared.world
    wandb = NONE if config.start.replay else config.saving.wandb
    run = RunFolder(config.run_folder, is_writer=world.is_main, lock=lock, wandb=wandb)
    for line in run_on_all_ranks(decisions, prepared.config, world.device.type):
        run.say(line)
    freed = size_of(run.path) if config.start.overwrite else 0
    run_on_all_ranks(lambda: check_space(prepared.config, freed=freed) if world.is_main else None)
    prepared, data = _with_data(prepared, run, demo)
    return prepared, run, data


def _with_data(prepared: PreparedRun, run: RunFolder, demo: Demo | None) -> tuple[PreparedRun, Sources]:
    """Return (the prepared run with the number of steps, the data), after data and base were checked and what trains
    was said.

    Every rank has to call it.
    """
    config = prepared.config
    world = prepared.world
    stored = run_on_all_ranks(state_to_resume, config.start.resume) if config.start.resume else None
    data = open_data(prepared)
    steps = total_steps(
        train_iters=config.schedule.train_iters,
        epochs=config.schedule.epochs,
        samples=data.training.epoch_samples,
        batch_size=config.schedule.batch_size,
        gradient_accumulation_steps=config.schedule.gradient_accumulation_steps,
        data_parallel_size=world.data_parallel_size,
    )
    config = config.replaced(train_iters=steps)
    prepared = replace(prepared, config=config)
    validation = data.validation
    if not config.start.replay:
        check_validation(config, validation)
    run.facts = facts_of_run(config, data.training.description(), validation.description() if validation else None)
    run.facts["files"] = data.training.files()
    if stored is not None:
        run_on_all_ranks(check_data, config.start, stored, run.facts["data"])
        for note in notes(config, stored, run.facts["valid_data"], run.facts["files"]):
            run.say(note)
    base = base_of_run(config, None if stored is None else base_of_state(stored))
    if not config.start.replay:
        start_step = 0 if stored is None else stored["step"]
        run_on_all_ranks(_say_what_trains, prepared, run, data, start_step, base.digest, demo)
    return prepared, data


def _train_and_evaluate(prepared: PreparedRun, run: RunFolder, trace: Trace | None, data: Sources) -> None:
    """Load the base, take all steps, and evaluate where there are test data. Every rank has to call it."""
    config = prepared.config
    world = prepared.world
    validation = data.validation
    observers = Observers([*traced(trace), *run.observers], run.say)
    observers.on_phase("load")
    if run.lock is not None:
        run.lock.share()
    built = build_run(prepared, layers=config.start.shrink if config.start.replay else None)
    run.say(describe_text(built.model))
    if trace is not None:
        trace.attach(built.model)
    built.start_engine()
    if trace is not None:
        trace.follow(built.engine)
    torch.manual_seed(config.schedule.seed + world.data_parallel_rank)  # dropout; the same on ranks of one sample
    if config.start.replay:
        first, last = steps_to_replay(config.start.replay)
        config = config.replaced(train_iters=last, test_data=None)
        built.state = RunState(step=first - 1)
        validation = None
    else:
        built.state = run_on_all_ranks(_state, built.engine, config.start, config.schedule.steps, run, world)
    run_on_all_ranks(
        _begin,
        config,
        run,
        built.state,
        world=dict(
            ranks=world.size,
            data_parallel_size=world.data_parallel_size,
            model_parallel_size=config.parallel.model_parallel_size,
            device=world.device.type,
        ),
        trainable=describe(built.model)[-1]["trainable"],
        deepspeed=built.engine.config,
    )
    _train(built, config, run, data.training, validation, observers)
    sizes = built.sizes
    model = end_training(built.engine)
    del built
    free_memory()
    if config.data.test_data:
        _evaluate(config, world, run, None if model is None else (model, sizes), observers)


def _train(
    built: Run,
    config: TrainConfig,
    run: RunFolder,
    training: Source,
    validation: Source | None,
    observers: Observers,
) -> None:
    """Take all steps, from where `built.state` left off."""
    loader = training.training(built.state.step * config.schedule.gradient_accumulation_steps)
    valid = validation.validation() if validation else None
    streams = []
    if training.is_stream:
        streams.append(loader := CutAnswers(loader, run.say, config.model.max_length))
    if valid is not None and validation is not None and validation.is_stream:
        streams.append(valid := CutAnswers(valid, run.say, config.model.max_length, "validation: "))
    saving = config.saving
    own = {saving.metric} & METRICS.keys()
    questions = None if validation is None else _questions(built, config, validation)
    judge = None if saving.metric in (LOSS, *METRICS) or questions is None else load_metric(saving.metric)
    with observers:
        train(
            built.engine,
            loader,
            valid,
            config,
            run,
            built.prepared.world,
            built.state,
            dataset_size=training.samples,
            metrics=metrics_named(dict.fromkeys([*saving.valid_metrics, *own])),
            questions=questions,
            lower_is_better=saving.metric == LOSS if judge is None else judge.lower_is_better,
            observers=observers,
        )
        for stream in streams:
            stream.say_all()
        observers.on_phase("load")  # the last save's limit is not meant for what comes now
    if ends_early(config.saving, built.state) and built.state.step < config.schedule.steps:
        run.say(_early_end(config.schedule, config.saving, built.state))


def check_validation(config: TrainConfig, validation: Source | None) -> None:
    """Raise ConfigError where options ask for more than the validation data can give. Every rank finds the same."""
    saving = config.saving
    wanted = saving.eval_samples or 0
    if validation is None:
        asked = [wanted > 0, saving.metric != LOSS, saving.early_stopping > 0]
        options = ("--eval-samples", "--metric", "--early-stopping")
        named = [option for option, is_asked in zip(options, asked) if is_asked]
        if named:
            split = ",".join(f"{share:g}" for share in config.data.split)
            raise ConfigError(f"{named[0]}: too few samples for validation data by --split {split}; give --valid-data")
        return
    most = min(validation.samples, FIRST_OF_SHARDS) if validation.is_stream else validation.samples
    if wanted > most:
        of_what = "can be answered of tar shards" if most < validation.samples else "are in the validation data"
        raise ConfigError(f"--eval-samples: got {wanted:,}, but {most:,} samples {of_what}; give at most as many")


def _questions(built: Run, config: TrainConfig, validation: Source) -> SampleQuestions | None:
    """Return what is answered at each validation; None without --eval-samples."""
    saving = config.saving
    count = saving.eval_samples
    if count is None:
        return None
    items = [*validation.first_items(count if validation.is_stream else validation.samples)]
    names = [*(saving.metrics or DEFAULT_METRICS)]
    if saving.metric not in (LOSS, *METRICS):
        names.append(saving.metric)
    return SampleQuestions(
        dataset_maker(config.model, config.data, built.sizes, with_answer=False)(evenly(items, count)),
        built.prepared.world,
        {settled_name(name): load_metric(name) for name in names},
        batch_size=saving.eval_batch_size or config.schedule.batch_size,
        is_partitioned=built.is_partitioned,
    )


def _early_end(schedule: Schedule, saving: Saving, state: RunState) -> str:
    """Return a sentence on the end of a run that --early-stopping ended."""
    name = "validation loss" if saving.metric == LOSS else printable(saving.metric)
    best = state.best_loss if saving.metric == LOSS else state.best_value
    shown = "" if best is None else f": {best:.4f} at step {state.best_step} was the best"
    return (
        f"ended early at step {state.step} of {schedule.steps}, after {state.not_better} validations without a "
        f"better {name}{shown}; to go on, --resume with --early-stopping 0 or a larger one"
    )


def _say_what_trains(
    prepared: PreparedRun, run: RunFolder, data: Sources, start_step: int, base: str, demo: Demo | None
) -> None:
    """Say on rank 0 what will be trained, on what. Raises ConfigError where the tokenizer's tokens are not
    the base's.
    """
    config = prepared.config
    world = prepared.world
    vocabulary = data.sizes["vocab_size"]
    if not world.is_main:
        return
    texts = look_at(data.training, vocabulary)
    check_vocabulary(texts, config.model.tokenizer, vocabulary)
    steps = config.schedule.steps
    summary = run_summary(
        config,
        world,
        data.sizes,
        texts,
        data=data.training,
        valid=data.validation,
        steps=steps,
        start_step=start_step,
        fingerprint=base,
        demo=demo,
    )
    run.say(summary)
    for note in more_to_say(config.model.max_length, data.training, data.validation):
        warn(note)
    for problem in schedule_problems(config.schedule, config.optimizer.lr, steps):
        warn(problem)


def _state(engine, start: Start, steps: int, run: RunFolder, world: World) -> RunState:
    """Return how far the run is at its start: at step 0, or at the checkpoint, whose values the engine then has.

    steps: those of the whole run. Every rank has to call it. Raises CheckpointError where the checkpoint cannot be
    used.
    """
    if not start.resume:
        return RunState()
    state = load_checkpoint(engine, run.checkpoints, world)
    if state.best_step is None and state.best_loss is not None:  # of a version that kept it in the pointer alone
        state.best_step = read_pointer(run.adapters / BEST)
    stored = read_state(newest_checkpoint(run.checkpoints))["run"].get("valid_data", run.facts["valid_data"])
    own = [step for step in steps_in(run.adapters) if step <= state.step]
    is_other = stored != run.facts["valid_data"]
    if is_other or (state.best_step is not None and state.best_step not in own):
        state.not_better = 0
    if state.best_step not in own or is_other:
        # There is nothing to be compared with.
        state.best_loss = None
        state.best_value = None
        state.best_step = None
    if state.step >= steps:
        run.say(
            f"the run is already at step {state.step} of {steps}; to go on, give a --train-iters above {state.step}, "
            "or more --epochs"
        )
    return state


def _begin(config: TrainConfig, run: RunFolder, state: RunState, **settings) -> None:
    """Make the run folder this run's. Raises ConfigError where nothing can be written. settings: of
    `write_settings`.
    """
    try:
        if config.start.resume:
            run.set_back(state.step, state.best_step)
        else:
            run.remove_results()
        run.write_settings(config, **settings)
    except OSError as error:
        advice = "make room, or give another folder"
        raise ConfigError(f"--save: {run.path}: cannot be written: {error}; {advice}") from error


def _trace(checks: Checks, run: RunFolder, world: World) -> Trace | None:
    """Return this rank's trace, None without a watchdog; files of an earlier start are removed. Every rank has to call
    it.
    """
    on_first_rank(lambda: clear(run.path))
    if checks.watchdog_limit == 0:
        return None
    try:
        return Trace(run.path, torch.nn.Module(), rank=world.rank, world_size=world.size)
    except OSError as error:
        logger.warning("rank %d runs without the watchdog: its files cannot be made: %s", world.rank, error)
        return None


def _evaluate(
    config: TrainConfig, world: World, run: RunFolder, trained: tuple[CogVLMModel, dict] | None, observers: Observers
) -> None:
    """Evaluate the adapter, write the result and show it. Every rank has to call it.

    trained: the model that has trained, with its model_config.json; None where no rank has it whole, and it is loaded
    anew. There is never a second one in memory.
    """
    folder = config.run_folder
    measured = run_on_all_ranks(
        answer_test_data, config, run.adapters, world, trained, observers=observers, run_folder=folder
    )
    run_on_all_ranks(
        lambda: write_evaluation(run.path / EVALUATION, measured, config, run.adapters) if world.is_main else None
    )
    if world.is_main:
        add_evaluation(run.adapters, measured.result)
    run.say(evaluation_table(measured.result))

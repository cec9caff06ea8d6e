"""One fine-tuning run, from options to the saved adapter."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch

from sat_lora.cogvlm.checkpoints.load import read_config
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.data.answer_lengths import CutAnswers
from sat_lora.data.batches.sources import Source, marks_of_sources, open_sources
from sat_lora.errors import ConfigError
from sat_lora.files.step_folders import BEST, read_pointer, steps_in
from sat_lora.lora.apply import add_lora
from sat_lora.lora.summary import describe, describe_text
from sat_lora.parallel.distributed import World, agree, init_distributed, run_on_all_ranks
from sat_lora.terminal.notice import logger, warn
from sat_lora.training.evaluation import evaluate_adapter, evaluation_table, write_evaluation
from sat_lora.training.loop import train
from sat_lora.training.marks import marks_of_config, marks_of_options
from sat_lora.training.metrics.registry import metrics_named
from sat_lora.training.prepare import Setting, dataset_maker, load_base, model_seed, on_first_rank, prepare
from sat_lora.training.resume import base_of_state, check_data, facts_of_run, notes, state_to_resume
from sat_lora.training.run_summary import check_vocabulary, look_at, more_to_say, run_summary
from sat_lora.training.runs.results import EVALUATION, results_problems
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.runs.run_lock import RunLock
from sat_lora.training.runs.space import check_space, size_of
from sat_lora.training.runs.traced import traced
from sat_lora.training.same_base import base_of_run
from sat_lora.training.settings.deepspeed_config import decisions
from sat_lora.training.settings.schedule import rates, schedule_problems, total_steps
from sat_lora.training.steps.checkpoint import RunState, load_checkpoint, newest_checkpoint, read_state
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.observers import Observers
from sat_lora.training.steps.optimizer_state import create_moments
from sat_lora.training.steps.release import end_training, free_memory
from sat_lora.watchdog.rank_files import clear
from sat_lora.watchdog.replay import LIMIT, steps_to_replay
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.watchdog import watched, watched_alone

Sources = tuple[Source, Source | None]


def finetune(options: Namespace, make_data: Callable[[], None] | None = None) -> World:
    """Check, load, train, evaluate. `make_data` runs first, on rank 0 alone, for data that is not there yet.

    The run folder is locked meanwhile, and one that holds results is refused. Raises a SatLoraError on every rank for a
    user's mistake, before the weights are read; TrainingError and Stopped from `train`.
    """
    init_distributed(options.distributed_backend, marks_of_options(options))
    doing, option = ("resuming", "--resume") if options.resume else ("training", "--save")
    instead = "go on with another run" if options.resume else "give another --save or --experiment-name"
    with RunLock(options.run_folder, doing=doing, option=option, instead=instead) as lock:
        return _finetune(options, make_data, lock)


def _finetune(options: Namespace, make_data: Callable[[], None] | None, lock: RunLock) -> World:
    limit = LIMIT if options.replay else options.watchdog_limit
    with watched_alone(limit) as trace:
        Observers(traced(trace)).on_phase("check")
        setting, run, sources = _check(options, make_data, lock)
    world = setting.world
    # What is wrong with a start is known by now: only one that is right replaces what the watchdog has of another.
    trace = _trace(options, run, world)
    with watched(trace, limit):
        _train_and_evaluate(options, setting, run, trace, sources)
    return world


def _check(
    options: Namespace, make_data: Callable[[], None] | None, lock: RunLock
) -> tuple[Setting, RunFolder, Sources]:
    """Everything before the weights are read: options, disk, data and base are looked at, and it is said what will be
    trained.
    """
    problems = results_problems(options, say=partial(print, flush=True)) if torch.distributed.get_rank() == 0 else []
    setting = prepare(options, make_data, problems=problems)
    world = setting.world
    run = RunFolder(options.run_folder, is_writer=world.is_main, lock=lock)
    for line in run_on_all_ranks(decisions, options, world.device.type):
        run.say(line)
    freed = size_of(run.path) if options.overwrite else 0
    run_on_all_ranks(lambda: check_space(options, setting.lora, freed=freed) if world.is_main else None)
    return setting, run, _open_sources(options, world, run)


def _open_sources(options: Namespace, world: World, run: RunFolder) -> Sources:
    """Training and validation data, None without. They and the base are checked, and what will be trained is said.

    Every rank has to call it.
    """
    stored = run_on_all_ranks(state_to_resume, options.resume) if options.resume else None
    config = read_config(options.from_pretrained)
    data, valid_data = open_sources(options, world, dataset_maker(options, config))
    agree({**marks_of_sources(data, valid_data), **marks_of_config(config)})
    options.train_iters = total_steps(
        train_iters=options.train_iters,
        epochs=options.epochs,
        samples=data.epoch_samples,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        data_parallel_size=world.data_parallel_size,
    )
    run.facts = facts_of_run(options, data.description(), None if valid_data is None else valid_data.description())
    run.facts["files"] = data.files()
    if stored is not None:
        run_on_all_ranks(check_data, options, stored, run.facts["data"])
        for note in notes(options, stored, run.facts["valid_data"], run.facts["files"]):
            run.say(note)
    base = base_of_run(options, None if stored is None else base_of_state(stored))
    if not options.replay:
        start_step = 0 if stored is None else stored["step"]
        run_on_all_ranks(_say_what_trains, options, run, world, config, data, valid_data, start_step, base.digest)
    return data, valid_data


def _train_and_evaluate(
    options: Namespace, setting: Setting, run: RunFolder, trace: Trace | None, sources: Sources
) -> None:
    world, (data, valid_data) = setting.world, sources
    observers = Observers([*traced(trace), *run.observers], run.say)
    observers.on_phase("load")
    if run.lock is not None:
        run.lock.share()
    model: CogVLMModel | None
    model, config = load_base(options, setting, layers=options.shrink if options.replay else None)
    add_lora(model, setting.lora)
    run.say(describe_text(model))
    optimizer = adapter_optimizer(
        model, lr=options.lr, weight_decay=options.weight_decay, betas=tuple(options.betas), eps=options.eps
    )
    if trace is not None:
        trace.attach(model)
    engine = start_engine(model, optimizer, setting.engine, seed=model_seed(options))
    if trace is not None:
        trace.follow(engine)
    create_moments(engine)
    torch.manual_seed(options.seed + world.data_parallel_rank)  # dropout; the same on ranks that share a sample
    if options.replay:
        first, options.train_iters = steps_to_replay(options.replay)
        state, valid_data, options.test_data = RunState(step=first - 1), None, None
    else:
        state = run_on_all_ranks(_state, engine, options, run, world)
    run_on_all_ranks(
        _begin,
        options,
        run,
        state,
        world=dict(
            ranks=world.size,
            data_parallel_size=world.data_parallel_size,
            model_parallel_size=options.model_parallel_size,
            device=world.device.type,
        ),
        trainable=describe(model)[-1]["trainable"],
        deepspeed=engine.config,
    )
    loader = data.training(state.step * options.gradient_accumulation_steps)
    valid = valid_data.validation() if valid_data else None
    streams = []
    if data.is_stream:
        streams.append(loader := CutAnswers(loader, run.say, options.max_length))
    if valid is not None and valid_data is not None and valid_data.is_stream:
        streams.append(valid := CutAnswers(valid, run.say, options.max_length, "validation: "))
    with observers:
        train(
            engine,
            loader,
            valid,
            options,
            run,
            world,
            state,
            dataset_size=data.samples,
            metrics=metrics_named(options.valid_metrics),
            observers=observers,
        )
        for stream in streams:
            stream.say_all()
        observers.on_phase("load")  # the last save's limit is not meant for what comes now
    model = end_training(engine)
    del engine, optimizer
    free_memory()
    if options.test_data:
        _evaluate(options, world, run, None if model is None else (model, config), observers)


def _say_what_trains(
    options: Namespace, run: RunFolder, world: World, config: dict, data, valid, start_step: int, base: str
) -> None:
    """On rank 0; ConfigError: the tokenizer's tokens are not the base's."""
    if not world.is_main:
        return
    texts = look_at(data, config["vocab_size"])
    check_vocabulary(texts, options, config["vocab_size"])
    steps = options.train_iters
    sources = dict(data=data, valid=valid, steps=steps, start_step=start_step, fingerprint=base)
    run.say(run_summary(options, world, config, texts, **sources))
    for note in more_to_say(options, data, valid):
        warn(note)
    for problem in schedule_problems(rates(options, steps), options, steps):
        warn(problem)


def _state(engine, options: Namespace, run: RunFolder, world: World) -> RunState:
    """Where the run begins: at nothing, or at the checkpoint, whose values the engine then has."""
    if not options.resume:
        return RunState()
    state = load_checkpoint(engine, run.checkpoints, world)
    if state.best_step is None and state.best_loss is not None:  # of a version that kept it in the pointer alone
        state.best_step = read_pointer(run.adapters / BEST)
    stored = read_state(newest_checkpoint(run.checkpoints))["run"].get("valid_data", run.facts["valid_data"])
    own = [step for step in steps_in(run.adapters) if step <= state.step]
    if state.best_step not in own or stored != run.facts["valid_data"]:
        state.best_loss = state.best_step = None  # nothing to be compared with
    if state.step >= options.train_iters:
        run.say(
            f"the run is already at step {state.step} of {options.train_iters}; to go on, give a --train-iters above "
            f"{state.step}, or more --epochs"
        )
    return state


def _begin(options: Namespace, run: RunFolder, state: RunState, **settings) -> None:
    """Make the run folder this run's. ConfigError: nothing can be written."""
    try:
        if options.resume:
            run.set_back(state.step, state.best_step)
        else:
            run.remove_results()
        run.write_settings(options, **settings)
    except OSError as error:
        advice = "make room, or give another folder"
        raise ConfigError(f"--save: {run.path}: cannot be written: {error}; {advice}") from error


def _trace(options: Namespace, run: RunFolder, world: World) -> Trace | None:
    """This rank's, None without a watchdog; what an earlier start has left goes. Every rank has to call it."""
    on_first_rank(lambda: clear(run.path))
    if options.watchdog_limit == 0:
        return None
    try:
        return Trace(run.path, torch.nn.Module(), rank=world.rank, world_size=world.size)
    except OSError as error:
        logger.warning("rank %d runs without the watchdog: its files cannot be made: %s", world.rank, error)
        return None


def _evaluate(
    options: Namespace, world: World, run: RunFolder, trained: tuple[CogVLMModel, dict] | None, observers: Observers
) -> None:
    """With the model that has trained, where no rank has to gather it: there is never a second one in memory."""
    result = run_on_all_ranks(evaluate_adapter, options, run.adapters, world, trained, observers=observers)
    run_on_all_ranks(
        lambda: write_evaluation(run.path / EVALUATION, result, options, run.adapters) if world.is_main else None
    )
    run.say(evaluation_table(result))

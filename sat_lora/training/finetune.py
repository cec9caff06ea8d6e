"""One fine-tuning run, from options to the saved adapter."""

from argparse import Namespace
from collections.abc import Callable

import torch

from sat_lora.cogvlm.model import CogVLMModel
from sat_lora.doctor.rank_files import clear
from sat_lora.doctor.replay import LIMIT, steps_to_replay
from sat_lora.doctor.trace import NO_TRACE, NoTrace, Trace
from sat_lora.doctor.watchdog import watched
from sat_lora.placement import add_lora
from sat_lora.summary import describe, describe_text
from sat_lora.training.checkpoint import RunState, load_checkpoint
from sat_lora.training.distributed import World, agree, together
from sat_lora.training.engine import adapter_optimizer, start_engine
from sat_lora.training.evaluation import evaluate_adapter, evaluation_table
from sat_lora.training.loop import train
from sat_lora.training.optimizer_state import create_moments
from sat_lora.training.prepare import Setting, dataset_maker, load_base, model_seed, on_first_rank, prepare
from sat_lora.training.release import end_training, free_memory
from sat_lora.training.run_folder import RunFolder, write_json
from sat_lora.training.schedule import total_steps
from sat_lora.training.sources import open_sources


def finetune(options: Namespace, make_data: Callable[[], None] | None = None) -> World:
    """Check, load, train, evaluate. `make_data` runs first, on rank 0 alone, for data that is not there yet.

    Raises a SatLoraError on every rank for a user's mistake, before the weights are read; TrainingError and Stopped
    from `train`.
    """
    setting = prepare(options, make_data)
    world = setting.world
    run = RunFolder(options.run_folder, is_writer=world.is_main)
    trace = _trace(options, run, world)
    with watched(trace, LIMIT if options.replay else options.watchdog_limit):
        _train_and_evaluate(options, setting, run, trace)
    return world


def _train_and_evaluate(options: Namespace, setting: Setting, run: RunFolder, trace: NoTrace) -> None:
    world = setting.world
    trace.at("load")
    model, config = load_base(options, setting, layers=options.shrink if options.replay else None)
    add_lora(model, setting.lora)
    run.say(describe_text(model))
    data, valid_data = open_sources(options, world, dataset_maker(options, config))
    agree({**data.marks("--train-data"), **(valid_data.marks("--valid-data") if valid_data else {})})
    options.train_iters = total_steps(
        train_iters=options.train_iters,
        epochs=options.epochs,
        samples=data.epoch_samples,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        data_parallel_size=world.data_parallel_size,
    )
    optimizer = adapter_optimizer(
        model, lr=options.lr, weight_decay=options.weight_decay, betas=tuple(options.betas), eps=options.eps
    )
    trace.attach(model)
    engine = start_engine(model, optimizer, setting.engine, seed=model_seed(options))
    trace.follow(engine)
    create_moments(engine)
    torch.manual_seed(options.seed + world.data_parallel_rank)  # dropout; the same on ranks that share a sample
    if options.replay:
        first, options.train_iters = steps_to_replay(options.replay)
        state, valid_data, options.test_data = RunState(step=first - 1), None, None
    else:
        state = together(load_checkpoint, engine, run.checkpoints, world) if options.resume else RunState()
    run.forget_beyond(state.step)
    run.write_settings(
        options,
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
    with run:
        run.start(options.train_iters, state.step)
        train(engine, loader, valid, options, run, world, state, dataset_size=data.samples, trace=trace)
        trace.at("load")  # the last save's limit is not meant for what comes now
    model = end_training(engine)
    del engine, optimizer
    free_memory()
    if options.test_data:
        _evaluate(options, world, run, None if model is None else (model, config), trace)


def _trace(options: Namespace, run: RunFolder, world: World) -> NoTrace:
    """This rank's; what an earlier start has left goes. Every rank has to call it."""
    on_first_rank(lambda: clear(run.path))
    if options.watchdog_limit == 0:
        return NO_TRACE
    return Trace(run.path, torch.nn.Module(), rank=world.rank, world_size=world.size)


def _evaluate(
    options: Namespace, world: World, run: RunFolder, trained: tuple[CogVLMModel, dict] | None, trace: NoTrace
) -> None:
    """With the model that has trained, where no rank has to gather it: there is never a second one in memory."""
    result = together(evaluate_adapter, options, run.adapters, world, trained, trace=trace)
    if world.is_main:
        write_json(run.path / "evaluation.json", result)
    run.say(evaluation_table(result))

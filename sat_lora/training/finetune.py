"""One fine-tuning run, from options to the saved adapter."""

import gc
from argparse import Namespace
from collections.abc import Callable

import torch

from sat_lora.cogvlm.checkpoint import load_cogvlm, read_config
from sat_lora.cogvlm.model import build_cogvlm
from sat_lora.cogvlm.text import load_tokenizer
from sat_lora.config import LoraConfig
from sat_lora.errors import ConfigError
from sat_lora.placement import add_lora, find_all_parameters, find_all_sites
from sat_lora.summary import describe, describe_text
from sat_lora.targets import select
from sat_lora.training.checkpoint import RunState, load_checkpoint
from sat_lora.training.data import ImageTextDataset
from sat_lora.training.deepspeed_config import base_dtype, deepspeed_config
from sat_lora.training.distributed import World, arrange, join, together
from sat_lora.training.engine import adapter_optimizer, set_up_deepspeed, start_engine
from sat_lora.training.evaluation import evaluate_adapter, evaluation_table
from sat_lora.training.loop import train
from sat_lora.training.lora_options import lora_config, lora_problems
from sat_lora.training.nonfinite import GradientWatch
from sat_lora.training.optimizer_state import create_moments
from sat_lora.training.preflight import check_options
from sat_lora.training.run_folder import RunFolder, write_json
from sat_lora.training.schedule import total_steps
from sat_lora.training.sources import open_sources


def finetune(options: Namespace, prepare: Callable[[], None] | None = None) -> World:
    """Check, load, train, evaluate. `prepare` runs first, on rank 0 alone, to make data that is not there yet.

    Raises a SatLoraError on every rank for a user's mistake, before the weights are read; TrainingError and Stopped
    from `train`.
    """
    device = join(options.distributed_backend)
    together(_on_first_rank, prepare)
    together(check_options, options)
    engine_config = deepspeed_config(options, device=device.type)
    world = arrange(device, options.model_parallel_size)
    lora = together(_checked_lora, options)
    run = RunFolder(options.run_folder, is_writer=world.is_main)
    if options.zero_stage == 3:
        set_up_deepspeed()
    model, config = together(
        load_cogvlm,
        options.from_pretrained,
        dtype=base_dtype(options),
        device=device,
        model_parallel_size=options.model_parallel_size,
        checkpoint_activations=options.checkpoint_activations,
        vit_checkpoint_activations=options.vit_checkpoint_activations,
        seed=max(1, options.seed),  # SAT refuses 0
        trust=options.trust_checkpoint,
        zero_config=engine_config if options.zero_stage == 3 else None,
    )
    add_lora(model, lora)
    run.say(describe_text(model))
    data, valid_data = open_sources(options, world, _dataset_maker(options, config))
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
    watch = None if options.fp16 else GradientWatch(model, world.device)  # fp16: DeepSpeed's loss scaling watches
    engine = start_engine(model, optimizer, engine_config, seed=max(1, options.seed))
    create_moments(engine)
    torch.manual_seed(options.seed + world.data_parallel_rank)  # dropout; the same on ranks that share a sample
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
        train(engine, loader, valid, options, run, world, state, watch, dataset_size=data.samples)
    del engine, model, optimizer, loader
    gc.collect()
    if options.test_data:
        _evaluate(options, world, run)
    return world


def _on_first_rank(prepare: Callable[[], None] | None) -> None:
    if prepare is not None and torch.distributed.get_rank() == 0:
        prepare()


def _checked_lora(options: Namespace) -> LoraConfig:
    """The LoraConfig of the options, tried on a model with the names of the base and hardly any size."""
    config = lora_config(options)
    sizes = read_config(options.from_pretrained)
    parts = options.model_parallel_size
    small = dict(hidden_size=2 * parts, num_attention_heads=parts, inner_hidden_size=parts)
    vit = {**sizes["eva_args"], **small, "image_size": [1, 1], "patch_size": 1}
    skeleton = build_cogvlm({**sizes, **small, "vocab_size": parts, "eva_args": vit}, model_parallel_size=parts)
    try:
        select(find_all_sites(skeleton), find_all_parameters(skeleton), config)
    except ConfigError as error:
        raise ConfigError("; ".join(lora_problems(error))) from error
    return config


def _dataset_maker(options: Namespace, config: dict) -> Callable[[list], ImageTextDataset]:
    tokenizer = load_tokenizer(options.local_tokenizer)

    def dataset(items: list) -> ImageTextDataset:
        return ImageTextDataset(
            items,
            tokenizer,
            version=options.version,
            prompt=options.prompt,
            image_size=tuple(config["eva_args"]["image_size"]),
            image_length=config["image_length"],
            max_length=options.max_length,
        )

    return dataset


def _evaluate(options: Namespace, world: World, run: RunFolder) -> None:
    result = together(evaluate_adapter, options, run.adapters, world)
    if world.is_main:
        write_json(run.path / "evaluation.json", result)
    run.say(evaluation_table(result))

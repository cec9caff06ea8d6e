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
from sat_lora.mixin import add_lora, find_all_parameters, find_all_sites
from sat_lora.summary import describe, describe_text
from sat_lora.targets import select
from sat_lora.training.checkpoint import RunState, load_checkpoint
from sat_lora.training.data import ImageTextDataset, read_items, split_items
from sat_lora.training.deepspeed_config import base_dtype, deepspeed_config
from sat_lora.training.distributed import World, arrange, join, together
from sat_lora.training.engine import adapter_optimizer, start_engine
from sat_lora.training.evaluation import evaluate_adapter, evaluation_table
from sat_lora.training.loop import train
from sat_lora.training.lora_options import lora_config, lora_problems
from sat_lora.training.nonfinite import GradientWatch
from sat_lora.training.optimizer_state import create_moments
from sat_lora.training.preflight import check_options
from sat_lora.training.run_folder import RunFolder, write_json
from sat_lora.training.sampler import EpochSampler, eval_batches, make_loader
from sat_lora.training.schedule import total_steps


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
    model, config = together(
        load_cogvlm,
        options.from_pretrained,
        dtype=base_dtype(options),
        device=device,
        model_parallel_size=options.model_parallel_size,
        checkpoint_activations=options.checkpoint_activations,
        vit_checkpoint_activations=options.vit_checkpoint_activations,
        seed=max(1, options.seed),  # SAT refuses 0
    )
    add_lora(model, lora)
    run.say(describe_text(model))
    train_items, valid_items = training_items(options)
    data = _dataset_maker(options, config)
    options.train_iters = total_steps(
        train_iters=options.train_iters,
        epochs=options.epochs,
        samples=len(train_items),
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
    sampler = EpochSampler(
        len(train_items),
        batch_size=options.batch_size,
        data_parallel_rank=world.data_parallel_rank,
        data_parallel_size=world.data_parallel_size,
        seed=options.seed,
        start_step=state.step * options.gradient_accumulation_steps,
    )
    loader = make_loader(data(train_items), sampler, num_workers=options.num_workers, seed=options.seed)
    with run:
        run.start(options.train_iters, state.step)
        train(engine, loader, _validation(options, data, valid_items, world), options, run, world, state, watch)
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


def training_items(options: Namespace) -> tuple[list, list]:
    """(train, valid): from their folders, or a share of the training data where --split gives validation one."""
    items = read_items(options.train_data)
    if options.valid_data:
        return items, read_items(options.valid_data)
    train_items, valid_items, _ = split_items(items, options.split, options.seed)
    return train_items, valid_items


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


def _validation(options: Namespace, data, items: list, world: World):
    if not items:
        return None
    batches = eval_batches(
        len(items),
        batch_size=options.eval_batch_size,
        data_parallel_rank=world.data_parallel_rank,
        data_parallel_size=world.data_parallel_size,
        limit=options.eval_iters,
    )
    return make_loader(data(items), batches, num_workers=min(1, options.num_workers), seed=options.seed)


def _evaluate(options: Namespace, world: World, run: RunFolder) -> None:
    result = together(evaluate_adapter, options, run.adapters, world)
    if world.is_main:
        write_json(run.path / "evaluation.json", result)
    run.say(evaluation_table(result))

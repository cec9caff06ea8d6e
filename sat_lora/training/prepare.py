"""Everything that a run has before its first step, made from its config: the doctor looks at the same."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sat_lora.cogvlm.checkpoints.load import load_cogvlm, open_folder, quantized_layers, read_config
from sat_lora.cogvlm.families import cross_image_size, family_of
from sat_lora.cogvlm.inputs.text import end_tokens, load_tokenizer
from sat_lora.cogvlm.network.model import CogVLMModel, build_cogvlm
from sat_lora.cogvlm.sizes import skeleton_sizes
from sat_lora.data.batches.sources import Source, marks_of_sources, open_sources
from sat_lora.data.samples import ImageTextDataset
from sat_lora.errors import ConfigError
from sat_lora.lora.apply import add_lora, find_all_parameters, find_all_sites
from sat_lora.lora.config import LOFTQ
from sat_lora.lora.targets import named_whole, select
from sat_lora.parallel.distributed import World, agree, init_distributed, init_model_parallel, run_on_all_ranks
from sat_lora.quantization.select import select_layers
from sat_lora.quantized.kernels import look_for_kernels
from sat_lora.terminal.notice import warn
from sat_lora.terminal.progress import shown
from sat_lora.training.marks import marks_of_config, marks_of_engine, marks_of_options, marks_of_tokenizer
from sat_lora.training.preflight import check_options
from sat_lora.training.settings.config import NONE, Data, Model, Origin, TrainConfig
from sat_lora.training.settings.deepspeed_config import base_dtype, settle
from sat_lora.training.settings.demo import Demo
from sat_lora.training.settings.lora_options import lora_problems
from sat_lora.training.source_settings import source_settings
from sat_lora.training.steps.checkpoint import RunState
from sat_lora.training.steps.engine import adapter_optimizer, set_up_deepspeed, start_engine
from sat_lora.training.steps.optimizer_state import create_moments


@dataclass(frozen=True)
class PreparedRun:
    """A run's config, ranks and DeepSpeed config, known before the base is loaded."""

    config: TrainConfig
    """The config with what its DeepSpeed file, the machine and the number of ranks have decided."""
    world: World
    engine: dict
    """DeepSpeed's config."""


def prepare(config: TrainConfig, demo: Demo | None = None, *, problems: Iterable[str] = ()) -> PreparedRun:
    """Join the other ranks, check the config, and return the prepared run. Every rank has to call it; the demo's data
    are made first, on rank 0 alone.

    problems: those of the config that this rank knows already. Raises a SatLoraError on every rank for a user's
    mistake; it is a ConfigError where ranks were started with different values, before any collective depends on
    them.
    """
    device = init_distributed(config.parallel.distributed_backend, marks_of_options(config))
    on_first_rank(partial(demo.make_missing, config.data) if demo is not None else None)
    run_on_all_ranks(check_options, config, more=problems, demo=demo)
    settled = settle(config, device=device.type)
    for warning in settled.warnings:
        warn(warning)
    agree({
        **marks_of_options(settled.config),  # once more, with what the DeepSpeed file has decided
        **marks_of_engine(settled.engine),
        **marks_of_tokenizer(config.model.tokenizer),
    })  # fmt: skip
    world = init_model_parallel(device, config.parallel.model_parallel_size)
    run_on_all_ranks(_check_targets, settled.config)
    scheme = run_on_all_ranks(scheme_of_base, settled.config)
    look_for_kernels(scheme, device)
    return PreparedRun(settled.config, world, settled.engine)


def load_base(
    config: TrainConfig,
    world: World,
    *,
    zero_config: dict | None = None,
    layers: int | None = None,
    trained: Iterable[str] = (),
) -> tuple[CogVLMModel, dict]:
    """Return (the base with its weights, its model_config.json). Every rank has to call it.

    zero_config: DeepSpeed's config, by which the weights are partitioned; None leaves them whole. layers: how many of
    the first layers of each transformer are loaded; None: all. trained: names of weights that an adapter brings whole,
    and that are not quantised either. Raises CheckpointError on every rank where the base
    cannot be loaded.
    """
    if zero_config is not None:
        set_up_deepspeed()
    quantization = config.quantization.of(config.lora)
    if quantization is not None:
        quantization = replace(quantization, trained=(*quantization.trained, *trained))
    return run_on_all_ranks(
        load_cogvlm,
        config.model.base,
        dtype=base_dtype(config.precision),
        device=world.device,
        model_parallel_size=config.parallel.model_parallel_size,
        checkpoint_activations=config.checkpointing.checkpoint_activations,
        vit_checkpoint_activations=config.checkpointing.vit_checkpoint_activations,
        checkpoint_offload=config.checkpointing.checkpoint_offload,
        seed=model_seed(config.schedule.seed),
        trust=config.start.trust_checkpoint,
        zero_config=zero_config,
        layers=layers,
        quantize=quantization,
        partition_quantized=config.quantization.quantize_partition,
        progress=loading_progress(),
    )


def loading_progress() -> Callable[[Collection], Iterable]:
    """Return a function that goes through a collection and, on rank 0, shows how far the base is loaded."""
    if torch.distributed.get_rank() > 0:
        return iter
    return partial(shown, what="loading the base", unit="modules")


def model_seed(seed: int) -> int:
    """Return the seed for SAT, which refuses 0."""
    return max(1, seed)


def dataset_maker(
    model: Model, data: Data, sizes: dict, *, with_answer: bool = True
) -> Callable[[list], ImageTextDataset]:
    """Return a function that makes the dataset of a list of items. sizes: the base's model_config.json. with_answer:
    False gives the questions alone, to be answered.
    """
    tokenizer = load_tokenizer(model.tokenizer)

    def dataset(items: list) -> ImageTextDataset:
        return ImageTextDataset(
            items,
            tokenizer,
            version=model.version,
            prompt=data.prompt,
            image_size=tuple(sizes["eva_args"]["image_size"]),
            image_length=sizes["image_length"],
            max_length=model.max_length,
            with_answer=with_answer,
            special_tokens=data.special_tokens_in_text,
            max_pixels=data.max_pixels,
            learns_all=data.loss_on == "all",
            cross_size=cross_image_size(sizes),
            takes_frames=family_of(sizes).takes_frames,
            ends=end_tokens(tokenizer, sizes),
        )

    return dataset


def on_first_rank(action: Callable[[], None] | None) -> None:
    """Call `action` on rank 0; the others wait. Every rank has to call it, after `init_distributed`."""
    run_on_all_ranks(action if action is not None and torch.distributed.get_rank() == 0 else lambda: None)


def _check_targets(config: TrainConfig) -> None:
    """Raise ConfigError where LoRA's targets are missing in a model with the names of the base and hardly any size."""
    if config.problems:
        raise ConfigError("; ".join(config.problems))
    sizes = read_config(config.model.base)
    mp_size = config.parallel.model_parallel_size
    skeleton = build_cogvlm(skeleton_sizes(sizes, mp_size), model_parallel_size=mp_size)
    _refuse_quantized(config)
    quantization = config.quantization.of(config.lora)
    quantized: Collection[str] = ()
    if quantization is not None:
        try:
            quantized = select_layers(skeleton, quantization, has_shapes=False)
        except ConfigError as error:
            problems = [re.sub(r"^(?=(quantize|keep)_modules: )", "--", problem) for problem in error.problems]
            raise ConfigError.of(problems) from error
    try:
        adapted, _ = select(find_all_sites(skeleton), find_all_parameters(skeleton), config.lora)
    except ConfigError as error:
        raise ConfigError("; ".join(lora_problems(error))) from error
    if quantization is not None and config.lora.init_lora_weights == LOFTQ and not adapted.keys() & set(quantized):
        raise ConfigError(
            f"--init_lora_weights loftq: --quantize_modules and --keep_modules select none of the {len(adapted)} "
            f"adapted layers, such as {next(iter(adapted))}, and it begins with what quantisation misses of these; "
            "quantise them as well, or take another --init_lora_weights, such as pissa"
        )


def _refuse_quantized(config: TrainConfig) -> None:
    """Raise ConfigError where the base's folder holds a weight in fewer bits that is asked for in others, or whole."""
    note = open_folder(config.model.base, trust=config.start.trust_checkpoint).note()
    if note is not None and config.lora.init_lora_weights == LOFTQ:
        raise ConfigError(
            f"--init_lora_weights loftq: {config.model.base} holds codes alone, and loftq begins with what they miss "
            "of the base's weights; give the base that it was made of, with --quantize"
        )
    quantized = [] if note is None else named_whole(config.lora.modules_to_save, note.weights)
    if quantized:
        raise ConfigError(
            f"--modules_to_save: {quantized[0]} is quantised in {config.model.base} and does not train; give the base "
            "that it was made of, with --quantize and --keep_modules"
        )
    asked = config.quantization.of(config.lora)
    if note is not None and asked is not None:
        mp_size = config.parallel.model_parallel_size
        base = build_cogvlm(read_config(config.model.base), device="meta", model_parallel_size=mp_size)
        try:
            quantized_layers(base, asked, note, Path(config.model.base))
        except ConfigError as error:
            if config.origin("quantize") not in (Origin.RUN, Origin.RUN_DEFAULT):
                raise
            raise ConfigError(
                f"--from_pretrained: {config.model.base} is quantised to {note.quantization}, and the run to resume "
                f"holds its base in {asked}; leave the option out, or start a new run"
            ) from error


def scheme_of_base(config: TrainConfig) -> str | None:
    """Return by which scheme the base is held, as the options or its folder say; None where it is whole."""
    if config.quantization.quantize != NONE:
        return config.quantization.quantize
    note = open_folder(config.model.base, trust=config.start.trust_checkpoint).note()
    return None if note is None else note.quantization.scheme


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The sources of a run's batches."""

    training: Source
    validation: Source | None
    sizes: dict
    """The model_config.json of the base, for which the samples are laid out."""

    @property
    def marks(self) -> dict[str, str]:
        """Marks of the data, and of the base's numbers, that all ranks have to share, by their names in messages."""
        return {**marks_of_sources(self.training, self.validation), **marks_of_config(self.sizes)}


def open_data(prepared: PreparedRun) -> Sources:
    """Return the training and validation data of a run. Every rank has to call it.

    Raises DataError on every rank where shards cannot be read, ConfigError where a rank has other data than rank 0.
    """
    sizes = read_config(prepared.config.model.base)
    make_dataset = dataset_maker(prepared.config.model, prepared.config.data, sizes)
    training, validation = open_sources(source_settings(prepared.config), prepared.world, make_dataset)
    sources = Sources(training=training, validation=validation, sizes=sizes)
    agree(sources.marks)
    return sources


@dataclass(kw_only=True)
class Run:
    """A model that trains, with its optimizer and engine, as `build_run` makes it for a run, the doctor and
    a replay.
    """

    prepared: PreparedRun
    model: CogVLMModel
    sizes: dict
    """The model_config.json of the model; with --shrink it names fewer layers than the base has."""
    optimizer: torch.optim.Optimizer
    engine: Any = None
    """DeepSpeed's engine; None until `start_engine`."""
    state: RunState = field(default_factory=RunState)
    """How far the run is."""

    @property
    def is_partitioned(self) -> bool:
        """Whether every rank holds no more than a share of each weight, as under ZeRO-3."""
        return any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())

    def start_engine(self, **changes: Any) -> None:
        """Start DeepSpeed on the model, with the moments of Adam there. Every rank has to call it.

        changes: entries of DeepSpeed's config in place of the run's.
        """
        config = {**self.prepared.engine, **changes}
        self.engine = start_engine(
            self.model, self.optimizer, config, seed=model_seed(self.prepared.config.schedule.seed)
        )
        create_moments(self.engine)


def build_run(prepared: PreparedRun, *, layers: int | None = None) -> Run:
    """Return the base with its adapters, and the optimizer of what trains. Every rank has to call it.

    layers: how many of the first layers of each transformer are taken, whole on every rank; None: all. Raises
    CheckpointError on every rank where the base cannot be loaded.
    """
    config = prepared.config
    zero_config = prepared.engine if config.parallel.zero_stage == 3 and layers is None else None
    model, sizes = load_base(config, prepared.world, zero_config=zero_config, layers=layers)
    add_lora(model, config.lora)
    optimizer = adapter_optimizer(
        model,
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    return Run(prepared=prepared, model=model, sizes=sizes, optimizer=optimizer)

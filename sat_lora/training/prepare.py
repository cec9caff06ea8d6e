"""Everything that a run has before its first step, made from its options: the doctor looks at the same."""

from argparse import Namespace
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from sat_lora.cogvlm.checkpoints.load import load_cogvlm, read_config
from sat_lora.cogvlm.inputs.text import load_tokenizer
from sat_lora.cogvlm.network.model import CogVLMModel, build_cogvlm
from sat_lora.data.samples import ImageTextDataset
from sat_lora.errors import ConfigError
from sat_lora.lora.apply import find_all_parameters, find_all_sites
from sat_lora.lora.config import LoraConfig
from sat_lora.lora.targets import select
from sat_lora.parallel.distributed import World, agree, init_distributed, init_model_parallel, run_on_all_ranks
from sat_lora.terminal.progress import shown
from sat_lora.training.marks import marks_of_engine, marks_of_options, marks_of_tokenizer
from sat_lora.training.preflight import check_options
from sat_lora.training.settings.deepspeed_config import base_dtype, deepspeed_config
from sat_lora.training.settings.lora_options import lora_config, lora_problems
from sat_lora.training.steps.engine import set_up_deepspeed


@dataclass(frozen=True)
class Setting:
    """What is known before the base is loaded."""

    world: World
    engine: dict
    """DeepSpeed's config."""
    lora: LoraConfig


def prepare(
    options: Namespace, make_data: Callable[[], None] | None = None, *, problems: Iterable[str] = ()
) -> Setting:
    """Join the other ranks and check the options. `make_data` runs first, on rank 0 alone.

    problems: of the options, that this rank knows already. A SatLoraError comes on every rank; a ConfigError if what
    the ranks were started with differs, before anything whose collectives depend on it.
    """
    device = init_distributed(options.distributed_backend, marks_of_options(options))
    on_first_rank(make_data)
    run_on_all_ranks(check_options, options, more=problems)
    engine = deepspeed_config(options, device=device.type)
    agree({
        **marks_of_options(options),  # once more: the DeepSpeed file has been written into them
        **marks_of_engine(engine),
        **marks_of_tokenizer(options.local_tokenizer),
    })  # fmt: skip
    world = init_model_parallel(device, options.model_parallel_size)
    return Setting(world, engine, run_on_all_ranks(_checked_lora, options))


def load_base(options: Namespace, setting: Setting, *, layers: int | None = None) -> tuple[CogVLMModel, dict]:
    """The base with its weights, partitioned under ZeRO-3, and its config. CheckpointError on every rank.

    layers: take the first so many of each transformer alone, whole on every rank.
    """
    partitioned = options.zero_stage == 3 and layers is None
    if partitioned:
        set_up_deepspeed()
    return run_on_all_ranks(
        load_cogvlm,
        options.from_pretrained,
        dtype=base_dtype(options),
        device=setting.world.device,
        model_parallel_size=options.model_parallel_size,
        checkpoint_activations=options.checkpoint_activations,
        vit_checkpoint_activations=options.vit_checkpoint_activations,
        seed=model_seed(options),
        trust=options.trust_checkpoint,
        zero_config=setting.engine if partitioned else None,
        layers=layers,
        progress=loading_progress(),
    )


def loading_progress() -> Callable[[Collection], Iterable]:
    """What shows on rank 0 how far the base is loaded, if that takes a while."""
    if torch.distributed.get_rank() > 0:
        return iter
    return partial(shown, what="loading the base", unit="modules")


def model_seed(options: Namespace) -> int:
    return max(1, options.seed)  # SAT refuses 0


def dataset_maker(options: Namespace, config: dict) -> Callable[[list], ImageTextDataset]:
    """Makes the dataset of a list of items, for the base of that config."""
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
            special_tokens=options.special_tokens_in_text,
            max_pixels=options.max_pixels,
        )

    return dataset


def on_first_rank(action: Callable[[], None] | None) -> None:
    """Call `action` on rank 0; the others wait. Every rank has to call it, after `init_distributed`."""
    run_on_all_ranks(action if action is not None and torch.distributed.get_rank() == 0 else lambda: None)


def _checked_lora(options: Namespace) -> LoraConfig:
    """The LoraConfig of the options, tried on a model with the names of the base and hardly any size."""
    config = lora_config(options)
    sizes = read_config(options.from_pretrained)
    parts = options.model_parallel_size
    small = dict(hidden_size=2 * parts, num_attention_heads=parts, inner_hidden_size=parts)
    vit = {**sizes.get("eva_args", {}), **small, "image_size": [1, 1], "patch_size": 1}
    skeleton = build_cogvlm({**sizes, **small, "vocab_size": parts, "eva_args": vit}, model_parallel_size=parts)
    try:
        select(find_all_sites(skeleton), find_all_parameters(skeleton), config)
    except ConfigError as error:
        raise ConfigError("; ".join(lora_problems(error))) from error
    return config

"""The sizes in a model's config: which there have to be, and which no model of its family has."""

import math
from collections.abc import Iterator
from typing import Any

from sat_lora.cogvlm.families import (
    COGAGENT,
    COGVLM,
    ENCODER,
    Family,
    encoder_sizes,
    family_of,
    with_published_sizes,
)
from sat_lora.errors import CheckpointError

REQUIRED = {
    "num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size", "image_length", "eva_args",
}  # fmt: skip
REQUIRED_BY_SAT = {"max_sequence_length", "layernorm_order"}
REQUIRED_OF_VIT = {
    "num_layers", "hidden_size", "num_attention_heads", "vocab_size", "layernorm_order", "image_size", "patch_size",
    "pre_len", "post_len", "in_channels",
}  # fmt: skip
REQUIRED_OF_CROSS_VISION = {
    "cross_image_pix", "cross_attn_hidden_size", "cross_hidden_size_per_attention_head", "is_decoder",
}  # fmt: skip
COUNTS = {
    "num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size", "max_sequence_length",
    "image_length", "in_channels", "patch_size", "model_parallel_size", "cross_image_pix", "cross_attn_hidden_size",
    "cross_hidden_size_per_attention_head", "num_layers_run", "head_size", "trained_side",
}  # fmt: skip
NOT_NEGATIVE = {"pre_len", "post_len", "num_multi_query_heads", "num_vision_layers"}
NUMBERS = {"layernorm_epsilon", "rotary_base", "hidden_dropout", "attention_dropout"}
FLAGS = {"use_bias", "use_final_layernorm", "row_parallel_linear_final_bias"}
FEW = 4  # sizes that a config of the family may have lost; one that lacks more is another model's
MOST_LAYERS = 10_000  # a model of more would be built for minutes before it could be refused
LARGEST = 2**31 - 1


def missing_sizes(config: dict) -> list[str]:
    """Return the names of the sizes that a CogVLM cannot be built without."""
    vit = config.get("eva_args", {})
    of_vit = REQUIRED_OF_VIT - vit.keys() if isinstance(vit, dict) and "eva_args" in config else ()
    whole = [*sorted(REQUIRED - config.keys()), *sorted(REQUIRED_BY_SAT - config.keys())]
    if _family(config).has_cross_vision:
        whole += sorted(REQUIRED_OF_CROSS_VISION - config.keys())
    return [*whole, *(f"eva_args.{name}" for name in sorted(of_vit))]


def lacking(config: dict) -> str | None:
    """Return the sentence on the sizes that a config lacks, with what the published model has; None if it has all."""
    names = missing_sizes(config)
    if not names:
        return None
    family = _family(config)
    if len(names) > FEW:
        return f"the model config lacks {', '.join(names)}; it is no {family.title} config"
    return (
        f"the model config lacks {with_published_sizes(family, names)}; it is no {family.title} config, or not all of "
        "it is there: copy it again, or set them (in brackets is what the published model has)"
    )


def size_problems(config: dict) -> list[str]:
    """Return what is wrong with the sizes that are there, each as `name value, wanted ...`."""
    problems = [*_problems(config, ""), *_family_problems(config)]
    vit = config.get("eva_args", {})
    if not isinstance(vit, dict):
        return [*problems, f"eva_args is {_shown(vit)}, wanted an object"]
    return [*problems, *_problems(vit, "eva_args."), *_image_problems(vit)]


def head_problems(config: dict) -> list[str]:
    """Return where the heads do not divide the hidden size; both sizes have to be there and right."""
    sections = {"": config, "eva_args.": config["eva_args"]}
    if _family(config).has_cross_vision:
        sections["encoder_args."] = encoder_sizes(config)
    return [
        f"{prefix}hidden_size {sizes['hidden_size']} does not divide by {prefix}num_attention_heads "
        f"{sizes['num_attention_heads']}"
        for prefix, sizes in sections.items()
        if sizes["hidden_size"] % sizes["num_attention_heads"]
    ]


def image_length_problem(config: dict) -> str | None:
    """Return how the text's places for an image are not as many as its patches; None if they are.

    Patches without a place would take those of the next image. The config is one that `missing_sizes` and
    `size_problems` found right.
    """
    size = config["eva_args"]["image_size"]
    patch = config["eva_args"]["patch_size"]
    family = _family(config)
    places = family.image_length(size, patch)
    if config["image_length"] == places:
        return None
    after = ", of which the convolution makes one of four" if family.convolves else ""
    return f"image_length is {config['image_length']}, and an image of {size} in patches of {patch} has {places}{after}"


def contradictions(said: dict, config: dict) -> list[str]:
    """Return where sizes that somebody says are not those of the config, as `--name: ...`; neither has to be whole."""
    problems = []
    for name, value in said.items():
        own = config.get(name)
        if not isinstance(value, dict):
            if value != own:
                problems.append(f"--{name}: got {_shown(value)}, and the base has {_had(name, config)}")
            continue
        sizes = own if isinstance(own, dict) else {}
        others = [key for key in value if key not in sizes or value[key] != sizes[key]]
        problems += [f"--{name}: {key} is {_shown(value[key])}, and the base has {_had(key, sizes)}" for key in others]
    return [f"{problem}; leave it out" for problem in problems]


def _had(name: str, sizes: dict) -> str:
    return _shown(sizes[name]) if name in sizes else "none"


def skeleton_sizes(config: dict, ranks: int) -> dict:
    """Return the config of a model with the same layers and names and hardly any size, for as many ranks."""
    small: dict[str, Any] = dict(hidden_size=2 * ranks, num_attention_heads=ranks, inner_hidden_size=ranks)
    vit = {**config.get("eva_args", {}), **small, "image_size": [1, 1], "patch_size": 1}
    family = _family(config)
    if family.groups_heads:
        small |= dict(hidden_size=4 * ranks, num_attention_heads=2 * ranks, num_multi_query_heads=ranks)
    if family.has_cross_vision:
        encoder = dict(hidden_size=4, num_attention_heads=1, inner_hidden_size=1, patch_size=1, head_size=1)
        small |= dict(cross_image_pix=1, cross_attn_hidden_size=4, cross_hidden_size_per_attention_head=1)
        small["encoder_args"] = {**encoder_sizes(config), **encoder}
    return {**config, **small, "vocab_size": ranks, "eva_args": vit}


def _family(config: dict) -> Family:
    """Return the family of a config; CogVLM where it is not certain, which `size_problems` tells."""
    try:
        return family_of(config)
    except CheckpointError:
        return COGVLM


def _family_problems(config: dict) -> Iterator[str]:
    try:
        family = family_of(config)
    except CheckpointError as error:
        yield str(error)
        return
    yield from _head_group_problems(config, family)
    yield from _expert_problems(config, family)
    if family is COGAGENT:
        yield from _cross_vision_problems(config)


def _head_group_problems(config: dict, family: Family) -> Iterator[str]:
    """Yield how heads of queries cannot share those of keys."""
    heads = config.get("num_attention_heads")
    shared = config.get("num_multi_query_heads")
    if type(heads) is not int or type(shared) is not int or heads <= 0 or shared <= 0 or shared == heads:
        return
    if heads % shared:
        yield f"num_attention_heads {heads} does not divide by num_multi_query_heads {shared}"
    elif not family.groups_heads:
        yield f"num_multi_query_heads is {shared}, and {family.title} has a key for each of {heads} heads; take it out"


def _expert_problems(config: dict, family: Family) -> Iterator[str]:
    """Yield how num_vision_layers asks for visual experts in other layers than those of the family have them."""
    layers = config.get("num_vision_layers")
    if type(layers) is not int or not family.has_vision_experts or layers == config.get("num_layers"):
        return
    yield f"num_vision_layers is {layers}, and {family.title} has visual experts in every layer; take it out"


def _cross_vision_problems(config: dict) -> Iterator[str]:
    decoder = config.get("is_decoder", True)
    if decoder is not True and not (isinstance(decoder, list) and decoder and all(each is True for each in decoder)):
        yield f"is_decoder is {_shown(decoder)}, wanted true, or true for each layer"
    elif isinstance(decoder, list) and type(config.get("num_layers")) is int and len(decoder) < config["num_layers"]:
        yield f"is_decoder has {len(decoder)} entries, wanted one for each of {config['num_layers']} layers"
    own = config.get("encoder_args", {})
    if not isinstance(own, dict):
        yield f"encoder_args is {_shown(own)}, wanted an object"
        return
    problems = [*_problems(own, "encoder_args.")]
    problems += [f"encoder_args has no {_shown(name)}" for name in own.keys() - ENCODER.keys()]
    yield from problems
    if problems:
        return
    sizes = encoder_sizes(config)
    side = config.get("cross_image_pix")
    if type(side) is int and side < sizes["patch_size"]:
        yield f"cross_image_pix is {side}, less than a patch of {sizes['patch_size']}"
    if sizes["hidden_size"] % (4 * sizes["num_attention_heads"]):
        yield (
            f"encoder_args.hidden_size {sizes['hidden_size']} gives {sizes['num_attention_heads']} heads no channels "
            "that divide by 4"
        )
    if sizes["num_layers_run"] > sizes["num_layers"]:
        yield f"encoder_args.num_layers_run {sizes['num_layers_run']} is more than num_layers {sizes['num_layers']}"
    width = config.get("cross_attn_hidden_size", sizes["hidden_size"])
    if width != sizes["hidden_size"]:
        yield f"cross_attn_hidden_size is {_shown(width)}, and the encoder's hidden_size {sizes['hidden_size']}"


def _problems(sizes: dict, prefix: str) -> Iterator[str]:
    for name, value in sizes.items():
        shown = f"{prefix}{name} is {_shown(value)}, wanted"
        if name in COUNTS | NOT_NEGATIVE:
            least = int(name in COUNTS)
            most = MOST_LAYERS if name == "num_layers" else LARGEST
            if type(value) is not int or not least <= value <= most:
                yield f"{shown} a whole number from {least} to {most}"
        elif name in NUMBERS:
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                yield f"{shown} a number of at least 0"
        elif name in FLAGS and type(value) is not bool:
            yield f"{shown} true or false"
        elif name == "layernorm_order" and value not in ("pre", "post", "sandwich"):
            yield f"{shown} pre, post or sandwich"


def _image_problems(vit: dict) -> Iterator[str]:
    size = vit.get("image_size", [1, 1])
    patch = vit.get("patch_size", 1)
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or not 0 < n <= LARGEST for n in size):
        yield f"eva_args.image_size is {_shown(size)}, wanted two whole numbers above 0"
    elif "image_size" in vit and type(patch) is int and patch > min(size):
        yield f"eva_args.patch_size is {patch}, more than the image's {min(size)}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of very many digits"
    return text if len(text) <= 60 else text[:60] + "..."

"""The families of models that the network serves, one description each, and which of them a config is of.

family          beside CogVLM's parts
cogvlm          nothing
cogvlm2         fewer keys than queries, a bias in the visual experts' q/k/v, a convolution after the ViT
cogvlm2-video   the same without visual experts; the frames of a film are its images
cogagent        a second vision encoder, at which every layer looks by cross-attention

The sizes of published models are in `published/`, as model_config.json has them. Imports nothing heavy.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sat_lora.errors import CheckpointError
from sat_lora.files.foreign import read_json
from sat_lora.printable import printable

PUBLISHED = Path(__file__).parent / "published"
OF_THE_SIZES = {
    "cogvlm-chat-hf": "cogvlm-chat-v1.1",
    "cogagent-chat-hf": "cogagent-chat",
    "cogagent-vqa": "cogagent-chat",
}
"""Published models that have the sizes of another."""
CODE = ("configuration_{}.py", "modeling_{}.py", "visual.py", "util.py")
_TEMPLATES = MappingProxyType({"base": "base", "vqa": "vqa", "chat_old": "chat", "chat": "base"})
ENCODER = MappingProxyType({
    "num_layers": 24, "num_layers_run": 23, "hidden_size": 1024, "num_attention_heads": 16, "inner_hidden_size": 2730,
    "patch_size": 14, "in_channels": 3, "head_size": 768, "trained_side": 16, "layernorm_epsilon": 1e-6,
})  # fmt: skip
"""The sizes of the second vision encoder, which the published code has written into it. `encoder_args` names others."""


_OF_CROSS_VISION = ["cross_image_pix", "cross_attn_hidden_size", "cross_hidden_size_per_attention_head"]
"""What a model_config.json says of a second vision encoder alone."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells the models of one family from those of another."""

    name: str
    title: str
    model_class: str
    """What SAT's model_config.json calls it."""
    rotary_base: float = 10000.0
    """The base of the published code, which reads it from nowhere; SAT's `rotary_base` may name another."""
    key_value_heads: int | None = None
    """What Hugging Face's config means where it does not say; None: as many as there are heads, and it never says."""
    has_vision_experts: bool = True
    vision_has_bias: bool = False
    """Whether q/k/v of the visual experts have a bias; those of the language have none."""
    convolves: bool = False
    """Whether two by two patches become one place in the text."""
    has_cross_vision: bool = False
    """Whether there is a second vision encoder."""
    takes_frames: bool = False
    """Whether its images are the frames of a film."""
    version: str | None = None
    """The prompt format where a folder names none; None: it is not known."""
    max_length: int | None = None
    """The longest sequence where nobody says one: an image, or a film, and words; None: the default of the option."""
    most_images: int | None = None
    """The most images of a sample; None where the network takes any number."""

    # Hugging Face's side
    architecture: str
    model_type: str
    config_class: str
    example: str
    """The name of a published folder."""
    tokenizer: str
    """The name of its tokenizer."""
    code: tuple[str, ...] = tuple(name.format("cogvlm") for name in CODE)
    """The files with the model's code, as `transformers` takes them from the folder; the first two have its classes."""
    templates: Mapping[str, str] = field(default_factory=lambda: _TEMPLATES)
    """The template of that code for the prompts of a version here, which are SAT's."""
    versions: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType({"base": "base", "vqa": "vqa", "chat": "chat_old"})
    )
    """The other way round."""

    def __reduce__(self) -> tuple:
        """Return how to come by it again: a copy of a model has the same family, not another that is like it."""
        return _named, (self.name,)

    def advice(self, config: Mapping[str, Any]) -> str:
        """Return which sizes make that model_config.json one of this family, as a clause."""
        changes = []
        if self.has_cross_vision:
            lacking = [name for name in _OF_CROSS_VISION if name not in config] or _OF_CROSS_VISION
            changes.append(f"set {_listed(lacking)} in it")
        if self.groups_heads:
            if not config.get("num_multi_query_heads"):
                changes.append(f"set num_multi_query_heads in it ({self.key_value_heads} in the published model)")
            changes.append("leave num_vision_layers out" if self.has_vision_experts else "set num_vision_layers to 0")
        stray = [] if self.groups_heads else ["num_multi_query_heads", "num_vision_layers"]
        stray += [] if self.has_cross_vision else _OF_CROSS_VISION
        present = [name for name in stray if name in config]
        if present:
            changes.append(f"take {_listed(present)} out of it")
        return ", and ".join(changes)

    @property
    def groups_heads(self) -> bool:
        """Whether several heads of queries share one of keys and values."""
        return self.key_value_heads is not None

    def image_length(self, size: tuple[int, int] | list[int], patch: int) -> int:
        """Return how many places an image of (height, width) takes in the text, both ends aside."""
        rows, columns = (side // patch // (2 if self.convolves else 1) for side in size)
        return rows * columns


COGVLM = Family(
    name="cogvlm",
    title="CogVLM",
    model_class="CogVLMModel",
    architecture="CogVLMForCausalLM",
    model_type="cogvlm",
    example="cogvlm-chat-hf",
    tokenizer="vicuna-7b-v1.5",
    config_class="CogVLMConfig",
)
COGVLM2 = Family(
    name="cogvlm2",
    title="CogVLM2",
    model_class="CogVLM2Model",
    rotary_base=500000.0,
    key_value_heads=8,
    vision_has_bias=True,
    convolves=True,
    version="chat_old",
    max_length=2432,
    architecture="CogVLMForCausalLM",
    model_type="cogvlm",
    example="cogvlm2-llama3-chat-19B",
    tokenizer="that folder's own",
    config_class="CogVLMConfig",
)
COGVLM2_VIDEO = Family(
    name="cogvlm2-video",
    title="CogVLM2-Video",
    model_class="CogVLM2VideoModel",
    rotary_base=500000.0,
    key_value_heads=8,
    has_vision_experts=False,
    convolves=True,
    takes_frames=True,
    version="base",
    max_length=2048,
    architecture="CogVLMVideoForCausalLM",
    model_type="cogvlm",
    example="cogvlm2-video-llama3-chat",
    tokenizer="that folder's own",
    config_class="CogVLMConfig",
)
COGAGENT = Family(
    name="cogagent",
    title="CogAgent",
    model_class="CogAgentModel",
    has_cross_vision=True,
    version="chat",
    max_length=400,
    most_images=1,
    architecture="CogAgentForCausalLM",
    model_type="cogagent",
    example="cogagent-chat-hf",
    tokenizer="vicuna-7b-v1.5",
    config_class="CogAgentConfig",
    code=(*(name.format("cogagent") for name in CODE), "cross_visual.py"),
    templates=MappingProxyType({"base": "base", "vqa": "vqa", "chat_old": "chat_old", "chat": "chat"}),
    versions=MappingProxyType({"base": "base", "vqa": "vqa", "chat": "chat", "chat_old": "chat_old"}),
)
FAMILIES = {family.name: family for family in (COGVLM, COGVLM2, COGVLM2_VIDEO, COGAGENT)}


def _named(name: str) -> Family:
    return FAMILIES[name]


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a model_config.json, by its sizes; `model_class` has to agree.

    Raises CheckpointError, which says what to set, where it does not.
    """
    by_sizes, why = _by_sizes(config)
    by_class = family_of_class(config.get("model_class"))
    if by_class in (None, by_sizes):
        return by_sizes
    raise CheckpointError(
        f"the model config says model_class {printable(repr(config['model_class']))}, which is {by_class.title}, and "
        f"{why}, which is {by_sizes.title}; {by_class.advice(config)}, or model_class to {by_sizes.model_class!r}"
    )


def family_of_class(model_class: object) -> Family | None:
    """Return the family that a model class of SAT belongs to, those of training and testing too; None for another."""
    if not isinstance(model_class, str):
        return None
    kinds = sorted(FAMILIES.values(), key=lambda family: -len(family.model_class))
    return next((kind for kind in kinds if kind.model_class.removesuffix("Model") in model_class), None)


def family_of_names(names: Collection[str]) -> Family:
    """Return the family whose SAT state dict has these names."""
    if any(name.startswith("mixins.encoder.") for name in map(str, names)):
        return COGAGENT
    if "mixins.eva.conv.weight" not in names:
        return COGVLM
    return COGVLM2 if any(name.startswith("mixins.rotary.vision_") for name in map(str, names)) else COGVLM2_VIDEO


def _by_sizes(config: Mapping[str, Any]) -> tuple[Family, str]:
    """Return (the family, what says so)."""
    if "cross_image_pix" in config or "cross_attn_hidden_size" in config:
        key = "cross_image_pix" if "cross_image_pix" in config else "cross_attn_hidden_size"
        return COGAGENT, f"{key} {printable(repr(config[key]))}"
    heads = config.get("num_multi_query_heads")
    if not heads or heads == config.get("num_attention_heads"):
        return COGVLM, "no num_multi_query_heads" if not heads else "as many num_multi_query_heads as heads"
    if config.get("num_vision_layers") == 0:
        return COGVLM2_VIDEO, "num_vision_layers 0"
    return COGVLM2, f"num_multi_query_heads {printable(repr(heads))}"


def hugging_face_family(content: Mapping[str, Any], names: Collection[str] = ()) -> Family | None:
    """Return the family of a folder of Hugging Face; None where nothing in it says of which of several it is.

    content: of its config.json. names: of its tensors, which decide. Raises CheckpointError, which says what to set,
    where both do not agree.
    """
    by_config = _families_of_config(content)
    if not names:
        return by_config[0] if len(by_config) == 1 else None
    by_names = _family_of_names(names)
    if by_names in by_config:
        return by_names
    titles = " or ".join(family.title for family in by_config)
    raise CheckpointError(
        f"config.json is of a {titles} ({_mark_of(content)}), and the weights are those of a {by_names.title}; they do "
        f"not belong together: copy both again, or, if the weights are right, {_what_to_write(by_names, content)}"
    )


def _family_of_names(names: Collection[str]) -> Family:
    """Return the family that has tensors of these names."""
    if any(name.startswith("model.cross_vision.") for name in names):
        return COGAGENT
    if not any(name.startswith("model.vision.conv.") for name in names):
        return COGVLM
    return COGVLM2 if any(".vision_expert_" in name for name in names) else COGVLM2_VIDEO


def _families_of_config(content: Mapping[str, Any]) -> list[Family]:
    """Return the families that config.json may be of, at least one: CogVLM2 shares CogVLM's class, and both kinds of
    CogVLM2 their groups of heads.
    """
    if "cross_hidden_size" in content or "cross_image_size" in content:
        return [COGAGENT]
    architectures = content.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    kinds = [family for family in FAMILIES.values() if family.architecture in named] or [*FAMILIES.values()]
    heads = content.get("num_multi_query_heads")
    if heads is None or heads == content.get("num_attention_heads"):
        return kinds
    return [family for family in kinds if family.groups_heads] or kinds


def _cross_keys(content: Mapping[str, Any]) -> list[str]:
    """Return the keys of config.json that a second vision encoder alone has."""
    return [key for key in ("cross_hidden_size", "cross_compute_hidden_size", "cross_image_size") if key in content]


def _mark_of(content: Mapping[str, Any]) -> str:
    """Return what in config.json says of which family it is."""
    keys = [*_cross_keys(content), "num_multi_query_heads", "architectures"]
    return next((f"{key} {printable(repr(content[key]))}" for key in keys if key in content), "nothing in it")


def _what_to_write(family: Family, content: Mapping[str, Any]) -> str:
    """Return how that config.json becomes one of that family."""
    changes = [f"set architectures to [{family.architecture!r}]"]
    stray = [] if family.has_cross_vision else _cross_keys(content)
    if family.has_cross_vision:
        changes.append("cross_hidden_size, cross_compute_hidden_size and cross_image_size")
    if family.groups_heads:
        changes.append(f"num_multi_query_heads to {family.key_value_heads}")
    elif content.get("num_multi_query_heads") is not None:
        stray = ["num_multi_query_heads", *stray]
    if stray:
        changes.append(f"take {_listed(stray)} out")
    return ", and ".join(changes)


def _listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def encoder_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of the second vision encoder for a config of a family that has one."""
    return {**ENCODER, **config.get("encoder_args", {})}


def cross_image_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of the picture for a second vision encoder; None where the family has none."""
    return (config["cross_image_pix"],) * 2 if family_of(config).has_cross_vision else None


def published() -> list[str]:
    """Return the names of published models whose sizes are known without their folder."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def is_published(path: str | Path) -> bool:
    """Return whether nothing lies at a path whose last name is that of a published model, or of one of its sizes."""
    name = Path(path).name
    return OF_THE_SIZES.get(name, name) in published() and not Path(path).exists()


def published_config(name: str) -> dict[str, Any]:
    """Return the model_config.json of a published model, by a name of `published` or OF_THE_SIZES."""
    config: dict[str, Any] = read_json(PUBLISHED / f"{OF_THE_SIZES.get(name, name)}.json")
    return config


def with_published_sizes(family: Family, names: Sequence[str]) -> str:
    """Return sizes that a config of that family lacks as a sentence lists them, with what the published one has."""
    config = next(config for config in map(published_config, published()) if family_of(config) is family)
    values = [config.get("eva_args", {}).get(name.removeprefix("eva_args.")) or config.get(name) for name in names]
    return ", ".join(
        name if value is None or isinstance(value, dict) else f"{name} ({_short(value)})"
        for name, value in zip(names, values)
    )


def _short(value: Any) -> str:
    """Return a size as JSON, a long list of one value by its length."""
    if isinstance(value, list) and len(value) > 2 and len({*map(str, value)}) == 1:
        return f"{len(value)} times {json.dumps(value[0])}"
    return json.dumps(value)

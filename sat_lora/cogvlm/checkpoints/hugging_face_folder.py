"""A folder of CogVLM or a successor as Hugging Face has it: safetensors files, sharded or one, and config.json.

Its parameters and sizes are given in SAT's names, so that it loads like a SAT folder of model-parallel size 1. What the
published code of that model has written into it, and reads from no config, is refused where it would be another: the
rotary base above all. `hugging_face_writer` writes such a folder, and refuses the same.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name, sat_name
from sat_lora.cogvlm.checkpoints.sat_folder import listing, read_object
from sat_lora.cogvlm.families import COGVLM, Family, hugging_face_family
from sat_lora.cogvlm.sizes import size_problems
from sat_lora.errors import CheckpointError
from sat_lora.files.foreign import stand_in
from sat_lora.printable import printable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
COMPUTED = "rotary_emb.inv_freq"
FREQUENCIES = "model.layers.{}.self_attn." + COMPUTED  # a buffer of every layer; most versions save it
ROTARY = "mixins.rotary.rotary_emb.inv_freq"  # SAT's one buffer for all layers
_ANGLES = (".rope.freqs_cos", ".rope.freqs_sin")

SIZES = {  # here: in config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "inner_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}
VIT_SIZES = {  # here: in config.json's vision_config
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "inner_hidden_size": "intermediate_size",
    "max_sequence_length": "num_positions",
    "layernorm_epsilon": "layer_norm_eps",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
}
_COMMON = {"model_parallel_size": 1, "hidden_dropout": 0.0, "attention_dropout": 0.0}
VIT_FIXED = {
    "vocab_size": 1,
    "layernorm_order": "post",
    "use_final_layernorm": False,
    "use_bias": True,
    "row_parallel_linear_final_bias": False,
    "pre_len": 1,
    "post_len": 0,
}


class HuggingFaceFolder:
    """A checkpoint in safetensors. Raises CheckpointError if it is incomplete, damaged, or of another model."""

    saved_ranks = 1

    def __init__(self, folder: str | Path):
        self.path = Path(folder)

    def config(self) -> dict:
        """Return the sizes in config.json, as SAT's model_config.json has them."""
        path = self.path / CONFIG
        content = read_object(path)
        vision = content.get("vision_config")
        vision = vision if isinstance(vision, dict) else {}
        problems = [f"no {name}" for name in SIZES.values() if name not in content]
        problems += [f"no vision_config.{name}" for name in (*VIT_SIZES.values(), "image_size") if name not in vision]
        for section, name, value in ((content, "hidden_act", "silu"), (vision, "hidden_act", "gelu")):
            if section.get(name, value) != value:
                problems.append(f"{name} {section[name]!r} where CogVLM has {value!r}")
        if not problems:
            problems = [*_not_counts(content, SIZES), *_not_counts(vision, {**VIT_SIZES, "image_size": "image_size"})]
        family = self.family
        problems += _other_networks(content, family)
        if problems:
            raise CheckpointError(f"{path} is not the config of a {family.title}: {'; '.join(problems)}")
        vit = {name: vision[hf_key] for name, hf_key in VIT_SIZES.items()}
        side = vision["image_size"]
        patches = (side // vision["patch_size"]) ** 2
        if vision["num_positions"] != patches + 1:
            raise CheckpointError(
                f"{path}: vision_config.num_positions is {vision['num_positions']}; an image of {side} pixels in "
                f"patches of {vision['patch_size']} has {patches}, and one for the class token"
            )
        tokens = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in content}
        config = {
            "model_class": family.model_class,
            **{name: content[hf_key] for name, hf_key in SIZES.items()},
            **_COMMON,
            "layernorm_order": "pre",
            "use_bias": False,
            "image_length": family.image_length((side, side), vision["patch_size"]),
            **_sizes_of_family(content, family),
            "eva_args": {**vit, **_COMMON, **VIT_FIXED, "image_size": [side, side]},
            **tokens,
        }
        problems = size_problems(config)
        if problems:
            raise CheckpointError(f"{path}, in the names of SAT: {'; '.join(problems)}")
        return config

    @cached_property
    def family(self) -> Family:
        """The family of the folder, by the names of its tensors; by its config where these cannot be read.

        Raises CheckpointError where they do not agree.
        """
        content = read_object(self.path / CONFIG) if (self.path / CONFIG).exists() else {}
        try:
            return hugging_face_family(content, self._names()) or COGVLM
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _names(self) -> set[str]:
        """Return the names of the tensors; none where the files that say so are missing or damaged."""
        try:
            if (self.path / INDEX).is_file():
                places = read_object(self.path / INDEX).get("weight_map")
                return set(places) if isinstance(places, dict) else set()
            return set(_map_tensors(self.path / SINGLE))
        except CheckpointError:
            return set()

    def check(self, state: dict[str, torch.Tensor]) -> None:
        """Do nothing: whether all files are there is seen where they are named."""

    def note(self) -> None:
        """Return None: its weights are whole."""

    def own_config(self) -> dict:
        """Return the content of config.json."""
        return read_object(self.path / CONFIG)

    def files(self) -> list[Path]:
        """Return the safetensors files, as the index names them, or the only one."""
        if not (self.path / INDEX).is_file():
            return [self.path / SINGLE]
        return [self.path / name for name in sorted(set(self._places().values()))]

    def map(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """Return every tensor, mapped, by its name in SAT; one that has none there keeps its own."""
        state = {sat_name(n) or n: tensor for n, tensor in self._tensors.items() if not n.endswith(COMPUTED)}
        return state if self._frequencies is None else {**state, ROTARY: self._frequencies}

    def own_name(self, name: str) -> str | None:
        """Return what a SAT parameter is called in the files; None for one that is computed."""
        return FREQUENCIES.format(0) if name == ROTARY and self._frequencies is not None else hf_name(name)

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, mapped, by its own name."""
        all_tensors: dict[str, torch.Tensor] = {}
        for file in self.files():
            tensors = _map_tensors(file)
            if (self.path / INDEX).is_file():
                lost = [name for name, place in self._places().items() if place == file.name and name not in tensors]
                if lost:
                    raise CheckpointError(
                        f"{file} lacks {_some(lost)}, which {self.path / INDEX} says are there; download again"
                    )
            all_tensors |= tensors
        return all_tensors

    @cached_property
    def _frequencies(self) -> torch.Tensor | None:
        """The rotary frequencies (head_dim / 2,) of which the layers have copies in the files, None where none has.

        A copy of zeros counts as none: it was never filled, as a model that is saved from the device "meta" leaves it.
        """
        copies = {name: t for name, t in self._tensors.items() if name.endswith(COMPUTED) and t.any()}
        for name, tensor in copies.items():
            if not has_base(tensor, self.family.rotary_base):
                raise CheckpointError(
                    f"{self.path}: {name} has other rotary frequencies than {self.family.title}, whose base is "
                    f"{self.family.rotary_base:g}; the folder is of another model"
                )
        return next(iter(copies.values()), None)

    def _places(self) -> dict[str, str]:
        """Return file names by parameter name, from the index; each file has to be there."""
        index = self.path / INDEX
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(f"{index}: expected an object `weight_map` from parameter names to file names")
        names = sorted(set(places.values()))
        foreign = [name for name in names if not name.endswith(".safetensors")]
        outside = [name for name in names if Path(name).name != name]
        missing = [name for name in names if not (self.path / name).is_file()]
        if foreign:
            raise CheckpointError(f"{index} names {_some(foreign)}; only .safetensors files belong there")
        if outside:
            raise CheckpointError(f"{index} names {_some(outside)}; its files have to lie beside it")
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(names) - len(missing)} of {len(names)} files are there: {index} names "
                f"{_some(missing)}, not there; download again; found: {listing(self.path)}"
            )
        return places


def _sizes_of_family(content: dict, family: Family) -> dict:
    """Return what a family has in SAT's model_config.json beside CogVLM's sizes."""
    sizes: dict = {}
    if family.groups_heads:
        sizes["num_multi_query_heads"] = content.get("num_multi_query_heads", family.key_value_heads)
    if not family.has_vision_experts:
        sizes["num_vision_layers"] = 0
    if family.has_cross_vision:
        width = content.get("cross_compute_hidden_size")
        heads = content["num_attention_heads"]
        sizes |= {
            "is_decoder": [True] * content["num_hidden_layers"],
            "cross_attn_hidden_size": content.get("cross_hidden_size"),
            "cross_hidden_size_per_attention_head": width // heads if type(width) is int else width,
            "cross_image_pix": content.get("cross_image_size"),
            "encoder_args": content.get("encoder_args", {}),
        }
    return sizes


def _other_networks(content: dict, family: Family) -> Iterator[str]:
    """Yield, as sentences, what config.json asks for and the family's code does not do."""
    rope = content.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    for name, value in (("rope_theta", content.get("rope_theta")), ("rope_theta", rope.get("rope_theta"))):
        if value is not None and value != family.rotary_base:
            yield f"{name} is {value!r}, and {family.title}'s code has {family.rotary_base:g}; it reads none"
    scaling = content.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if scaling:
        yield f"rope_scaling is {scaling!r}, and {family.title}'s code knows none"
    if family.has_cross_vision:
        names = ("cross_hidden_size", "cross_compute_hidden_size", "cross_image_size")
        yield from (f"no {name}" for name in names if name not in content)
        width = content.get("cross_compute_hidden_size")
        heads = content.get("num_attention_heads")
        if width != content.get("cross_hidden_size"):
            yield f"cross_compute_hidden_size is {width!r}, and the code wants it equal to cross_hidden_size"
        elif type(width) is int and type(heads) is int and heads > 0 and width % heads:
            yield f"cross_compute_hidden_size {width} does not divide by num_attention_heads {heads}"
    if content.get("tie_word_embeddings"):
        own = f"{family.title}'s head has weights of its own, which loading it would replace"
        yield f"tie_word_embeddings is true, and {own}"
    if content.get("quantization_config"):
        yield "its weights are quantised (quantization_config); give the folder of the full ones"


def is_computed(name: str) -> bool:
    """Return whether a parameter of that SAT name follows from the sizes, and a file may lack it: a second encoder's
    angles, of which some files have a copy for each block.
    """
    return name.endswith(_ANGLES)


def has_base(frequencies: torch.Tensor, base: float) -> bool:
    """Return whether rotary frequencies (head_dim / 2,) are those of that base, within their dtype's rounding."""
    exponents = torch.arange(frequencies.numel(), dtype=torch.float64) / max(1, frequencies.numel())
    tolerance = max(torch.finfo(frequencies.dtype).eps, 1e-5)  # some computed the powers in float32
    return torch.allclose(frequencies.double(), base**-exponents, rtol=tolerance, atol=1e-7)


def _map_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    instead = stand_in(file)
    if instead is not None:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {instead}")
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}  # views of the mapped file
    # safetensors 0.8 meets a dtype that torch or its own binding lacks with whatever comes first.
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}; download it again") from error


def _not_counts(section: dict, names: dict[str, str]) -> list[str]:
    """Return problems for the sizes of a section that are no whole numbers above 0, epsilons aside."""
    counts = {name: section[name] for name in names.values() if not name.endswith("_eps")}
    return [
        f"{name} is {str(value)[:60]!r}, wanted a whole number above 0"
        for name, value in counts.items()
        if type(value) is not int or value < 1
    ]


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

"""A CogVLM folder as Hugging Face has it: safetensors files, sharded or one, and config.json.

Its parameters and sizes are given in SAT's names, so that it loads like a SAT folder of model-parallel size 1.
"""

import json
import math
from pathlib import Path

import torch

from sat_lora.cogvlm.sat_folder import listing, read_object
from sat_lora.cogvlm.sizes import size_problems
from sat_lora.errors import CheckpointError
from sat_lora.foreign import printable, stand_in
from sat_lora.interop.hugging_face_names import hf_name, sat_name
from sat_lora.weight_files import Layout, make_safetensors_file

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_COMPUTED = "rotary_emb.inv_freq"  # frequencies that some versions saved, and every version computes

_SIZES = {  # here: in config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "inner_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}
_VIT_SIZES = {  # here: in config.json's vision_config
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
_VIT_FIXED = {
    "vocab_size": 1,
    "layernorm_order": "post",
    "use_final_layernorm": False,
    "row_parallel_linear_final_bias": False,
    "pre_len": 1,
    "post_len": 0,
}


class HuggingFaceFolder:
    """A CogVLM checkpoint in safetensors. CheckpointError: it is incomplete, damaged, or of another model."""

    saved_ranks = 1

    def __init__(self, folder: str | Path):
        self.path = Path(folder)

    def config(self) -> dict:
        """The sizes in config.json, as SAT's model_config.json has them."""
        path = self.path / CONFIG
        content = read_object(path)
        vision = content.get("vision_config")
        vision = vision if isinstance(vision, dict) else {}
        problems = [f"no {name}" for name in _SIZES.values() if name not in content]
        problems += [f"no vision_config.{name}" for name in (*_VIT_SIZES.values(), "image_size") if name not in vision]
        for section, name, wanted in ((content, "hidden_act", "silu"), (vision, "hidden_act", "gelu")):
            if section.get(name, wanted) != wanted:
                problems.append(f"{name} {section[name]!r} where CogVLM has {wanted!r}")
        if not problems:
            problems = [*_not_counts(content, _SIZES), *_not_counts(vision, {**_VIT_SIZES, "image_size": "image_size"})]
        if problems:
            raise CheckpointError(f"{path} is not the config of a CogVLM: {'; '.join(problems)}")
        vit = {name: vision[theirs] for name, theirs in _VIT_SIZES.items()}
        side = vision["image_size"]
        patches = (side // vision["patch_size"]) ** 2
        if vision["num_positions"] != patches + 1:
            raise CheckpointError(
                f"{path}: vision_config.num_positions is {vision['num_positions']}; an image of {side} pixels in "
                f"patches of {vision['patch_size']} has {patches}, and one for the class token"
            )
        tokens = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in content}
        config = {
            "model_class": "CogVLMModel",
            **{name: content[theirs] for name, theirs in _SIZES.items()},
            **_COMMON,
            "layernorm_order": "pre",
            "use_bias": False,
            "image_length": patches,
            "eva_args": {**vit, **_COMMON, **_VIT_FIXED, "image_size": [side, side]},
            **tokens,
        }
        problems = size_problems(config)
        if problems:
            raise CheckpointError(f"{path}, in the names of SAT: {'; '.join(problems)}")
        return config

    def check(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing: whether all files are there is seen where they are named."""

    def files(self) -> list[Path]:
        """The safetensors files, as the index names them, or the one there is."""
        if not (self.path / INDEX).is_file():
            return [self.path / SINGLE]
        return [self.path / name for name in sorted(set(self._places().values()))]

    def map(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """Every tensor, mapped, by its name in SAT; what has none there keeps its own."""
        state = {}
        for file in self.files():
            tensors = _map_tensors(file)
            if (self.path / INDEX).is_file():
                lost = [name for name, place in self._places().items() if place == file.name and name not in tensors]
                if lost:
                    raise CheckpointError(
                        f"{file} lacks {_some(lost)}, which {self.path / INDEX} says are there; download again"
                    )
            state |= {sat_name(name) or name: t for name, t in tensors.items() if not name.endswith(_COMPUTED)}
        return state

    def own_name(self, name: str) -> str | None:
        """What a SAT parameter is called in the files; None for one that is computed."""
        return hf_name(name)

    def _places(self) -> dict[str, str]:
        """Parameter name to file name, from the index; each file has to be there."""
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
                f"{index} names {_some(missing)}, not there; download again; found: {listing(self.path)}"
            )
        return places


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
    """The sizes in a section of config.json that are no whole numbers above 0; epsilons are looked at elsewhere."""
    wrong = {theirs: section[theirs] for theirs in names.values() if not theirs.endswith("_eps")}
    return [
        f"{name} is {str(value)[:60]!r}, wanted a whole number above 0"
        for name, value in wrong.items()
        if type(value) is not int or value < 1
    ]


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def make_hugging_face_weights(
    folder: str | Path, config: dict, layout: Layout, *, shard_bytes: int = 5 * 10**9
) -> dict[str, torch.Tensor]:
    """A Hugging Face folder of files of about `shard_bytes` each: its tensors by SAT's names, to be written to.

    config: of SAT. CheckpointError: a name has no counterpart. What is computed there is left out.
    """
    folder, shards, filled = Path(folder), [{}], 0
    stored = {name: one for name, one in layout.items() if not name.endswith(_COMPUTED)}
    foreign = [name for name in stored if hf_name(name) is None]
    if foreign:
        raise CheckpointError(f"{', '.join(foreign[:8])}: no such parameter in a CogVLM of Hugging Face")
    for name, (shape, dtype) in stored.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][hf_name(name)] = (shape, dtype)
        filled += size
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    tensors = {
        k: t for file, shard in zip(names, shards) for k, t in make_safetensors_file(folder / file, shard).items()
    }
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards) for name in shard}
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    dtype = next(iter(stored.values()))[1]
    content = {**hugging_face_config(config), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return {name: tensors[hf_name(name)] for name in stored}


def hugging_face_config(config: dict) -> dict:
    """config.json for the sizes in SAT's model_config.json: the reverse of `HuggingFaceFolder.config`."""
    vit = {"max_sequence_length": config["image_length"] + 1, "layernorm_epsilon": 1e-6, **config["eva_args"]}
    defaults = {"max_sequence_length": 2048, "layernorm_epsilon": 1e-5, **config}
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    vision = {theirs: vit[name] for name, theirs in _VIT_SIZES.items()}
    vision |= {"num_positions": config["image_length"] + 1, "image_size": vit["image_size"][0]}
    return {
        "architectures": ["CogVLMForCausalLM"],
        **{theirs: defaults[name] for name, theirs in _SIZES.items()},
        "hidden_act": "silu",
        "vision_config": {**vision, "hidden_act": "gelu", "dropout_prob": 0.0},
        **tokens,
    }

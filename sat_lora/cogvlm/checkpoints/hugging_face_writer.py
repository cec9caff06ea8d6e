"""A model written as Hugging Face has it: safetensors files, sharded or one, config.json and generation_config.json.

What the code of that model has written into it, and reads from no config, is refused where it would be another.
"""

import json
import math
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.hugging_face_folder import (
    COMPUTED,
    CONFIG,
    FREQUENCIES,
    INDEX,
    SINGLE,
    SIZES,
    VIT_FIXED,
    VIT_SIZES,
    has_base,
)
from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name
from sat_lora.cogvlm.families import family_of
from sat_lora.errors import CheckpointError
from sat_lora.files.weight_files import Layout, make_safetensors_file

GENERATION_CONFIG = "generation_config.json"
_FIXED = {
    "layernorm_order": "pre",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_final_layernorm": True,
    "is_gated_mlp": False,
    "is_rotary_emb": False,
    "num_experts": 1,
}
_SAME_VALUES = ("row_parallel_linear_final_bias",)  # where a bias is added that a single process adds once
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "inner_hidden_size")
_REQUIRED_OF_VIT = (*(name for name in _REQUIRED if name != "vocab_size"), "in_channels", "patch_size")


def refuse_inexpressible(config: dict, frequencies: torch.Tensor) -> None:
    """Raise CheckpointError with every reason why a SAT model is none of Hugging Face, whose code fixes much.

    config: of SAT. frequencies: its rotary buffer, (head_dim / 2,).
    """
    vit = config.get("eva_args", {})
    sizes = {"image_length": config, **dict.fromkeys(_REQUIRED, config)}
    problems = [f"no {name} in its config" for name, section in sizes.items() if name not in section]
    problems += [f"no eva_args.{name} in its config" for name in (*_REQUIRED_OF_VIT, "image_size") if name not in vit]
    if problems:
        raise CheckpointError(f"no Hugging Face folder can be written: {'; '.join(problems)}")
    family = family_of(config)
    base = config.get("rotary_base", family.rotary_base)
    if base != family.rotary_base or not has_base(frequencies, family.rotary_base):
        name = f"rotary base {base:g}" if base != family.rotary_base else "rotary frequencies of another base"
        problems.append(f"{name} where the code has {family.rotary_base:g}")
    for section, prefix, fixed in ((config, "", _FIXED), (vit, "eva_args.", VIT_FIXED)):
        for name, value in fixed.items():
            if name in section and section[name] != value and name not in _SAME_VALUES:
                problems.append(f"{prefix}{name} {section[name]!r} where the code has {value!r}")
    for section, prefix in ((config, ""), (vit, "eva_args.")):
        heads = section["num_attention_heads"]
        size = section.get("hidden_size_per_attention_head")
        if size is not None and size * heads != section["hidden_size"]:
            problems.append(f"{prefix}hidden_size_per_attention_head {size} where the code has hidden size / heads")
        few = section.get("num_multi_query_heads")
        if few not in (None, 0, heads) and not (family.groups_heads and section is config):
            problems.append(f"{prefix}num_multi_query_heads {few} where the code has one key for each of {heads} heads")
    height, width = vit["image_size"]
    if height != width or config["image_length"] != family.image_length(vit["image_size"], vit["patch_size"]):
        problems.append(
            f"images of {height} x {width} in {config['image_length']} patches of {vit['patch_size']} where the code "
            "has squares cut whole"
        )
    if problems:
        raise CheckpointError(
            f"the code of Hugging Face's {family.title} cannot run this model: {'; '.join(problems)}; it stays a "
            "SAT folder (leave out --to hf)"
        )


def make_hugging_face_weights(
    folder: str | Path,
    config: dict,
    layout: Layout,
    frequencies: torch.Tensor,
    *,
    own_config: dict | None = None,
    shard_bytes: int = 5 * 10**9,
) -> dict[str, torch.Tensor]:
    """Make a Hugging Face folder; return its tensors by SAT's names, to be written to.

    Its files are of about `shard_bytes` each. The rotary frequencies (head_dim / 2,), a single buffer in SAT, are
    written here, one copy a layer. config: of SAT. own_config: the content of a config.json whose entries are kept.
    Raises CheckpointError if a name has no counterpart, and as `refuse_inexpressible` does.
    """
    folder = Path(folder)
    filled = 0
    shards: list[Layout] = [{}]
    refuse_inexpressible(config, frequencies)
    stored = {name: entry for name, entry in layout.items() if not name.endswith(COMPUTED)}
    hf_names = {name: hf for name in stored if (hf := hf_name(name)) is not None}
    foreign = [name for name in stored if name not in hf_names]
    if foreign:
        title = family_of(config).title
        raise CheckpointError(f"{', '.join(foreign[:8])}: no such parameter in a {title} of Hugging Face")
    buffers = [FREQUENCIES.format(layer) for layer in range(config["num_layers"])]
    entries = {hf_names[name]: entry for name, entry in stored.items()}
    entries |= dict.fromkeys(buffers, (tuple(frequencies.shape), frequencies.dtype))
    for name, (shape, dtype) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (shape, dtype)
        filled += size
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    tensors = {
        k: t for file, shard in zip(names, shards) for k, t in make_safetensors_file(folder / file, shard).items()
    }
    for name in buffers:
        tensors[name].copy_(frequencies)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards) for name in shard}
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    dtype = str(next(iter(stored.values()))[1]).removeprefix("torch.")
    content = {**hugging_face_config(config), **(own_config or {}), "torch_dtype": dtype}
    if "dtype" in content:  # as newer versions of transformers call it
        content["dtype"] = dtype
    write_json(folder / CONFIG, content)
    write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **_tokens(content)})
    return {name: tensors[hf_names[name]] for name in stored}


def write_json(path: Path, content: dict) -> None:
    """Write a json file of a folder that is being made, and which nobody reads yet."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hugging_face_config(config: dict) -> dict:
    """Return the config.json for the sizes in SAT's model_config.json: the reverse of `HuggingFaceFolder.config`."""
    family = family_of(config)
    vit = {"layernorm_epsilon": 1e-6, **config["eva_args"]}
    vit["max_sequence_length"] = (vit["image_size"][0] // vit["patch_size"]) ** 2 + 1
    defaults = {"max_sequence_length": 2048, "layernorm_epsilon": 1e-5, **config}
    vision = {hf_key: vit[name] for name, hf_key in VIT_SIZES.items()}
    vision |= {"image_size": vit["image_size"][0]}
    template = family.templates.get(str(config.get("text_processor_version")))
    configuration, modeling = (Path(name).stem for name in family.code[:2])
    own: dict = {}
    if family.groups_heads:
        own["num_multi_query_heads"] = config["num_multi_query_heads"]
    if family.has_cross_vision:
        width = config["cross_hidden_size_per_attention_head"] * config["num_attention_heads"]
        own |= {
            "cross_hidden_size": config["cross_attn_hidden_size"],
            "cross_compute_hidden_size": width,
            "cross_image_size": config["cross_image_pix"],
            **({"encoder_args": config["encoder_args"]} if config.get("encoder_args") else {}),
        }
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "auto_map": {
            "AutoConfig": f"{configuration}.{family.config_class}",
            "AutoModelForCausalLM": f"{modeling}.{family.architecture}",
        },
        **{hf_key: defaults[name] for name, hf_key in SIZES.items()},
        **own,
        "hidden_act": "silu",
        "rope_theta": family.rotary_base,
        "tie_word_embeddings": False,
        "use_cache": True,
        **({} if template is None else {"template_version": template}),
        "vision_config": {**vision, "hidden_act": "gelu", "dropout_prob": 0.0},
        **_tokens(config),
    }


def _tokens(config: dict) -> dict:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}

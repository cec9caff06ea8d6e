"""CogVLM folders of any size, made on the spot."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sat_lora.cogvlm import build_cogvlm
from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name

LAYER_BYTES = 203_000_000  # of the config below in bfloat16, as are the rest below
OTHER_BYTES = 350_000_000


def config_of(gigabytes: float) -> dict:
    """Sizes of a CogVLM of half CogVLM-17B's width and at least `gigabytes` of 10^9 bytes in bfloat16."""
    return {
        "num_layers": max(1, -int(-(gigabytes * 1e9 - OTHER_BYTES) // LAYER_BYTES)),
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "vocab_size": 32000,
        "inner_hidden_size": 5504,
        "layernorm_order": "pre",
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 2048,
        "use_bias": False,
        "image_length": 256,
        "eva_args": {
            "num_layers": 2,
            "hidden_size": 896,
            "num_attention_heads": 16,
            "vocab_size": 1,
            "layernorm_order": "post",
            "max_sequence_length": 257,
            "inner_hidden_size": 3584,
            "use_final_layernorm": False,
            "layernorm_epsilon": 1e-6,
            "row_parallel_linear_final_bias": False,
            "image_size": [224, 224],
            "pre_len": 1,
            "post_len": 0,
            "in_channels": 3,
            "patch_size": 14,
        },
    }


def state_of(config: dict, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A whole state dict of these sizes: each element is its index, modulo 251, the rotary frequencies are real."""
    shapes = build_cogvlm(config, device="meta", dtype=dtype).state_dict()
    ramp = (torch.arange(max(t.numel() for t in shapes.values())) % 251).to(dtype)
    return {n: ramp[: t.numel()].view(t.shape).clone() if t.is_meta else t for n, t in shapes.items()}


def write_hugging_face(folder: Path, config: dict, state: dict[str, torch.Tensor], shards: int = 3) -> None:
    """The same weights in `shards` safetensors files with an index, or in a single file, and config.json."""
    folder.mkdir(parents=True)
    names = [name for name in state if hf_name(name)]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    places = {hf_name(name): files[number * len(files) // len(names)] for number, name in enumerate(names)}
    for file in files:
        save_file({hf_name(n): state[n].contiguous() for n in names if places[hf_name(n)] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    vit = config["eva_args"]
    content = {
        "architectures": ["CogVLMForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["inner_hidden_size"],
        "max_position_embeddings": config["max_sequence_length"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_layers"],
        "rms_norm_eps": config.get("layernorm_epsilon", 1e-5),
        "vocab_size": config["vocab_size"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vision_config": {
            "dropout_prob": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vit["hidden_size"],
            "image_size": vit["image_size"][0],
            "in_channels": vit["in_channels"],
            "intermediate_size": vit["inner_hidden_size"],
            "layer_norm_eps": vit["layernorm_epsilon"],
            "num_heads": vit["num_attention_heads"],
            "num_hidden_layers": vit["num_layers"],
            "num_positions": config["image_length"] + 1,
            "patch_size": vit["patch_size"],
        },
    }
    (folder / "config.json").write_text(json.dumps(content))

"""A tiny model of each family and batches for it, random and seeded."""

import functools
import json

import torch
from safetensors.torch import save_file

from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name
from sat_lora.cogvlm.checkpoints.hugging_face_writer import hugging_face_config
from sat_lora.cogvlm.families import published_config
from sat_lora.cogvlm.inputs.text import IGNORED, position_ids_for
from sat_lora.cogvlm.network.model import CogVLMModel, build_cogvlm
from tests.support.tiny import CONFIG, tiny_model

_WITH_CONVOLUTION = {
    **CONFIG,
    "num_multi_query_heads": 2,
    "image_length": 4,
    "eva_args": {**CONFIG["eva_args"], "image_size": [28, 28], "max_sequence_length": 17},
}
ENCODER = {
    "num_layers": 3, "num_layers_run": 2, "hidden_size": 32, "num_attention_heads": 4, "inner_hidden_size": 24,
    "patch_size": 7, "head_size": 5, "trained_side": 2,
}  # fmt: skip
CONFIGS = {
    "cogvlm": {**CONFIG, "model_class": "CogVLMModel"},
    "cogvlm2": {**_WITH_CONVOLUTION, "model_class": "CogVLM2Model"},
    "cogvlm2-video": {**_WITH_CONVOLUTION, "model_class": "CogVLM2VideoModel", "num_vision_layers": 0},
    "cogagent": {
        **CONFIG,
        "model_class": "CogAgentModel",
        "is_decoder": [True] * CONFIG["num_layers"],
        "cross_attn_hidden_size": 32,
        "cross_hidden_size_per_attention_head": 8,
        "cross_image_pix": 28,
        "encoder_args": ENCODER,
    },
}


@functools.cache
def published_model(name: str) -> CogVLMModel:
    """A published model, built without memory."""
    return build_cogvlm(published_config(name), device="meta", dtype=torch.bfloat16)


@functools.cache
def published_shapes(name: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """(the shape of each entry of a published model's state dict, how many parameters it has)."""
    model = published_model(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return shapes, sum(parameter.numel() for parameter in model.parameters())


TOKENS = dict(bos_token_id=1, eos_token_id=[2, 9], pad_token_id=0)


def family_model(name: str, dtype=torch.float32, seed=0, **settings) -> CogVLMModel:
    return tiny_model(dtype, seed, CONFIGS[name], **settings)


def reference_config(name: str) -> dict:
    """The config with every size of the second encoder."""
    config = CONFIGS[name]
    return {**config, "encoder_args": {"layernorm_epsilon": 1e-6, **config.get("encoder_args", {})}}


def family_batch(name: str, with_image=(True, False), seed=0, length=24, answer=4, dtype=torch.float32) -> dict:
    """One row per entry: BOS, as many images as it says, then words; the last are the answer."""
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(seed)
    patches = config["image_length"]
    rows = len(with_image)
    ids = torch.randint(1, 1000, (rows, length), generator=generator)
    embed = torch.zeros(rows, length, dtype=torch.long)
    vision, interior = embed.clone(), embed.clone()
    for row, count in enumerate(map(int, with_image)):
        for number in range(count):
            start = 1 + number * (patches + 3)  # a word between
            embed[row, start : start + patches + 2] = 1
            vision[row, start : start + patches + 1] = 1
            interior[row, start + 1 : start + patches + 1] = 1
    labels = torch.full_like(ids, IGNORED)
    labels[:, -answer:] = ids[:, -answer:]
    count = sum(map(int, with_image))
    batch = dict(
        input_ids=ids,
        position_ids=torch.stack([position_ids_for(row) for row in interior]),
        labels=labels,
        image_embed_mask=embed,
        vision_expert_mask=vision,
        images=torch.randn(count, 3, *config["eva_args"]["image_size"], generator=generator).to(dtype),
        broken=[],
    )
    if "cross_image_pix" in config:
        side = config["cross_image_pix"]
        batch["cross_images"] = torch.randn(count, 3, side, side, generator=generator).to(dtype)
    return batch


def batch_of_rank(name: str, rank: int, step: int = 0, *, with_images=(0,)) -> dict:
    """A rank's batch, of an image and a text on the ranks named in `with_images`; every other has texts alone, with
    another number of answer tokens, and as `collate` gives them: then there is no cross image.
    """
    if rank in with_images:
        return family_batch(name, (True, False), seed=step + 10 * rank)
    batch = family_batch(name, (False, False), seed=100 + step + 10 * rank, answer=2)
    return {key: value for key, value in batch.items() if key != "cross_images"}


def write_hugging_face(folder, name, config=None, content=None):
    """A folder with the names of a family's tensors, and the config.json of another, or one with changes."""
    folder.mkdir()
    state = family_model(name).state_dict()
    tensors = {hf_name(key): t.contiguous().clone() for key, t in state.items() if hf_name(key) is not None}
    save_file(tensors, folder / "model.safetensors")
    written = {**hugging_face_config({**CONFIGS[config or name], **TOKENS}), **(content or {})}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    return folder

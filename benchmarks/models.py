"""The CogVLMs that the benchmarks build, of several sizes, with random weights and batches for them."""

import torch

from benchmarks.interleaved import described_as_alone
from sat_lora._sat import BaseModel, mpu
from sat_lora.cogvlm import build_cogvlm
from sat_lora.training.steps.engine import set_up_deepspeed
from sat_lora.training.steps.step import to_device

# hidden, inner and layers of the language model and of the vision transformer, side of the image, words of text.
# `full` is CogVLM-17B, `quarter` and `large` have its widths; `thin` has its depth, so its step takes host time alone.
SIZES = {
    "tiny": dict(language=(64, 96, 1), vit=(32, 64, 1), image=28, words=8),
    "small": dict(language=(1024, 2752, 2), vit=(512, 4352, 4), image=224, words=40),
    "large": dict(language=(4096, 11008, 4), vit=(1792, 15360, 8), image=490, words=62),
    "quarter": dict(language=(4096, 11008, 8), vit=(1792, 15360, 16), image=490, words=62),
    "full": dict(language=(4096, 11008, 32), vit=(1792, 15360, 63), image=490, words=62),
    "thin": dict(language=(32, 32, 32), vit=(32, 32, 63), image=28, words=4),
}
PATCH = 14
WHOLE_VOCABULARY = ("large", "quarter", "full")


def config_of(size: str) -> dict:
    """The content of a model_config.json for one of SIZES; head sizes grow with the widths, up to CogVLM's."""
    language, vit, image = (SIZES[size][key] for key in ("language", "vit", "image"))
    patches = (image // PATCH) ** 2
    runtime = dict(layernorm_order="pre", use_bias=False, max_sequence_length=2048)
    vit_fixed = dict(layernorm_order="post", use_final_layernorm=False, layernorm_epsilon=1e-6, patch_size=PATCH)
    places = dict(pre_len=1, post_len=0, in_channels=3, image_size=[image, image], max_sequence_length=patches + 1)
    return {
        **_widths(*language, max(1, language[0] // 128)),
        **runtime,
        "vocab_size": 32000 if size in WHOLE_VOCABULARY else 1024,
        "image_length": patches,
        "eva_args": {**_widths(*vit, max(1, vit[0] // 112)), "vocab_size": 1, **vit_fixed, **places},
    }


def _widths(hidden: int, inner: int, layers: int, heads: int) -> dict:
    return dict(hidden_size=hidden, inner_hidden_size=inner, num_layers=layers, num_attention_heads=heads)


def batch_of(config: dict, words: int, device: torch.device, dtype: torch.dtype, samples: int = 1) -> dict:
    """Samples of the image's patches + 2 places, then `words` tokens of text, the last quarter the answer.

    They lie where a run would put them for a model on that device.
    """
    places = config["image_length"] + 2
    ids = torch.randint(3, config["vocab_size"], (samples, places + words))
    embed, vision, labels = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, -100)
    embed[:, :places] = 1
    vision[:, : places - 1] = 1
    labels[:, -answer_of(words) :] = ids[:, -answer_of(words) :]
    images = torch.randn(samples, 3, *config["eva_args"]["image_size"]).to(dtype)
    positions = torch.arange(ids.shape[1])[None].expand(samples, -1)
    inputs = dict(input_ids=ids, position_ids=positions, images=images)
    return to_device({**inputs, "image_embed_mask": embed, "vision_expert_mask": vision, "labels": labels}, device)


def answer_of(words: int) -> int:
    """How many of the tokens of text are the answer."""
    return max(1, words // 4)


def random_model(config: dict, dtype: torch.dtype, device: torch.device, *, checkpointing: bool = False) -> BaseModel:
    """A frozen CogVLM in training mode, made on the device itself; gradients flow down to its embeddings.

    Its matrices have unit gain and the norms behind the vision transformer's blocks are small, so that activations stay
    near one at any depth. RuntimeError: the model has a buffer whose values are not known.
    """
    model = build_cogvlm(
        config,
        dtype=dtype,
        device="meta",
        checkpoint_activations=checkpointing,
        vit_checkpoint_activations=checkpointing,
    )
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    unknown = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unknown:
        raise RuntimeError(f"buffers without values: {', '.join(unknown)}")
    model.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(0.2 if "vit_model" in name and "layernorm" in name else 1.0)
        model.mixins["eva"].vit_model.transformer.word_embeddings.weight.normal_()
    model.requires_grad_(False)
    let_gradients_through(model)
    return model.train()


def allow_checkpointing(device: torch.device) -> None:
    """On CUDA SAT checkpoints activations by DeepSpeed's function, which wants groups and a seeded tracker."""
    if device.type != "cuda":
        return
    import deepspeed

    with described_as_alone():
        set_up_deepspeed()
        deepspeed.checkpointing.configure(mpu, deepspeed_config={"train_micro_batch_size_per_gpu": 1})
        mpu.model_parallel_cuda_manual_seed(1)


def checkpoint_activations(model: BaseModel, wanted: bool) -> None:
    """Both towers recompute their layers in backward from now on, or do not."""
    for tower in (model, model.mixins["eva"].vit_model):
        tower.checkpointing.active = wanted


def forward_flops(config: dict, samples: int, words: int) -> float:
    """Floating-point operations that a forward pass needs: causal attention's half, the head on the answers alone."""
    vit, patches = config["eva_args"], config["image_length"]
    seq, hidden, inner = patches + 2 + words, config["hidden_size"], config["inner_hidden_size"]
    language = config["num_layers"] * (2 * seq * (4 * hidden**2 + 3 * hidden * inner) + 2 * seq**2 * hidden)
    width = vit["hidden_size"]
    tower = 4 * width**2 + 2 * width * vit["inner_hidden_size"]
    vision = vit["num_layers"] * (2 * (patches + 1) * tower + 4 * (patches + 1) ** 2 * width)
    projector = 2 * patches * (width * hidden + 3 * hidden * inner)
    return samples * (language + vision + projector + 2 * answer_of(words) * hidden * config["vocab_size"])


def let_gradients_through(model: BaseModel) -> None:
    """Gradients flow to the word embeddings of both towers although every weight is frozen.

    Without it a frozen model has no backward at all, and an adapted first layer needs no gradient of its input.
    """
    for tower in (model, model.mixins["eva"].vit_model):
        tower.transformer.word_embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())

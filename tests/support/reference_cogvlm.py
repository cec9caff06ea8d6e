"""CogVLM's forward pass written down a second time, plainly, from its arithmetic: the oracle for the SAT model.

It takes a state dict with the published names and runs in float64, token by token where the expert depends on it.
"""

import torch
from torch.nn import functional as F


def reference_logits(state: dict, config: dict, batch: dict) -> torch.Tensor:
    """(batch, seq, vocabulary) logits."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = w["transformer.word_embeddings.weight"][batch["input_ids"]]
    places = batch["image_embed_mask"].bool()
    if places.any():
        x = x.clone()
        x[places] = _image_tokens(w, config, batch["images"].double()).flatten(0, 1)
    vision = batch["vision_expert_mask"].bool()
    heads, size = config["num_attention_heads"], config["hidden_size"]
    for i in range(config["num_layers"]):
        layer = f"transformer.layers.{i}."
        y = _rms_norm(x, w[layer + "input_layernorm.weight"])
        qkv = _either(
            vision,
            y @ w[f"mixins.rotary.vision_query_key_value_list.{i}.weight"].T,
            y @ w[layer + "attention.query_key_value.weight"].T,
        )
        q, k, v = (_heads(part, heads) for part in qkv.split(size, -1))
        q, k = (_turn(part, batch["position_ids"], w["mixins.rotary.rotary_emb.inv_freq"]) for part in (q, k))
        context = _softmax_attention(q, k, v, causal=True)
        x = x + _either(
            vision,
            context @ w[f"mixins.rotary.vision_dense_list.{i}.weight"].T,
            context @ w[layer + "attention.dense.weight"].T,
        )
        y = _rms_norm(x, w[layer + "post_attention_layernorm.weight"])
        mlp = "mixins.mlp."
        x = x + _either(
            vision,
            _gated(
                y,
                w[f"{mlp}vision_gate_proj.{i}.weight"],
                w[f"{mlp}vision_dense_h_to_4h_list.{i}.weight"],
                w[f"{mlp}vision_dense_4h_to_h_list.{i}.weight"],
            ),
            _gated(
                y,
                w[f"{mlp}gate_proj.{i}.weight"],
                w[layer + "mlp.dense_h_to_4h.weight"],
                w[layer + "mlp.dense_4h_to_h.weight"],
            ),
        )
    return _rms_norm(x, w["transformer.final_layernorm.weight"]) @ w["mixins.lm.lm_head.weight"].T


def _image_tokens(w, config, images):
    eva = "mixins.eva."
    vit = eva + "vit_model."
    args = config["eva_args"]
    x = F.conv2d(
        images,
        w[vit + "mixins.patch_embedding.proj.weight"],
        w[vit + "mixins.patch_embedding.proj.bias"],
        stride=args["patch_size"],
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w[vit + "transformer.word_embeddings.weight"].expand(len(x), 1, -1), x], 1)
    x = x + w[vit + "transformer.position_embeddings.weight"]
    for j in range(args["num_layers"]):
        layer = f"{vit}transformer.layers.{j}."

        def linear(y, name, layer=layer):
            return y @ w[f"{layer}{name}.weight"].T + w[f"{layer}{name}.bias"]

        def norm(y, name, layer=layer):
            return F.layer_norm(
                y, y.shape[-1:], w[f"{layer}{name}.weight"], w[f"{layer}{name}.bias"], args["layernorm_epsilon"]
            )

        q, k, v = (_heads(p, args["num_attention_heads"]) for p in linear(x, "attention.query_key_value").chunk(3, -1))
        x = x + norm(linear(_softmax_attention(q, k, v, causal=False), "attention.dense"), "input_layernorm")
        x = x + norm(linear(F.gelu(linear(x, "mlp.dense_h_to_4h")), "mlp.dense_4h_to_h"), "post_attention_layernorm")
    p = eva + "linear_proj."
    y = x[:, 1:] @ w[p + "linear_proj.weight"].T
    y = F.gelu(F.layer_norm(y, y.shape[-1:], w[p + "norm1.weight"], w[p + "norm1.bias"]))
    y = _gated(y, w[p + "gate_proj.weight"], w[p + "dense_h_to_4h.weight"], w[p + "dense_4h_to_h.weight"])
    ends = [w[eva + end].expand(len(y), -1, -1) for end in ("boi", "eoi")]
    return torch.cat([ends[0], y, ends[1]], 1)


def _rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _gated(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _either(mask, yes, no):
    return torch.where(mask[..., None], yes, no)


def _heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _turn(x, positions, inv_freq):
    half = x.shape[-1] // 2
    rotated = torch.empty_like(x)
    angle = positions[:, None, :, None] * inv_freq
    rotated[..., :half] = x[..., :half] * angle.cos() - x[..., half:] * angle.sin()
    rotated[..., half:] = x[..., half:] * angle.cos() + x[..., :half] * angle.sin()
    return rotated


def _softmax_attention(q, k, v, causal):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

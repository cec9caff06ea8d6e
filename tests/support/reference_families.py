"""The forward passes of CogVLM2, CogVLM2-Video and CogAgent written down a second time, plainly, from their arithmetic.

The oracle for the SAT model beside `reference_cogvlm`, and independent of it where they differ: it takes a state dict
with the published names and runs in float64, row by row and, where it matters, token by token.
"""

import math

import torch
from torch.nn import functional as F


def family_logits(state: dict, config: dict, batch: dict) -> torch.Tensor:
    """(batch, seq, vocabulary) logits of a model of any family."""
    w = {name: tensor.double() for name, tensor in state.items()}
    rows = []
    used = 0
    for row in range(len(batch["input_ids"])):
        places = int(batch["image_embed_mask"][row].sum())
        count = places // (config["image_length"] + 2)
        one = {key: batch[key][row] for key in ("input_ids", "position_ids", "image_embed_mask", "vision_expert_mask")}
        images = batch["images"][used : used + count].double()
        cross = batch["cross_images"][used : used + count].double() if "cross_images" in batch else None
        rows.append(_row_logits(w, config, one, images, cross))
        used += count
    return torch.stack(rows)


def _row_logits(w, config, row, images, cross_images):
    x = w["transformer.word_embeddings.weight"][row["input_ids"]]
    if len(images):
        x = x.clone()
        x[row["image_embed_mask"].bool()] = _image_tokens(w, config, images).flatten(0, 1)
    has_cross = any(".cross_attention." in name for name in w)
    seen = _encoded(w, config, cross_images)[0] if has_cross and len(images) else None
    for i in range(config["num_layers"]):
        layer = f"transformer.layers.{i}."
        x = x + _attention(w, config, row, i, _rms(x, w[layer + "input_layernorm.weight"]))
        if seen is not None:
            x = x + _cross(w, config, i, _rms(x, w[layer + "post_cross_attention_layernorm.weight"]), seen)
        x = x + _mlp(w, row, i, _rms(x, w[layer + "post_attention_layernorm.weight"]))
    return _rms(x, w["transformer.final_layernorm.weight"]) @ w["mixins.lm.lm_head.weight"].T


def _experts(w, row, language, vision, x, bias=None):
    """Each token through the matrix that its mask names; vision: None where there is no such expert."""
    if vision not in w:
        return x @ w[language].T
    outputs = []
    for token, is_vision in zip(x, row["vision_expert_mask"].tolist()):
        y = w[vision if is_vision else language] @ token
        outputs.append(y + w[bias] if is_vision and bias in w else y)
    return torch.stack(outputs)


def _attention(w, config, row, i, x):
    heads = config["num_attention_heads"]
    shared = config.get("num_multi_query_heads") or heads
    size = config["hidden_size"] // heads
    vision = f"mixins.rotary.vision_query_key_value_list.{i}."
    mixed = _experts(
        w, row, f"transformer.layers.{i}.attention.query_key_value.weight", vision + "weight", x, vision + "bias"
    )
    causal = torch.full((len(x), len(x)), -math.inf, dtype=x.dtype).triu(1)
    outputs = []
    for head in range(heads):
        own = head // (heads // shared)
        starts = (head * size, (heads + own) * size, (heads + shared + own) * size)
        query, key, value = (mixed[:, start : start + size] for start in starts)
        query, key = (
            _turned(part, row["position_ids"], w["mixins.rotary.rotary_emb.inv_freq"]) for part in (query, key)
        )
        scores = query @ key.T / math.sqrt(size) + causal
        outputs.append(scores.softmax(-1) @ value)
    context = torch.cat(outputs, -1)
    dense = f"transformer.layers.{i}.attention.dense.weight"
    return _experts(w, row, dense, f"mixins.rotary.vision_dense_list.{i}.weight", context)


def _mlp(w, row, i, x):
    def through(x, part, language, vision):
        return _experts(w, part, language, vision, x)

    inner = F.silu(through(x, row, f"mixins.mlp.gate_proj.{i}.weight", f"mixins.mlp.vision_gate_proj.{i}.weight"))
    mlp = f"transformer.layers.{i}.mlp."
    up = through(x, row, mlp + "dense_h_to_4h.weight", f"mixins.mlp.vision_dense_h_to_4h_list.{i}.weight")
    return through(inner * up, row, mlp + "dense_4h_to_h.weight", f"mixins.mlp.vision_dense_4h_to_h_list.{i}.weight")


def _cross(w, config, i, x, seen):
    """What every token sees of the second encoder's (places, width): no rotation, no mask, no bias."""
    name = f"transformer.layers.{i}.cross_attention."
    key, value = (seen @ w[name + "key_value.weight"].T).chunk(2, -1)
    query = x @ w[name + "query.weight"].T
    size = config["cross_hidden_size_per_attention_head"]
    parts = zip(query.split(size, -1), key.split(size, -1), value.split(size, -1))
    context = torch.cat([(q @ k.T / math.sqrt(size)).softmax(-1) @ v for q, k, v in parts], -1)
    return context @ w[name + "dense.weight"].T


def _encoded(w, config, images):
    """(images, places, width) of the second encoder."""
    sizes = config["encoder_args"]
    vit = "mixins.encoder.vit.model."
    x = F.conv2d(
        images, w[vit + "patch_embed.proj.weight"], w[vit + "patch_embed.proj.bias"], stride=sizes["patch_size"]
    )
    side = x.shape[-1]
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w[vit + "cls_token"].expand(len(x), 1, -1), x], 1) + w[vit + "pos_embed"]

    def norm(y, name):
        weight, bias = (w[f"{name}.{leaf}"] for leaf in ("weight", "bias"))
        return F.layer_norm(y, y.shape[-1:], weight, bias, sizes["layernorm_epsilon"])

    def linear(y, name):
        return y @ w[name + ".weight"].T + w[name + ".bias"]

    for b in range(sizes["num_layers_run"]):
        block = f"{vit}blocks.{b}."
        y = norm(x, block + "norm1")
        query = y @ w[block + "attn.q_proj.weight"].T + w[block + "attn.q_bias"]
        key = y @ w[block + "attn.k_proj.weight"].T
        value = y @ w[block + "attn.v_proj.weight"].T + w[block + "attn.v_bias"]
        size = query.shape[-1] // sizes["num_attention_heads"]
        outputs = []
        for q, k, v in zip(query.split(size, -1), key.split(size, -1), value.split(size, -1)):
            q, k = (_turned_in_plane(part, side, sizes["trained_side"]) for part in (q, k))
            outputs.append((q @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v)
        y = norm(torch.cat(outputs, -1), block + "attn.inner_attn_ln")
        x = x + linear(y, block + "attn.proj")
        y = norm(x, block + "norm2")
        y = norm(F.silu(linear(y, block + "mlp.w1")) * linear(y, block + "mlp.w2"), block + "mlp.ffn_ln")
        x = x + linear(y, block + "mlp.w3")
    return x[:, 1:] + w["mixins.encoder.pos_embed"]


def _turned_in_plane(x, side, trained_side):
    """x (images, 1 + side * side, head_dim) with the patches turned: by row, then by column, in pairs of channels."""
    half = x.shape[-1] // 2
    turned = x.clone()
    for place in range(side * side):
        for first, coordinate in ((0, place // side), (half, place % side)):
            for pair in range(half // 2):
                angle = trained_side * coordinate / side * 10000.0 ** (-2 * pair / half)
                a, b = x[:, 1 + place, first + 2 * pair], x[:, 1 + place, first + 2 * pair + 1]
                turned[:, 1 + place, first + 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                turned[:, 1 + place, first + 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def _image_tokens(w, config, images):
    """(images, image_length + 2, hidden)."""
    eva = "mixins.eva."
    vit = eva + "vit_model."
    args = config["eva_args"]
    proj = vit + "mixins.patch_embedding.proj."
    x = F.conv2d(images, w[proj + "weight"], w[proj + "bias"], stride=args["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([w[vit + "transformer.word_embeddings.weight"].expand(len(x), 1, -1), x], 1)
    x = x + w[vit + "transformer.position_embeddings.weight"]
    for j in range(args["num_layers"]):
        layer = f"{vit}transformer.layers.{j}."

        def linear(y, name, layer=layer):
            return y @ w[f"{layer}{name}.weight"].T + w[f"{layer}{name}.bias"]

        def norm(y, name, layer=layer):
            weight, bias = (w[f"{layer}{name}.{leaf}"] for leaf in ("weight", "bias"))
            return F.layer_norm(y, y.shape[-1:], weight, bias, args["layernorm_epsilon"])

        size = args["hidden_size"] // args["num_attention_heads"]
        parts = [part.split(size, -1) for part in linear(x, "attention.query_key_value").chunk(3, -1)]
        attended = [(q @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v for q, k, v in zip(*parts)]
        x = x + norm(linear(torch.cat(attended, -1), "attention.dense"), "input_layernorm")
        x = x + norm(linear(F.gelu(linear(x, "mlp.dense_h_to_4h")), "mlp.dense_4h_to_h"), "post_attention_layernorm")
    x = x[:, 1:]
    if eva + "pos_embed" in w:
        x = x + w[eva + "pos_embed"]
    if eva + "conv.weight" in w:
        side = math.isqrt(x.shape[1])
        places = []
        for row in range(side // 2):
            for column in range(side // 2):
                y = w[eva + "conv.bias"].expand(len(x), -1)
                for down in (0, 1):
                    for right in (0, 1):
                        patch = x[:, (2 * row + down) * side + 2 * column + right]
                        y = y + patch @ w[eva + "conv.weight"][:, :, down, right].T
                places.append(y)
        x = torch.stack(places, 1)
    p = eva + "linear_proj."
    y = x @ w[p + "linear_proj.weight"].T
    y = F.gelu(F.layer_norm(y, y.shape[-1:], w[p + "norm1.weight"], w[p + "norm1.bias"]))
    y = F.silu(y @ w[p + "gate_proj.weight"].T) * (y @ w[p + "dense_h_to_4h.weight"].T)
    y = y @ w[p + "dense_4h_to_h.weight"].T
    ends = [w[eva + end].expand(len(y), -1, -1) for end in ("boi", "eoi")]
    return torch.cat([ends[0], y, ends[1]], 1)


def _rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _turned(x, positions, inv_freq):
    """x (seq, head_dim) with the first half turned against the second."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * inv_freq
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

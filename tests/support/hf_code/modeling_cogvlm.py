"""CogVLM by the names, buffers and token types of its Hugging Face version: nothing of it knows SAT.

Built from config.json alone. The rotary base is 10000 whatever a config says, and its frequencies are a buffer of each
layer that lies in the files, as in the published code: where the files lack it, it stays what the allocator left there.
"""

import torch
from torch import nn
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel

from .configuration_cogvlm import CogVLMConfig


class Rotary(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, size, 2) / size))

    def forward(self, x, positions):
        """(batch, heads, seq, size), turned half against half."""
        angles = positions[:, None, :, None].to(self.inv_freq) * self.inv_freq
        cos, sin = (torch.cat([part, part], -1).to(x) for part in (angles.cos(), angles.sin()))
        left, right = x.split(x.shape[-1] // 2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class GatedMlp(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertMlp(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.language_mlp, self.vision_mlp = GatedMlp(size, inner), GatedMlp(size, inner)

    def forward(self, x, is_vision):
        return torch.where(is_vision[..., None], self.vision_mlp(x), self.language_mlp(x))


class ExpertAttention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads, self.rotary_emb = heads, Rotary(size // heads)
        for expert in ("vision", "language"):
            setattr(self, f"{expert}_expert_query_key_value", nn.Linear(size, 3 * size, bias=False))
            setattr(self, f"{expert}_expert_dense", nn.Linear(size, size, bias=False))

    def forward(self, x, is_vision, positions):
        chosen = is_vision[..., None]
        mixed = torch.where(chosen, self.vision_expert_query_key_value(x), self.language_expert_query_key_value(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed.chunk(3, -1))
        y = attend(self.rotary_emb(q, positions), self.rotary_emb(k, positions), v, causal=True)
        return torch.where(chosen, self.vision_expert_dense(y), self.language_expert_dense(y))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.self_attn = ExpertAttention(size, config.num_attention_heads)
        self.mlp = ExpertMlp(size, config.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = (RmsNorm(size, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, is_vision, positions):
        x = x + self.self_attn(self.input_layernorm(x), is_vision, positions)
        return x + self.mlp(self.post_attention_layernorm(x), is_vision)


class PatchEmbedding(nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        size, patch = sizes["hidden_size"], sizes["patch_size"]
        self.proj = nn.Conv2d(sizes["in_channels"], size, patch, patch)
        self.cls_embedding = nn.Parameter(torch.zeros(1, size))
        self.position_embedding = nn.Embedding(sizes["num_positions"], size)

    def forward(self, images):
        patches = self.proj(images).flatten(2).transpose(1, 2)
        first = self.cls_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class VisionAttention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads, self.query_key_value, self.dense = heads, nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        parts = self.query_key_value(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.dense(attend(q, k, v, causal=False))


class VisionMlp(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        size, eps = sizes["hidden_size"], sizes["layer_norm_eps"]
        self.attention = VisionAttention(size, sizes["num_heads"])
        self.mlp = VisionMlp(size, sizes["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(size, eps) for _ in range(2))

    def forward(self, x):
        x = x + self.input_layernorm(self.attention(x))
        return x + self.post_attention_layernorm(self.mlp(x))


class Projector(nn.Module):
    def __init__(self, vit_size: int, size: int, inner: int):
        super().__init__()
        self.linear_proj, self.norm1 = nn.Linear(vit_size, size, bias=False), nn.LayerNorm(size)
        self.gate_proj, self.dense_h_to_4h = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.dense_4h_to_h = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        x = gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Vision(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = config.vision_config
        self.patch_embedding = PatchEmbedding(sizes)
        self.transformer = Layers(VisionLayer(sizes) for _ in range(sizes["num_hidden_layers"]))
        self.linear_proj = Projector(sizes["hidden_size"], config.hidden_size, config.intermediate_size)
        self.boi, self.eoi = (nn.Parameter(torch.zeros(1, 1, config.hidden_size)) for _ in range(2))

    def forward(self, images):
        x = self.patch_embedding(images)
        for layer in self.transformer.layers:
            x = layer(x)
        x = self.linear_proj(x[:, 1:])
        return torch.cat([self.boi.expand(len(x), -1, -1), x, self.eoi.expand(len(x), -1, -1)], 1)


class Network(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = Vision(config)


class CogVLMForCausalLM(PreTrainedModel):
    config_class = CogVLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Network(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: what the files lack shall be seen."""

    def forward(self, input_ids, token_type_ids, images):
        """(batch, seq, vocabulary) logits; token_type_ids: 1 on the places of an image, its two ends among them."""
        of_image = token_type_ids.bool()
        follows = torch.cat([of_image[:, 1:], torch.zeros_like(of_image[:, :1])], 1)
        precedes = torch.cat([torch.zeros_like(of_image[:, :1]), of_image[:, :-1]], 1)
        is_patch = of_image & follows & precedes
        repeats = is_patch & torch.cat([torch.zeros_like(is_patch[:, :1]), is_patch[:, :-1]], 1)
        positions = (~repeats).long().cumsum(1) - 1
        x = self.model.embed_tokens(input_ids)
        if of_image.any():
            x = x.clone()
            x[of_image] = self.model.vision(images).flatten(0, 1)
        for layer in self.model.layers:
            x = layer(x, of_image & follows, positions)
        return self.lm_head(self.model.norm(x))


def attend(q, k, v, *, causal: bool):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

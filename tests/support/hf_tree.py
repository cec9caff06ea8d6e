"""Hugging Face's CogVLM as a tree of plain modules with its names; its forward pass calls each of them."""

import torch
from torch import nn
from torch.nn import functional as F

from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name
from tests.support.reference_cogvlm import _either, _heads, _rms_norm, _softmax_attention, _turn


class HuggingFaceTree(nn.Module):
    """Built from the state dict of a SAT model; `logits(batch)` calls every module, so that adapters take part."""

    def __init__(self, state: dict, config: dict):
        super().__init__()
        self.sizes, self.inv_freq = config, state["mixins.rotary.rotary_emb.inv_freq"].double()
        parameters = {hf_name(name): tensor for name, tensor in state.items() if hf_name(name)}
        for name in parameters:
            module, _, leaf = name.rpartition(".")
            if leaf in ("weight", "bias"):
                if leaf == "weight":
                    self._place(module, self._build(module, parameters))
            else:
                self._parent(module).register_parameter(leaf, nn.Parameter(parameters[name].clone()))

    def _build(self, module: str, parameters: dict) -> nn.Module:
        weight, bias = parameters[f"{module}.weight"], parameters.get(f"{module}.bias")
        if module.endswith(("embed_tokens", "position_embedding")):
            built = nn.Embedding(*weight.shape)
        elif module.endswith("patch_embedding.proj"):
            size = self.sizes["eva_args"]["patch_size"]
            built = nn.Conv2d(weight.shape[1], weight.shape[0], size, size)
        elif weight.dim() == 1:
            eps = self.sizes["eva_args"]["layernorm_epsilon"] if ".transformer." in module else 1e-5
            built = RMSNorm(len(weight)) if bias is None else nn.LayerNorm(len(weight), eps)
        else:
            built = nn.Linear(*reversed(weight.shape), bias=bias is not None)
        built = built.to(weight.dtype)
        built.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return built

    def _parent(self, path: str) -> nn.Module:
        module = self
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        return module

    def _place(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        self._parent(parent).add_module(leaf, module)

    def forward(self, batch: dict) -> torch.Tensor:
        """(batch, seq, vocabulary) logits."""
        x = self.model.embed_tokens(batch["input_ids"])
        places = batch["image_embed_mask"].bool()
        if places.any():
            x = x.clone()
            x[places] = self._image_tokens(batch["images"].to(x.dtype)).flatten(0, 1)
        vision, heads = batch["vision_expert_mask"].bool(), self.sizes["num_attention_heads"]
        for layer in self.model.layers.children():
            y, attention, mlp = layer.input_layernorm(x), layer.self_attn, layer.mlp
            qkv = _either(
                vision, attention.vision_expert_query_key_value(y), attention.language_expert_query_key_value(y)
            )
            q, k, v = (_heads(part, heads) for part in qkv.chunk(3, -1))
            q, k = (_turn(part, batch["position_ids"], self.inv_freq.to(x.dtype)) for part in (q, k))
            y = _softmax_attention(q, k, v, causal=True)
            x = x + _either(vision, attention.vision_expert_dense(y), attention.language_expert_dense(y))
            y = layer.post_attention_layernorm(x)
            experts = [_gated_by(y, e.gate_proj, e.up_proj, e.down_proj) for e in (mlp.vision_mlp, mlp.language_mlp)]
            x = x + _either(vision, *experts)
        return self.lm_head(self.model.norm(x))

    def _image_tokens(self, images: torch.Tensor) -> torch.Tensor:
        eye, heads = self.model.vision, self.sizes["eva_args"]["num_attention_heads"]
        patches = eye.patch_embedding
        x = patches.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([patches.cls_embedding.expand(len(x), 1, -1), x], 1) + patches.position_embedding.weight
        for layer in eye.transformer.layers.children():
            q, k, v = (_heads(part, heads) for part in layer.attention.query_key_value(x).chunk(3, -1))
            y = layer.attention.dense(_softmax_attention(q, k, v, causal=False))
            x = x + layer.input_layernorm(y)
            x = x + layer.post_attention_layernorm(layer.mlp.fc2(F.gelu(layer.mlp.fc1(x))))
        p = eye.linear_proj
        y = _gated_by(F.gelu(p.norm1(p.linear_proj(x[:, 1:]))), p.gate_proj, p.dense_h_to_4h, p.dense_4h_to_h)
        return torch.cat([eye.boi.expand(len(y), -1, -1), y, eye.eoi.expand(len(y), -1, -1)], 1)


def _gated_by(x, gate, up, down):
    return down(F.silu(gate(x)) * up(x))


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x):
        return _rms_norm(x, self.weight)

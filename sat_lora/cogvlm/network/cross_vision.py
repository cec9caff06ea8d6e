"""CogAgent's second eye: an EVA2-CLIP-L vision encoder of large images, at which every layer looks by cross-attention.

Parameter names and shapes follow the published SAT checkpoints (mixin `encoder`). Its last block, its norm and its head
are in the files and never run. q, k and v are modules that are called, so that whatever hooks into a layer is reached.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sat_lora._sat import BaseMixin, non_conflict
from sat_lora.cogvlm.network.attention import FULL, attend
from sat_lora.cogvlm.network.fused import silu_mul
from sat_lora.cogvlm.network.key_value_cache import KeyValueCache
from sat_lora.cogvlm.network.recompute import recompute_layer


class PlaneRotary(nn.Module):
    """Rotary embedding by row and column: the first half of a head's channels turns by the row, the second by the
    column.

    Neighbouring channels form pairs, unlike in the language model. Places count as if the side had `trained_side` of
    them. The buffers are computed, and in the files under the name of every block.
    """

    def __init__(self, head_dim: int, side: int, trained_side: int):
        super().__init__()
        half = head_dim // 2
        frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
        places = torch.arange(side, dtype=torch.float32) / side * trained_side
        line = (places[:, None] * frequencies).repeat_interleave(2, dim=1)  # (side, head_dim / 2)
        rows = line[:, None].expand(-1, side, -1)
        columns = line[None].expand(side, -1, -1)
        angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (places, head_dim)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (images, heads, places, head_dim) turned."""
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class EncoderAttention(nn.Module):
    """Attention of all places to all; queries and values have a bias, keys none, and the class token turns by nothing.

    A norm stands before the output projection.
    """

    def __init__(self, width: int, heads: int, epsilon: float, rope: PlaneRotary):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.rope = rope
        self.inner_attn_ln = nn.LayerNorm(width, eps=epsilon)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the attention (images, 1 + places, width) of x of that shape."""
        query = self.q_proj(x) + self.q_bias
        key = self.k_proj(x)
        value = self.v_proj(x) + self.v_bias
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        query = self._turned(query)  # every module is called in every step: ZeRO-3 follows them on all ranks
        key = self._turned(key)
        if len(x) == 0:
            context = query + key + value  # nothing, and each weight gets its zero gradient
        else:
            context = attend(query, key, value, None, FULL)
        return self.proj(self.inner_attn_ln(context.transpose(1, 2).flatten(2)))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :, :1], self.rope(x[:, :, 1:])], dim=2)


class EncoderMlp(nn.Module):
    """The gated MLP w3(LayerNorm(SiLU(w1 x) * w2 x))."""

    def __init__(self, width: int, inner: int, epsilon: float):
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=epsilon)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., width) of x (..., width)."""
        return self.w3(self.ffn_ln(silu_mul(self.w1(x), self.w2(x))))


class EncoderBlock(nn.Module):
    """One block, each branch behind its norm."""

    def __init__(self, width: int, heads: int, inner: int, epsilon: float, rope: PlaneRotary):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attn = EncoderAttention(width, heads, epsilon, rope)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = EncoderMlp(width, inner, epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output (images, 1 + places, width) for x of that shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """A convolution whose kernel is the patch."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the patches (images, places, width) of images (images, channels, height, width), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class EncoderViT(nn.Module):
    """The vision transformer. sizes: see `families.ENCODER`. side: of the square images, in pixels."""

    def __init__(self, sizes: dict[str, Any], side: int):
        super().__init__()
        width = sizes["hidden_size"]
        heads = sizes["num_attention_heads"]
        epsilon = sizes["layernorm_epsilon"]
        grid = side // sizes["patch_size"]
        self.layers_run = sizes["num_layers_run"]
        self.patch_embed = PatchEmbedding(sizes["in_channels"], width, sizes["patch_size"])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + 1, width))
        self.rope = PlaneRotary(width // heads, grid, sizes["trained_side"])
        self.blocks = nn.ModuleList(
            EncoderBlock(width, heads, sizes["inner_hidden_size"], epsilon, self.rope)
            for _ in range(sizes["num_layers"])
        )
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.head = nn.Linear(width, sizes["head_size"])
        for module in (*self.blocks[self.layers_run :], self.norm, self.head):
            module.never_runs = True  # asked by `targets.own_modules`: nothing in there is adapted or trained

    def forward(self, images: torch.Tensor, run_block: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the patches (images, places, width) of images; each block runs as `run_block` has it, by its number.

        There is no norm at the end.
        """
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for number in range(self.layers_run):
            x = run_block(number, x)
        return x[:, 1:]


class _Holder(nn.Module):
    """What the published names have between the mixin and the vision transformer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> torch.Tensor:
        """Return what the vision transformer gives."""
        return self.model(*args)


class CrossVision(BaseMixin):
    """The mixin that gives each layer the second encoder's view of its row's image, by cross-attention.

    A row without an image gets zeros from it. The encoder runs in every step of training, on no images if need be, and
    once per generation, whose cache then holds keys and values of every layer.
    """

    def __init__(self, sizes: dict[str, Any], side: int, checkpoint_activations: bool):
        super().__init__()
        grid = side // sizes["patch_size"]
        self.pos_embed = nn.Parameter(torch.zeros(grid**2, sizes["hidden_size"]))
        self.vit = _Holder(EncoderViT(sizes, side))
        self.image_size = (side, side)
        self.checkpoint_activations = checkpoint_activations

    def forward(self, images: torch.Tensor, lowest_block: float = 0) -> torch.Tensor:
        """Return the places (images, places, width) of images (images, 3, height, width).

        lowest_block: the first that trains; what comes before it is not recomputed. To be called as a module, so that
        ZeRO-3 gathers pos_embed.
        """
        run_block = partial(self._run_block, lowest_block)
        return self.vit(images.to(self.pos_embed.dtype), run_block) + self.pos_embed

    def _run_block(self, lowest: float, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return a block's output, recomputed in backward where that is switched on and of use.

        It runs through the hook, which switches a LoRA mixin's deltas on, in recomputation too.
        """
        run = partial(self.transformer.hooks["word_embedding_forward"], block=number)
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return run(x)
        if not x.requires_grad:
            if number < lowest:
                return run(x)
            x = x.detach().requires_grad_()
        return recompute_layer(run, x)

    @non_conflict
    def word_embedding_forward(
        self,
        input_ids,
        *,
        old_impl,
        block: int | None = None,
        cross_images=None,
        lowest_block: float = 0,
        output_cross_layer=None,
        **kw_args,
    ):
        """Return the word embeddings (batch, seq, hidden), and hand the encoder's output to the layers; SAT's hook.

        block: the number of a block that is to run on `input_ids`, its input, instead. cross_images None, a cached
        decoding step, hands on nothing but the sign that there is something to look at.
        """
        if block is not None:
            return self.vit.model.blocks[block](input_ids)
        if cross_images is None:
            encoded = torch.empty(0, device=input_ids.device)
        else:
            encoded = self(cross_images, lowest_block)
        output_cross_layer["encoder_outputs"] = encoded
        return old_impl(input_ids, output_cross_layer=output_cross_layer, **kw_args)

    def cross_attention_forward(
        self,
        hidden_states,
        cross_attention_mask,
        encoder_outputs,
        *,
        cross_rows: torch.Tensor,
        cache: KeyValueCache | None = None,
        **kw_args,
    ):
        """Return the cross-attention (batch, seq, hidden) of a layer's input of that shape; SAT's hook.

        encoder_outputs: (images, places, width), those of the rows `cross_rows` (images,) of the batch.
        """
        layer = int(kw_args["layer_id"])
        attention = self.transformer.layers[layer].cross_attention
        is_whole = len(cross_rows) == len(hidden_states)
        rows = hidden_states if is_whole else hidden_states.index_select(0, cross_rows)
        head_dim = attention.hidden_size_per_attention_head
        query = attention.query(rows).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        if cache is not None and cache.holds_prompts:
            key, value = cache.cross[layer]
        else:
            both = attention.key_value(encoder_outputs).unflatten(-1, (2, -1, head_dim))
            key, value = both.permute(2, 0, 3, 1, 4)  # (images, heads, places, head_dim) each
            if cache is not None:
                cache.cross[layer] = (key, value)
        if len(rows) == 0:
            context = query + key.sum(2, keepdim=True) + value.sum(2, keepdim=True)
        else:
            dropout = attention.attention_dropout.p if self.training else 0.0
            context = attend(query, key, value, None, FULL, dropout)
        output = attention.dense(context.transpose(1, 2).flatten(2))
        if self.training:
            output = attention.output_dropout(output)
        return output if is_whole else torch.zeros_like(hidden_states).index_copy(0, cross_rows, output)

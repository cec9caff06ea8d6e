"""The image side: the EVA2-CLIP vision transformer, the projector, and the tokens they put into the text.

Parameter names and shapes follow the published SAT checkpoints (mixin `eva`).
"""

from argparse import Namespace

import torch
from torch import nn
from torch.nn import functional as F

from sat_lora._sat import BaseMixin, BaseModel, ImagePatchEmbeddingMixin, ViTProperty
from sat_lora.cogvlm.inputs.image import no_images
from sat_lora.cogvlm.network.attention import FULL, attend
from sat_lora.cogvlm.network.fused import silu_mul
from sat_lora.cogvlm.network.recompute import LayerCheckpointing
from sat_lora.parallel.gradient_sum import undo_gradient_sum


class PositionEmbedding(BaseMixin):
    """The learned embedding of each place, looked up through the module so that ZeRO-3 gathers it."""

    def position_embedding_forward(self, position_ids, **kw_args):
        """Return the embeddings (1, places, hidden) of `position_ids`; SAT's hook."""
        return self.transformer.position_embeddings(position_ids)


class DropClassToken(BaseMixin):
    """The end of the vision transformer, which gives the patches alone: (images, patches, ViT hidden)."""

    def final_forward(self, hidden_states, **kw_args):
        """Return the hidden states without those of the class token; SAT's hook."""
        return undo_gradient_sum(hidden_states)[:, self.transformer.property.pre_len :]


class FullAttention(BaseMixin):
    """Attention in which every patch sees every patch, as SAT's default.

    It works on a batch of no images too, which SAT cannot reshape.
    """

    def attention_forward(self, hidden_states, mask, **kw_args):
        """Return the attention (images, places, hidden) of a layer's input of that shape; SAT's hook."""
        attention = self.transformer.layers[int(kw_args["layer_id"])].attention
        mixed = attention.query_key_value(hidden_states)
        if len(mixed) == 0:
            context = mixed[..., : mixed.shape[-1] // 3]  # nothing, as wide as attention's output
        else:
            heads = mixed.unflatten(-1, (3, -1, attention.hidden_size_per_attention_head))
            query, key, value = heads.permute(2, 0, 3, 1, 4)  # (batch, heads, seq, head_dim) each
            dropout = attention.attention_dropout if self.training else None
            context = attention.hooks["attention_fn"](query, key, value, mask, dropout, **kw_args)
            context = context.transpose(1, 2).flatten(2)
        output = attention.dense(context)  # every module is called in every step: ZeRO-3 follows them on all ranks
        return attention.output_dropout(output) if self.training else output

    def attention_fn(self, query, key, value, mask, dropout=None, **kw_args):
        """Return the attention (images, heads, places, head_dim) of all places to all; SAT's hook."""
        return attend(query, key, value, None, FULL, dropout.p if dropout is not None else 0.0)


class EVA2CLIPModel(BaseModel):
    """The vision transformer: (images, 3, height, width) -> (images, patches, ViT hidden)."""

    def __init__(self, args: Namespace, params_dtype=torch.float32, **kwargs):
        grid = ViTProperty(args.image_size, args.patch_size, args.pre_len, args.post_len)
        args.max_sequence_length = grid.seq_len
        super().__init__(args, params_dtype=params_dtype, layernorm=nn.LayerNorm, activation_func=F.gelu, **kwargs)
        self.transformer.property = grid
        self.checkpointing = LayerCheckpointing(self)
        self.add_mixin("patch_embedding", ImagePatchEmbeddingMixin(args.in_channels, args.hidden_size, grid))
        self.add_mixin("pos_embedding", PositionEmbedding())
        self.add_mixin("final", DropClassToken())
        self.add_mixin("xattn", FullAttention())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the patches (images, patches, ViT hidden) of images (images, 3, height, width)."""
        grid = self.transformer.property
        ids = torch.zeros(len(images), grid.pre_len + grid.post_len, dtype=torch.long, device=images.device)
        places = torch.arange(grid.seq_len, device=images.device)[None]
        return super().forward(ids, places, None, image=images)[0]

    def layer_forward(self, hidden_states, mask, *args, **kw_args):
        """Return x + LN2(mlp(x)) of x + LN1(attention(x)), the norm on the output of each branch; SAT's hook."""
        number = int(kw_args["layer_id"])
        layer = self.transformer.layers[number]

        def run(x, mask):
            x = x + layer.input_layernorm(layer.attention(x, mask, **kw_args))
            return x + layer.post_attention_layernorm(layer.mlp(x, **kw_args))

        return self.checkpointing.run(run, number, self, hidden_states, mask)


class Projector(nn.Module):
    """The way from ViT hidden to language hidden: W x; GELU(LayerNorm(.)); then a gated MLP."""

    def __init__(self, vit_hidden_size: int, hidden_size: int, inner_hidden_size: int):
        super().__init__()
        self.linear_proj = nn.Linear(vit_hidden_size, hidden_size, bias=False)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.gate_proj = nn.Linear(hidden_size, inner_hidden_size, bias=False)
        self.dense_h_to_4h = nn.Linear(hidden_size, inner_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(inner_hidden_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., language hidden) of x (..., ViT hidden)."""
        x = F.gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(silu_mul(self.gate_proj(x), self.dense_h_to_4h(x)))


class ImageTokens(BaseMixin):
    """The mixin that puts [begin of image, patches, end of image] into the word embeddings.

    convolves: two by two patches become one. adds_positions: a learned embedding is added to each patch behind the
    vision transformer, which has its own.
    """

    def __init__(
        self,
        vit_args: Namespace,
        hidden_size,
        inner_hidden_size,
        params_dtype,
        *,
        convolves: bool = False,
        adds_positions: bool = False,
    ):
        super().__init__()
        self.vit_model = EVA2CLIPModel(vit_args, params_dtype=params_dtype)
        width = vit_args.hidden_size
        self.conv = nn.Conv2d(width, width, kernel_size=2, stride=2) if convolves else None
        patches = self.vit_model.transformer.property.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(patches, width)) if adds_positions else None
        self.linear_proj = Projector(vit_args.hidden_size, hidden_size, inner_hidden_size)
        self.boi = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, hidden_size))

    def no_images(self) -> torch.Tensor:
        """Return what a batch without images carries: (0, 3, height, width)."""
        grid = self.vit_model.transformer.property
        return no_images(grid.image_size, self.boi.device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens (images, image_length + 2, hidden) of images (images, 3, height, width).

        To be called as a module, so that ZeRO-3 gathers boi and eoi.
        """
        patches = self.vit_model(images.to(self.boi.dtype))
        if self.pos_embed is not None:
            patches = patches + self.pos_embed
        if self.conv is not None:
            grid = patches.transpose(1, 2).unflatten(2, self.vit_model.transformer.property.grid_size)
            patches = self.conv(grid).flatten(2).transpose(1, 2)
        patches = self.linear_proj(patches)
        ends = (end.expand(len(images), -1, -1) for end in (self.boi, self.eoi))
        return torch.cat([next(ends), patches, next(ends)], dim=1)

    def word_embedding_forward(self, input_ids, *, images=None, image_places=None, **kw_args):
        """Return the word embeddings (batch, seq, hidden), with `image_places` taken by the images; SAT's hook.

        image_places: indices into the flattened (batch * seq) tokens. A batch without images carries none and no place:
        the vision transformer runs on nothing, in every step of every rank, and its gradients are zero. `images` None,
        a cached decoding step, leaves the words alone.
        """
        embeddings = self.transformer.word_embeddings(input_ids)
        if images is None:
            return embeddings
        image_tokens = self(images).flatten(0, 1)[: len(image_places)]
        return embeddings.flatten(0, 1).index_copy(0, image_places, image_tokens).view_as(embeddings)

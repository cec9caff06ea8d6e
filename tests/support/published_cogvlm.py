"""A model of the structure of the published CogVLM, written for these tests: a SAT model with hooks of its own.

Its mixins hold an expert for vision tokens beside each linear of the base, with q, k and v fused; rows are told apart
by a boolean mask, and an expert without a row does not run, nor does the vision transformer without an image. What
trains is said by parts of names.
"""

import torch
from sat.model.base_model import BaseMixin, BaseModel
from sat.mpu import ColumnParallelLinear, RowParallelLinear
from sat.mpu.utils import split_tensor_along_last_dim
from torch import nn

from tests.support.sat_models import LENGTH, SIZES, settings, token_ids, vit

LAYERS, HIDDEN, INNER, HEADS = (
    SIZES[n] for n in ("num_layers", "hidden_size", "inner_hidden_size", "num_attention_heads")
)
IMAGE_AT = 1  # place of the token of an image


def each_on_its_rows(is_vision, vision_expert, language_expert, x):
    """(batch, seq, out): every expert that has a row, on its rows."""
    output = None
    for expert, rows in ((vision_expert, is_vision), (language_expert, ~is_vision)):
        if rows.any():
            y = expert(x[rows])
            output = y.new_zeros(*x.shape[:-1], y.shape[-1]) if output is None else output
            output[rows] = y
    return output


class ExpertAttention(BaseMixin):
    def __init__(self):
        super().__init__()
        fused = lambda: ColumnParallelLinear(HIDDEN, 3 * HIDDEN, stride=3, gather_output=False, bias=False)  # noqa: E731
        dense = lambda: RowParallelLinear(HIDDEN, HIDDEN, input_is_parallel=True, bias=False)  # noqa: E731
        self.vision_query_key_value_list = nn.ModuleList(fused() for _ in range(LAYERS))
        self.vision_dense_list = nn.ModuleList(dense() for _ in range(LAYERS))

    def attention_forward(self, hidden_states, mask, is_vision=None, **kw_args):
        number = int(kw_args["layer_id"])
        attention = self.transformer.layers[number].attention
        fused = self.vision_query_key_value_list[number]
        mixed = each_on_its_rows(is_vision, fused, attention.query_key_value, hidden_states)
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in split_tensor_along_last_dim(mixed, 3)]
        context = nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        return each_on_its_rows(is_vision, self.vision_dense_list[number], attention.dense, context)


class ExpertMLP(BaseMixin):
    def __init__(self):
        super().__init__()
        up = lambda: ColumnParallelLinear(HIDDEN, INNER, gather_output=False, bias=False)  # noqa: E731
        down = lambda: RowParallelLinear(INNER, HIDDEN, input_is_parallel=True, bias=False)  # noqa: E731
        self.vision_dense_h_to_4h_list = nn.ModuleList(up() for _ in range(LAYERS))
        self.vision_dense_4h_to_h_list = nn.ModuleList(down() for _ in range(LAYERS))

    def mlp_forward(self, hidden_states, is_vision=None, **kw_args):
        number = int(kw_args["layer_id"])
        mlp = self.transformer.layers[number].mlp
        up, down = self.vision_dense_h_to_4h_list[number], self.vision_dense_4h_to_h_list[number]
        inner = each_on_its_rows(is_vision, up, mlp.dense_h_to_4h, hidden_states)
        return each_on_its_rows(is_vision, down, mlp.dense_4h_to_h, nn.functional.silu(inner))


class ImageWords(BaseMixin):
    def __init__(self):
        super().__init__()
        self.vit_model = vit(num_classes=HIDDEN)
        self.boi = nn.Parameter(torch.zeros(HIDDEN))

    def word_embedding_forward(self, input_ids, images=None, is_vision=None, **kw_args):
        words = self.transformer.word_embeddings(input_ids)
        if images is None or len(images) == 0:
            return words
        ids = torch.zeros(len(images), 1, dtype=torch.long)
        tokens = self.vit_model(input_ids=ids, position_ids=None, attention_mask=None, image=images)[0]
        words = words.clone()
        words[is_vision] = tokens + self.boi
        return words


class PublishedModel(BaseModel):
    def __init__(self, args):
        super().__init__(args)
        self.add_mixin("eva", ImageWords())
        self.add_mixin("mlp", ExpertMLP())
        self.add_mixin("rotary", ExpertAttention())

    def disable_untrainable_params(self):
        for name, parameter in self.named_parameters():
            if not any(part in name for part in ("matrix_A", "matrix_B", "vit", "boi")):
                parameter.requires_grad_(False)


def published(**changes) -> PublishedModel:
    return PublishedModel(settings(use_bias=False, hidden_dropout=0.0, attention_dropout=0.0, **changes))


def run_published(model, seed: int, with_image: bool) -> torch.Tensor:
    """Logits (2, 10, vocabulary); each row has an image, or none has."""
    ids = token_ids(seed)
    is_vision = torch.zeros(ids.shape, dtype=torch.bool)
    is_vision[:, IMAGE_AT] = with_image
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2 if with_image else 0, 3, 12, 12, generator=generator)
    places = torch.arange(LENGTH).expand(2, -1).contiguous()
    return model(input_ids=ids, position_ids=places, attention_mask=-1, images=images, is_vision=is_vision)[0]

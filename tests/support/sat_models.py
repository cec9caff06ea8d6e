"""SAT's own models, tiny, each with a function that runs it on a batch of its own.

Sizes of all: 2 layers, hidden 32, 4 heads of 8, inner 48, batches of 2 rows. A vocabulary of 1024, because below
1000 SAT does not cut the word embeddings over model-parallel ranks.
"""

from argparse import Namespace
from functools import partial

import torch
from sat.model.base_model import BaseModel
from sat.model.encoder_decoder_model import EncoderDecoderModel
from sat.model.finetune.adapter import AdapterMixin
from sat.model.official.bert_model import BertModel
from sat.model.official.chatglm2_model import ChatGLM2Model
from sat.model.official.chatglm3_model import ChatGLM3Model
from sat.model.official.chatglm_model import ChatGLMModel
from sat.model.official.glm130B_model import DeepNormWithGLUMixin
from sat.model.official.gpt2_model import GPT2Model
from sat.model.official.llama_model import LLaMAModel
from sat.model.official.mixtral_model import MixtralModel
from sat.model.official.t5_model import T5LayerNorm, T5Model
from sat.model.official.vit_model import ViTModel
from sat.mpu import ColumnParallelLinear
from torch import nn

SIZES = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    inner_hidden_size=48,
    vocab_size=1024,
    max_sequence_length=16,
    layernorm_order="pre",
    skip_init=False,
    model_parallel_size=1,
)
LENGTH = 10


def settings(**changes) -> Namespace:
    return Namespace(**{**SIZES, **changes})


def token_ids(seed=0, rows=2) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def positions(rows=2) -> torch.Tensor:
    return torch.arange(LENGTH).expand(rows, -1).contiguous()


def run_language(model, **kw_args) -> torch.Tensor:
    """Logits (2, 10, vocabulary) under a causal mask."""
    return model(input_ids=token_ids(), position_ids=positions(), attention_mask=-1, **kw_args)[0]


def llama(**changes):
    return LLaMAModel(settings(use_bias=False, **changes))


def chatglm(**changes):
    """With torch's GELU: SAT's is a TorchScript function, whose first run in a process rounds otherwise than the later
    ones, which are optimised, so that what is equal would depend on the tests before.
    """
    ids = dict(bos_token_id=1, mask_token_id=2, gmask_token_id=3, pad_token_id=4)
    model = ChatGLMModel(settings(**{"layernorm_order": "post", **ids, **changes}))
    for layer in model.transformer.layers:
        layer.mlp.activation_func = partial(nn.functional.gelu, approximate="tanh")
    return model


def run_chatglm(model):
    """Two positions for each token: where it stands, and where it stands in its block."""
    both = torch.stack([positions(), positions().flip(1)], dim=1)
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril()
    return model(input_ids=token_ids(), position_ids=both, attention_mask=mask)[0]


def chatglm2(**changes):
    return ChatGLM2Model(settings(use_bias=False, use_qkv_bias=True, num_multi_query_heads=2, **changes))


def chatglm3(**changes):
    return ChatGLM3Model(
        settings(use_bias=False, use_qkv_bias=True, num_multi_query_heads=2, base_scale=50.0, **changes)
    )


def run_chatglm2(model):
    return model(input_ids=token_ids())[0]


def mixtral(**changes):
    return MixtralModel(settings(use_bias=False, is_gated_mlp=True, num_experts=4, num_experts_per_tok=2, **changes))


def run_mixtral(model):
    """With 20 rows of tokens every expert gets some in every layer."""
    return model(input_ids=token_ids(rows=20), position_ids=positions(20), attention_mask=-1)[0]


def plain(**changes):
    """The head is the word embedding: under model parallelism each rank has a part of the gradient below it."""
    return BaseModel(settings(**changes))


def geglu(**changes):
    """The MLP of GLM-130B, gate and value in one `dense_h_to_4h` of 2 x 48 rows, on a plain SAT transformer.

    GLM-130B itself asks for the current CUDA device while it is built. Its `reinit` puts the fused linear, in half
    precision, in the place of SAT's.
    """
    model = BaseModel(settings(**changes))
    model.add_mixin("glu-deepnorm", DeepNormWithGLUMixin(2, SIZES["hidden_size"], SIZES["inner_hidden_size"]))
    model.get_mixin("glu-deepnorm").reinit()
    return model


def geglu_in_two_blocks(**changes):
    """The same with a stride of 2, so that SAT cuts gate and value each over model-parallel ranks."""
    model = geglu(**changes)
    for layer in model.transformer.layers:
        layer.mlp.dense_h_to_4h = ColumnParallelLinear(32, 2 * 48, gather_output=False, stride=2)
    return model


def bottleneck(**changes):
    """SAT's AdapterMixin: four linears in each layer, called by a `layer_forward` hook and by no other."""
    model = BaseModel(settings(**changes))
    model.add_mixin("adapter", AdapterMixin(2, SIZES["hidden_size"], 16))
    return model


def gpt2(**changes):
    return GPT2Model(settings(**changes))


def bert(**changes):
    return BertModel(settings(**{"layernorm_order": "post", "num_types": 2, **changes}))


def run_bert(model):
    types = (positions() > 4).long()
    return model(input_ids=token_ids(), position_ids=positions(), attention_mask=None, token_type_ids=types)[0]


def vit(**changes):
    """10 classes from images of 3 x 3 patches and a class token."""
    image = dict(image_size=[12, 12], patch_size=4, pre_len=1, post_len=0, in_channels=3, num_classes=10)
    return ViTModel(settings(**{**image, "vocab_size": 1, **changes}))


def run_vit(model):
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = images.to(next(model.parameters()).dtype)
    return model(input_ids=torch.zeros(2, 1, dtype=torch.long), position_ids=None, attention_mask=None, image=images)[0]


def encoder_decoder(**changes):
    """Word embeddings shared by both and by the head.

    SAT 0.4.12 builds no decoder by itself: it gives `is_decoder` twice.
    """
    encoder, decoder = BaseModel(settings(**changes)), BaseModel(settings(is_decoder=True, **changes))
    return EncoderDecoderModel(settings(**changes), encoder=encoder, decoder=decoder)


def run_encoder_decoder(model):
    return model(token_ids(), positions(), token_ids(seed=1), positions())[1]


def t5(gated: bool, **changes):
    """The two halves as T5Model builds them; SAT 0.4.12 fails there, for it gives `use_bias` twice."""
    extra = dict(
        init_method_std=0.02, relative_attention_num_buckets=8, dec_num_attention_heads=None, no_share_embeddings=False
    )
    args = settings(use_bias=False, gated_gelu_mlp=gated, **extra, **changes)
    halves = [
        BaseModel(
            Namespace(**vars(args), is_decoder=decoder), layernorm=T5LayerNorm, activation_func=nn.functional.relu
        )
        for decoder in (False, True)
    ]
    return T5Model(args, encoder=halves[0], decoder=halves[1])


def run_t5(model):
    return model(token_ids(), token_ids(seed=1))[1]

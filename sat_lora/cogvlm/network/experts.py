"""The language transformer's attention and MLP with a vision expert beside each language weight.

Parameter names and shapes follow the published SAT checkpoints (mixins `rotary` and `mlp`). A family without visual
experts has the language weights alone.
"""

import torch
from torch import nn

from sat_lora._sat import BaseMixin, ColumnParallelLinear, RowParallelLinear
from sat_lora.cogvlm.network.attention import attend
from sat_lora.cogvlm.network.fused import rotary, silu_mul
from sat_lora.cogvlm.network.rotary import RotaryEmbedding
from sat_lora.cogvlm.network.routing import TokenRouting, route
from sat_lora.parallel.sharding import model_parallel_layout


def _per_layer(num_layers: int, build) -> nn.ModuleDict:
    return nn.ModuleDict({str(i): build() for i in range(num_layers)})


class ExpertAttention(BaseMixin):
    """Fused q/k/v and output projections per expert, one attention over all tokens.

    key_heads: of keys and values, where several heads of queries share one; None: as many as of queries. Blocks of
    q, k and v are cut over the model-parallel ranks each by itself, as SAT does of the language weights.
    """

    def __init__(
        self,
        num_layers,
        hidden_size,
        num_heads,
        params_dtype,
        skip_init,
        rotary_base=10000.0,
        key_heads=None,
        has_vision_experts=True,
        vision_bias=False,
    ):
        super().__init__()
        head_dim = hidden_size // num_heads
        self.rotary_emb = RotaryEmbedding(head_dim, rotary_base)
        if not has_vision_experts:
            return
        kw = dict(params_dtype=params_dtype, skip_init=skip_init)
        _, ranks = model_parallel_layout()
        stride = 3 if key_heads is None else [heads // ranks for heads in (num_heads, key_heads, key_heads)]
        rows = (num_heads + 2 * (num_heads if key_heads is None else key_heads)) * head_dim
        self.vision_query_key_value_list = _per_layer(
            num_layers,
            lambda: ColumnParallelLinear(
                hidden_size,
                rows,
                stride=stride,
                gather_output=False,
                module=self,
                name="query_key_value",
                bias=vision_bias,
                **kw,
            ),
        )
        kw["bias"] = False
        self.vision_dense_list = _per_layer(
            num_layers,
            lambda: RowParallelLinear(
                hidden_size, hidden_size, input_is_parallel=True, module=self, name="dense", **kw
            ),
        )

    def attention_forward(
        self,
        hidden_states,
        mask,
        *,
        rope: tuple[torch.Tensor, torch.Tensor],
        routing: TokenRouting | None,
        **kw_args,
    ):
        """Return the attention (batch, seq, hidden) of a layer's input (batch, seq, hidden); SAT's hook."""
        layer = str(int(kw_args["layer_id"]))
        attention = self.transformer.layers[int(layer)].attention
        vision_qkv = None if routing is None else self.vision_query_key_value_list[layer]
        vision_dense = None if routing is None else self.vision_dense_list[layer]
        mixed = route(routing, vision_qkv, attention.query_key_value, hidden_states)
        key_heads = attention.num_multi_query_heads_per_partition or None
        query, key, value = rotary(mixed, *rope, attention.hidden_size_per_attention_head, key_heads)
        dropout = attention.attention_dropout if self.training else None
        context = attention.hooks["attention_fn"](query, key, value, mask, dropout, **kw_args)
        context = context.transpose(1, 2).flatten(2)  # (batch, seq, hidden of this rank)
        output = route(routing, vision_dense, attention.dense, context)
        return attention.output_dropout(output) if self.training else output

    def attention_fn(self, query, key, value, mask, dropout=None, *, attention_kind, cache=None, **kw_args):
        """Return the attention over the tokens of this pass, or over those that `cache` holds too; SAT's hook."""
        if cache is not None:
            return cache.attend(int(kw_args["layer_id"]), query, key, value)
        return attend(query, key, value, mask, attention_kind, dropout.p if dropout is not None else 0.0)


class ExpertMlp(BaseMixin):
    """The MLP with language and vision weights: down(SiLU(gate(x)) * up(x)); the language up and down are SAT's own."""

    def __init__(self, num_layers, hidden_size, inner_hidden_size, params_dtype, skip_init, has_vision_experts=True):
        super().__init__()
        kw = dict(bias=False, params_dtype=params_dtype, skip_init=skip_init, module=self)

        def widen():
            return ColumnParallelLinear(hidden_size, inner_hidden_size, gather_output=False, name="up", **kw)

        def narrow():
            return RowParallelLinear(inner_hidden_size, hidden_size, input_is_parallel=True, name="down", **kw)

        self.gate_proj = nn.ModuleList(widen() for _ in range(num_layers))
        if not has_vision_experts:
            return
        self.vision_gate_proj = _per_layer(num_layers, widen)
        self.vision_dense_h_to_4h_list = _per_layer(num_layers, widen)
        self.vision_dense_4h_to_h_list = _per_layer(num_layers, narrow)

    def mlp_forward(self, hidden_states, *, routing: TokenRouting | None, **kw_args):
        """Return the MLP's output (batch, seq, hidden) for its input (batch, seq, hidden); SAT's hook."""
        layer = int(kw_args["layer_id"])
        mlp = self.transformer.layers[layer].mlp
        key = str(layer)

        def gated(gate, up, down):
            return lambda x: down(silu_mul(gate(x), up(x)))

        language = gated(self.gate_proj[layer], mlp.dense_h_to_4h, mlp.dense_4h_to_h)
        vision = None
        if routing is not None:
            vision = gated(
                self.vision_gate_proj[key], self.vision_dense_h_to_4h_list[key], self.vision_dense_4h_to_h_list[key]
            )
        return route(routing, vision, language, hidden_states)

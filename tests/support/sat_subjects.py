"""What LoRA has to find in each of SAT's models, written down by hand, and how far it may be off."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sat.model.base_model import BaseModel
from torch import nn

from sat_lora import LoraMixin, add_lora
from tests.support.plain_rotary import with_plain_rotary
from tests.support.sat_models import (
    bert,
    bottleneck,
    chatglm,
    chatglm2,
    chatglm3,
    encoder_decoder,
    geglu,
    geglu_in_two_blocks,
    gpt2,
    llama,
    mixtral,
    plain,
    run_bert,
    run_chatglm,
    run_chatglm2,
    run_encoder_decoder,
    run_language,
    run_mixtral,
    run_t5,
    run_vit,
    t5,
    vit,
)
from tests.support.tiny import randomise

QKV, MULTI_QUERY, KEY_VALUE, WHOLE = (32, 32, 32), (32, 16, 16), (32, 32), ()  # rows of each slot; () for no slots
_LAYER = "transformer.layers.{}."


def attention(qkv=QKV, prefix="") -> dict[str, tuple[int, ...]]:
    return {prefix + _LAYER + "attention.query_key_value": qkv, prefix + _LAYER + "attention.dense": WHOLE}


def cross_attention(prefix) -> dict[str, tuple[int, ...]]:
    start = prefix + _LAYER + "cross_attention."
    return {start + "query": WHOLE, start + "key_value": KEY_VALUE, start + "dense": WHOLE}


def whole(*names, prefix="") -> dict[str, tuple[int, ...]]:
    return {prefix + name: WHOLE for name in names}


def mlp(*leaves, prefix="") -> dict[str, tuple[int, ...]]:
    return whole(*(f"{_LAYER}mlp.{leaf}" for leaf in ("dense_h_to_4h", "dense_4h_to_h", *leaves)), prefix=prefix)


def halves(gate=()) -> dict[str, tuple[int, ...]]:
    """Encoder and decoder; `gate` are linears that both have besides."""
    parts = {}
    for half in ("encoder.", "decoder."):
        parts |= attention(prefix=half) | mlp(prefix=half) | whole(*gate, prefix=half)
    return parts | cross_attention("decoder.")


@dataclass(frozen=True)
class Subject:
    """One model of the zoo: how to build and run it, and what LoRA has to find in it."""

    make: Callable[..., nn.Module]
    run: Callable[[nn.Module], torch.Tensor]
    layered: dict[str, tuple[int, ...]]  # names of linears with {} for the layer, and the rows of each slot
    count: int  # linears in all
    heads: tuple[str, ...] = ()  # those that "all-linear" leaves out
    tolerance: float = 1e-9  # SAT's RMSNorm and Mixtral's routing compute in float32 whatever the model's dtype is
    recomputed: float = 0.0  # an encoder's output has several users, whose gradients are summed in another order

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Every linear by name, with the rows of each slot."""
        return {name.format(layer): rows for name, rows in self.layered.items() for layer in range(2)}

    def build(self, dtype=torch.float64, **changes) -> nn.Module:
        """Random weights, the same for every model-parallel size and whether or not activations are checkpointed."""
        model = with_plain_rotary(self.make(**changes)).float()
        randomise(model, seed=0)
        return model.to(dtype)


_GATE_MIXIN, _ROTARY = whole("mixins.mlp.gate_proj.{}"), dict(is_rotary_emb=True)
_LM, _GATED = whole("mixins.lm.lm_head"), dict(is_gated_mlp=True)
_EXPERTS = [f"{leaf}_{n}" for leaf in ("dense_h_to_4h", "dense_4h_to_h", "dense_h_to_4h_gate") for n in (1, 2, 3)]
_GATE, _W2 = "dense_h_to_4h_gate", whole("mixins.mlp.w2.{}")


def _llama(layered, **changes) -> Subject:
    make = lambda **more: llama(**changes, **more)  # noqa: E731
    return Subject(make, run_language, attention() | layered | _LM, 11, ("mixins.lm.lm_head",), 1e-6)


def _chatglm(make, run, layered, count, tolerance) -> Subject:
    head = "mixins.chatglm-final.lm_head"
    return Subject(make, run, layered | mlp() | whole(head), count, (head,), tolerance)


SUBJECTS = {
    "llama": _llama(mlp() | _GATE_MIXIN),
    "llama, gate in the MLP": _llama(mlp(_GATE), **_GATED),
    "llama, rotary in the transformer": _llama(mlp() | _GATE_MIXIN, **_ROTARY),
    "llama, both": _llama(mlp(_GATE), **_GATED, **_ROTARY),
    "chatglm": _chatglm(chatglm, run_chatglm, attention(), 9, 1e-9),
    "chatglm2": _chatglm(chatglm2, run_chatglm2, attention(MULTI_QUERY) | _W2, 11, 1e-6),
    "chatglm3": _chatglm(chatglm3, run_chatglm2, attention(MULTI_QUERY) | _W2, 11, 1e-6),
    "mixtral": Subject(
        mixtral,
        run_mixtral,
        attention() | mlp(_GATE, *_EXPERTS) | whole("mixins.mlp.gates.{}") | _LM,
        31,
        ("mixins.lm.lm_head",),
        1e-6,
    ),
    "plain": Subject(plain, run_language, attention() | mlp(), 8),
    "geglu": Subject(geglu, run_language, attention() | mlp(), 8),
    "bottleneck": Subject(
        bottleneck,
        run_language,
        attention() | mlp() | whole(*(f"mixins.adapter.ff{n}.{{}}" for n in (1, 2, 3, 4))),
        16,
    ),
    "gpt2": Subject(
        gpt2,
        run_language,
        attention() | mlp() | whole("mixins.gpt2-final.lm_head"),
        9,
        ("mixins.gpt2-final.lm_head",),
    ),
    "bert": Subject(
        bert,
        run_bert,
        attention() | mlp() | whole("mixins.bert-final.lm_head.dense", "mixins.bert-final.lm_head.decoder"),
        10,
    ),
    "vit": Subject(
        vit,
        run_vit,
        attention() | mlp() | whole("mixins.patch_embedding.proj", "mixins.cls.classifier"),
        10,
    ),
    "encoder-decoder": Subject(encoder_decoder, run_encoder_decoder, halves(), 22, recomputed=1e-13),
    "t5": Subject(lambda **c: t5(False, **c), run_t5, halves(), 22, (), 1e-6, 1e-13),
    "t5, gated": Subject(
        lambda **c: t5(True, **c), run_t5, halves(["mixins.gated-mlp.gated_h_to_4h_list.{}"]), 26, (), 1e-6, 1e-13
    ),
}


# A linear in two blocks that are no k and v; not among SUBJECTS, for it may have one pair of factors or two.
GEGLU_IN_TWO_BLOCKS = Subject(geglu_in_two_blocks, run_language, attention() | mlp(), 8)


def adapt(model: nn.Module, **fields) -> None:
    """LoRA of rank 4 on all but embeddings, the head's too: by `add_mixin` on a SAT model, by `add_lora` on a pair."""
    targets = r"(?!.*(_embeddings|relative_attention_bias)$).*"
    fields = {"r": 4, "lora_alpha": 8, "target_modules": targets, **fields}
    if isinstance(model, BaseModel):
        model.add_mixin("lora", LoraMixin(model, **fields))
    else:
        add_lora(model, **fields)


def remove(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, BaseModel) and "lora" in module.mixins:
            module.del_mixin("lora")


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A sum with seeded random weights, so that no part of the output cancels another."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return (output * weights).sum() / output[0].numel() ** 0.5


def relative_error(got, expected):
    return abs(got - expected).max() / abs(expected).max()


def sums_of_sat(model: str, tensor: str) -> int:
    """How often SAT 0.4.12 itself counts the gradient below a head, on two ranks.

    Its transformer sums what reaches the head's input over the ranks. That is right for SAT's default head, where each
    rank has a part. A head that is a parallel or plain linear has summed already, or has the whole; and the encoder's
    final mixin sums once more. The base's own gradients are too large by the same factor.
    """
    if model == "encoder-decoder":
        return 4 if tensor.startswith("encoder.") else 1
    return 1 if "lm_head" in tensor or "classifier" in tensor or model in ("plain", "geglu in two blocks") else 2

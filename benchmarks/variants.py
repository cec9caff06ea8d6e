"""One linear, frozen or adapted by sat_lora, by PEFT, or by SAT's lora2: what bench_adapter.py compares.

Shapes: x (tokens, in), y (tokens, out); `slots` is 3 for a fused q/k/v linear. The linears come out of a real SAT
transformer layer and are called inside a SAT hook, as in training.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn

from sat_lora import LoraMixin
from sat_lora._sat import BaseMixin, BaseModel

NAMES = ("frozen", "sat_lora", "peft", "peft_3r", "lora2")
LAYER = "transformer.layers.0."


@dataclass(frozen=True)
class Shape:
    """A linear of in_features x out_features; `slots` 3 where q, k and v are fused in the output."""

    in_features: int
    out_features: int
    slots: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "1024x3072/3" (slots after the slash) or "1024x4096"."""
        sizes, _, slots = text.partition("/")
        width, _, height = sizes.partition("x")
        shape = cls(int(width), int(height), int(slots or 1))
        if shape.slots not in (1, 3) or (shape.slots == 3 and shape.out_features != 3 * shape.in_features):
            raise ValueError(f"{text!r}: a fused linear is HxG/3 with G = 3 H, any other HxG")
        return shape

    def __str__(self) -> str:
        return f"{self.in_features}x{self.out_features}" + (f"/{self.slots}" if self.slots > 1 else "")

    @property
    def leaf(self) -> str:
        """The linear of a SAT layer that has this shape."""
        if self.slots == 3:
            return "attention.query_key_value"
        if self.in_features == self.out_features:
            return "attention.dense"
        return "mlp.dense_h_to_4h" if self.in_features < self.out_features else "mlp.dense_4h_to_h"


@dataclass(frozen=True)
class Variant:
    """call: x (tokens, in) -> y (tokens, out). trained: A and B; parameters: those and the frozen ones."""

    call: Callable[[torch.Tensor], torch.Tensor]
    trained: list[nn.Parameter]
    parameters: list[nn.Parameter]


class CallLinear(BaseMixin):
    """Makes a SAT hook call one linear alone."""

    def __init__(self, leaf: str):
        super().__init__()
        self.owner, self.leaf = leaf.split(".")

    def mlp_forward(self, hidden_states, **kw_args):
        owner = getattr(self.transformer.layers[0], self.owner)
        return getattr(owner, self.leaf)(hidden_states)


def one_layer_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """A SAT model of one layer that holds the linear of `shape`, with random weights and no bias."""
    hidden, inner = min(shape.in_features, shape.out_features), max(shape.in_features, shape.out_features)
    sizes = dict(num_layers=1, hidden_size=hidden, num_attention_heads=1, vocab_size=8, max_sequence_length=8)
    fixed = dict(layernorm_order="pre", model_parallel_size=1, skip_init=True, use_bias=False)
    inner = inner if shape.leaf.startswith("mlp.") else 8
    model = BaseModel(Namespace(**sizes, **fixed, inner_hidden_size=inner), params_dtype=dtype).to(device)
    model.requires_grad_(False).get_submodule(LAYER + shape.leaf).weight.normal_(std=shape.in_features**-0.5)
    model.add_mixin("call", CallLinear(shape.leaf))
    return model


def randomise(trained: list[nn.Parameter]) -> list[nn.Parameter]:
    """Neither A nor B is zero, as after a few steps."""
    for parameter in trained:
        nn.init.normal_(parameter, std=0.02)
    return trained


def names_for(shape: Shape) -> tuple[str, ...]:
    """NAMES that make sense for a shape: `peft_3r` is for fused q/k/v alone."""
    return tuple(name for name in NAMES if shape.slots == 3 or name != "peft_3r")


def build(name: str, shape: Shape, rank: int, dropout: float, dtype: torch.dtype, device: torch.device) -> Variant:
    """One of NAMES. The scale is 2 for all; A and B have the dtype of the base weight."""
    if name.startswith("peft"):
        return _peft(shape, 3 * rank if name == "peft_3r" else rank, dropout, dtype, device)
    model = one_layer_model(shape, dtype, device)
    if name == "sat_lora":
        target = (LAYER + shape.leaf).replace(".", r"\.")
        fields = dict(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=target)
        model.add_mixin("lora", LoraMixin(model, **fields))
    elif name == "lora2":
        _replace_by_lora2(model, shape, rank, dropout)
    trained = randomise([p for p in model.parameters() if p.requires_grad])
    model.train()
    hook = model.hooks["mlp_forward"]
    return Variant(lambda x: hook(x, layer_id=0), trained, list(model.parameters()))


def _replace_by_lora2(model: BaseModel, shape: Shape, rank: int, dropout: float) -> None:
    from sat.model.finetune.lora2 import replace_linear_with_lora

    owner_name, _, leaf = (LAYER + shape.leaf).rpartition(".")
    owner = model.get_submodule(owner_name)
    replaced = replace_linear_with_lora(getattr(owner, leaf), shape.slots, rank, 2 * rank, dropout)
    replaced.original.requires_grad_(False)
    setattr(owner, leaf, replaced)


def _peft(shape: Shape, rank: int, dropout: float, dtype: torch.dtype, device: torch.device) -> Variant:
    """PEFT on an nn.Linear. It knows no slots: a fused linear gets one A and one B over the whole output.

    sat_lora and lora2 give q, k and v a pair each. What those can express, PEFT's pair can from rank 3 r on, with a
    block-diagonal B; at rank r it has a third of their A, and less to compute.
    """
    linear = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype, device=device)
    config = PeftConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["linear"])
    model = inject_adapter_in_model(config, nn.ModuleDict({"linear": linear})).train()
    trained = randomise([p for p in model.parameters() if p.requires_grad])
    return Variant(model["linear"], trained, list(model.parameters()))

"""What a rank holds, in bytes, when it trains bf16 adapters on a bf16 base. Computed; no GPU has been asked."""

from dataclasses import dataclass

from benchmarks.scaling.communication import Setting

BUCKET = 50_000_000  # elements; finetune_demo/zero2_bf16.json
LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered; DeepSpeed 0.19.8's stage3_max_live_parameters
STATE = 16  # bytes of an element's float32 copy, its gradient and Adam's two moments


@dataclass(frozen=True, kw_only=True)
class Memory:
    weights: float
    adapter: float
    """Adapters, their gradients, and the optimizer's float32 state."""
    activations: float
    buffers: float
    """What DeepSpeed gathers and reduces in."""

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.buffers


def memory(setting: Setting, *, stage: int, parts: int, data_ranks: int) -> Memory:
    """Of a rank among `data_ranks` that hold the same of `parts` parts of the model, under ZeRO `stage` 1, 2 or 3."""
    sizes, size = setting.sizes, setting.size
    weights, adapter = sizes.weights(parts), sizes.adapter(setting.rank, parts)
    shared = {name: data_ranks if stage >= first else 1 for name, first in (("optimizer", 1), ("grads", 2), ("all", 3))}
    return Memory(
        weights=weights * size / shared["all"],
        adapter=adapter * (size / shared["all"] + size / shared["grads"] + STATE / shared["optimizer"]),
        activations=activations(setting, parts),
        buffers=2 * min(BUCKET, adapter) * size + (min(LIVE, weights) * size if stage == 3 else 0),
    )


def activations(setting: Setting, parts: int) -> float:
    """An estimate, with every layer checkpointed: its input is kept, and one layer at a time is recomputed.

    A layer recomputed keeps, per token, about 4 widths that every rank has whole (norms, inputs of q/k/v and of the
    MLP, the branches' outputs) and of what is cut 8 widths (q, k, v, rotated q and k, context) and the MLP's inner
    width 5 times (gate, up, activation, product, a gradient); a ViT layer has no gate: 3 times. At the end come the
    logits, with their float32 copy and gradients.
    """
    if not setting.checkpointing:
        raise ValueError("the estimate is one for checkpointed layers only")
    sizes, batch, size = setting.sizes, setting.batch, setting.size
    vit_tokens = batch.images * (1 + sizes.patches)
    kept = (
        batch.tokens * sizes.hidden * sizes.language.layers + vit_tokens * sizes.vit.hidden * sizes.vit.layers
    ) * size
    layers = (
        batch.tokens * (4 * sizes.hidden + (8 * sizes.hidden + 5 * sizes.inner) / parts),
        vit_tokens * (4 * sizes.vit.hidden + (8 * sizes.vit.hidden + 3 * sizes.vit_inner) / parts),
    )
    logits = batch.tokens * sizes.vocabulary * (2 * size + 2 * 4)
    return kept + max(*(one * size for one in layers), logits)

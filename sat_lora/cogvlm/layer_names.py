"""What the name of a layer says about it, for checkpoints that are read without building the model."""

import math
import re

from sat_lora.lora.config import SLOTS
from sat_lora.parallel.sharding import REPLICATED, Sharding

_KINDS = {
    r"mixins\.eva\.linear_proj\..*": "linear",
    r"mixins\.eva\.vit_model\.mixins\.patch_embedding\.proj": "conv",
    r"mixins\.eva\.conv|mixins\.encoder\.vit\.model\.patch_embed\.proj": "conv",
    r"mixins\.encoder\.vit\.model\.(head|blocks\.\d+\.(attn\.[qkv_]*proj|mlp\.w\d))": "linear",
    r".*position_embeddings": "embedding",
    r".*word_embeddings": "vocab",
    r".*cross_attention\.(query|key_value)": "column",
    r".*(query_key_value|dense_h_to_4h|gate_proj|lm_head)(_list)?(\.\d+)?": "column",
    r".*(dense|dense_4h_to_h)(_list)?(\.\d+)?": "row",
}
_PARALLEL_VOCABULARY = 1000  # SAT's word embedding is a plain nn.Embedding below it


def is_fused(name: str) -> bool:
    """Return whether the layer of that SAT name computes q, k and v at once."""
    return "query_key_value" in name


def kind_named(name: str, rows: int) -> str | None:
    """Return the name of the layer's kind (see `lora.deltas.layers`); None for a layer without one.

    rows: the first size of its weight.
    """
    kind = next((kind for pattern, kind in _KINDS.items() if re.fullmatch(pattern, name)), None)
    return "embedding" if kind == "vocab" and rows < _PARALLEL_VOCABULARY else kind


def slots_named(name: str) -> tuple[str, ...]:
    """Return the slots that the layer of that SAT name computes at once: q, k, v, or k and v of cross-attention."""
    if is_fused(name):
        return SLOTS
    return SLOTS[1:] if name.endswith(".cross_attention.key_value") else ()


def slot_spans(name: str, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """Return the rows (start, stop) of the whole weight (rows, columns) that belong to each slot of that layer.

    There are as many rows of q as columns; k and v have the rest, which is less where several heads share a key.
    """
    slots = slots_named(name)
    first = columns if len(slots) == len(SLOTS) else 0
    each = (rows - first) // 2
    sizes = [first, each, each][len(SLOTS) - len(slots) :]
    edges = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    return {slot: (edges[number], edges[number + 1]) for number, slot in enumerate(slots)}


def has_bias(name: str) -> bool:
    """Return whether the module of that SAT name has a bias beside its weight in every family."""
    inside_vit = name.startswith("mixins.eva.vit_model.") and not name.endswith("embeddings")
    inside_encoder = name.startswith("mixins.encoder.") and not re.search(r"\.[qkv]_proj$", name)
    return inside_vit or inside_encoder or name in ("mixins.eva.linear_proj.norm1", "mixins.eva.conv")


def sharding_named(parameter: str, rows: int, columns: int | None = None) -> Sharding:
    """Return how SAT cuts the parameter of that name. rows: its first size, whole.

    columns: of the weight of its layer; None where q, k and v are known to be of one size.
    """
    layer, _, leaf = parameter.rpartition(".")
    kind = kind_named(layer, rows)
    if kind == "column":
        if columns is None or not is_fused(layer):
            return Sharding(0, (1,) * max(1, len(slots_named(layer))))
        sizes = [stop - start for start, stop in slot_spans(layer, rows, columns).values()]
        divisor = math.gcd(*sizes) or 1
        return Sharding(0, tuple(size // divisor for size in sizes))
    if leaf == "weight" and kind in ("row", "vocab"):
        return Sharding(1 if kind == "row" else 0)
    return REPLICATED

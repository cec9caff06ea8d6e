"""What the name of a CogVLM layer says about it, for checkpoints that are read without building the model."""

import re

from sat_lora.parallel.sharding import REPLICATED, Sharding

_KINDS = {
    r"mixins\.eva\.linear_proj\..*": "linear",
    r"mixins\.eva\.vit_model\.mixins\.patch_embedding\.proj": "conv",
    r".*position_embeddings": "embedding",
    r".*word_embeddings": "vocab",
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


def has_bias(name: str) -> bool:
    """Return whether the module of that SAT name has a bias beside its weight."""
    inside_vit = name.startswith("mixins.eva.vit_model.") and not name.endswith("embeddings")
    return inside_vit or name == "mixins.eva.linear_proj.norm1"


def sharding_named(parameter: str, rows: int) -> Sharding:
    """Return how SAT cuts the parameter of that name. rows: its first size, whole."""
    layer, _, leaf = parameter.rpartition(".")
    kind = kind_named(layer, rows)
    if kind == "column":
        return Sharding(0, (1, 1, 1)) if is_fused(layer) else Sharding(0)
    if leaf == "weight" and kind in ("row", "vocab"):
        return Sharding(1 if kind == "row" else 0)
    return REPLICATED

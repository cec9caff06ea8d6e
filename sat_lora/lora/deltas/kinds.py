"""Which kinds of layer take a delta, by the names that adapter files have for them."""

from torch import nn

from sat_lora.lora.deltas.layers import Column, Convolution, Embedding, Kind, Linear, Row, VocabEmbedding

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (Column(), Row(), Linear(), Convolution(), Embedding(), VocabEmbedding())
}


def kind_of(layer: nn.Module) -> Kind | None:
    """Return the kind of a layer, None for one that takes no delta.

    The kind of the nearest class that it is made from counts: a subclass may have one of its own.
    """
    by_class = {owner: kind for kind in KINDS.values() for owner in kind.layers}
    return next((by_class[owner] for owner in type(layer).__mro__ if owner in by_class), None)

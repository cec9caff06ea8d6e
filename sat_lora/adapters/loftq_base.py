"""The base that an adapter of LoftQ was trained beside: Q_T + scale * B_0 A_0, made again of the base's own weights.

The file of such an adapter is a plain LoRA, right on any base; its second half is the pair that it began with, and its
note on the quantisation has the rounds, of which T - 1 are computed anew, see `lora.deltas.loftq`.
"""

from pathlib import Path

import torch
from torch import nn

from sat_lora.adapters.format import SavedAdapter
from sat_lora.adapters.read import about_adapter
from sat_lora.errors import AdapterError
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.config import LOFTQ, MOST_ROUNDS, LoraConfig
from sat_lora.lora.deltas import loftq
from sat_lora.lora.deltas.delta import Delta
from sat_lora.quantized.layers import quantized_weight_of
from sat_lora.quantized.quantized_weight import LowRank, QuantizedWeight
from sat_lora.quantized.schemes import Scheme

ROUNDS = "loftq_iter"
"""The key of the note on a base's quantisation that says that it was LoftQ's."""


def note_rounds(config: LoraConfig) -> dict[str, int]:
    """Return what the note on the quantisation says beyond that of the base, for an adapter of that config."""
    return {ROUNDS: config.loftq_iter} if config.init_lora_weights == LOFTQ else {}


def rounds_of(saved: SavedAdapter, source: str | Path) -> int | None:
    """Return the rounds of LoftQ with which the adapter began; None where it began otherwise.

    Raises AdapterError where the note, or the ranks, cannot be of LoftQ.
    """
    rounds = (saved.base_quantization or {}).get(ROUNDS)
    if rounds is None:
        return None
    if type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS or any(e.r % 2 for e in saved.layers.values()):
        raise AdapterError(
            f"{source}: its note says {ROUNDS} {rounds!r}, which has to be a whole number from 1 to {MOST_ROUNDS}, of "
            "pairs of even rank"
        )
    return rounds


def origin_of(delta: Delta, slots_count: int) -> Delta:
    """Return the pair that an adapter began with, of the delta of all slots in its file: B A - B_0 A_0."""
    rank = delta.b.shape[1] // 2
    a = delta.a.view(slots_count, 2, rank, -1)[:, 1].flatten(0, 1)
    return Delta(a, -delta.b[:, rank:], delta.scale)


@torch.no_grad()
def approximate_base(model: nn.Module, folder: str | Path, *, name: str = "lora") -> bool:
    """Let the quantised base be the one that the adapter in FOLDER, loaded as `name`, was trained beside.

    It returns whether there was anything to do: an adapter that LoftQ began, beside weights of the scheme of its note.
    Every model-parallel rank has to call it. Raises AdapterError for a note of nonsense, ConfigError where the weights
    that were quantised are not to be had any more.
    """
    saved = about_adapter(folder)
    rounds = rounds_of(saved, folder)
    scheme = (saved.base_quantization or {}).get("scheme")
    is_done = False
    for adapter in adapters_of(model, name).values():
        layer = adapter.target.site.module
        weight = quantized_weight_of(layer)
        if rounds is None or weight is None or weight.scheme.name != scheme:
            continue
        origin = origin_of(adapter.delta(), adapter.target.slots_count)
        encoded = adapter.encoded_part(layer, adapter.delta_rank // 2, rounds)
        adapter.approximate(layer, encoded, origin.a.contiguous(), origin.b.contiguous())
        is_done = True
    return is_done


def approximated(
    weight: torch.Tensor, layer: str, scheme: Scheme, block: int, saved: SavedAdapter, rounds: int
) -> torch.Tensor:
    """Return Q_T + scale * B_0 A_0 of a whole weight (out, in) that an adapter of LoftQ adapts, in its dtype.

    block: in which it is encoded.
    """
    entry = saved.layers[layer]
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    encoded = loftq.encoded_part(matrix, entry.rows, scheme, block, rank=entry.r // 2, rounds=rounds)
    origin = origin_of(saved.delta_of(layer).to(weight.dtype), max(1, len(entry.slots)))
    quantized = QuantizedWeight.of(encoded, scheme, f"{layer}.weight", block).to(weight.dtype)
    quantized.low_rank = LowRank(origin.b, origin.a, entry.scale, entry.rows)
    return quantized.decoded()

"""The base that an adapter of LoftQ was trained beside: Q_T + scale * B_0 A_0, made again of the base's own weights.

The file of such an adapter is a plain LoRA, right on any base; its second half is the pair that it began with, and its
note on the quantisation has the rounds, of which T - 1 are computed anew, see `lora.deltas.loftq`.

A model holds one base. So adapters answer beside each other where they share it, as steps of one run do; or where none
has one of its own, on weights that are whole or held by another scheme than it was trained beside.
"""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from sat_lora.adapters.format import SavedAdapter
from sat_lora.adapters.read import about_adapter, read_adapter
from sat_lora.cogvlm.checkpoints.load import open_folder
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.config import LOFTQ, MOST_ROUNDS, LoraConfig
from sat_lora.lora.deltas import loftq
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.mixin import lora_mixins
from sat_lora.printable import printable
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


def refuse_other_bases(
    folders: Mapping[str, str | Path], base: str | Path, quantize: str | None, *, trust: bool = False
) -> None:
    """Raise ConfigError, before the base is loaded, where adapters would answer on another one than they were trained
    beside, since LoftQ began one of them.

    folders: of the adapters, by name. base: its folder. quantize: the scheme by which weights are encoded as they are
    read; None: they are held as they lie there. trust: see `map_weights`.
    Raises AdapterError where an adapter cannot be read, or its note is nonsense, CheckpointError where the base cannot.
    """
    note = open_folder(base, trust=trust).note() if folders else None
    scheme = quantize if note is None else note.quantization.scheme
    if scheme is None:
        return
    for folder in folders.values():
        if note is not None and _rounds_beside(folder, (scheme,)) is not None:
            held = {f"{layer}.weight" for layer in about_adapter(folder).layers} & set(note.weights)
            if held:
                raise ConfigError(
                    f"--from_pretrained: {printable(base)} holds codes alone, and {printable(folder)} was begun by "
                    "loftq, beside a base that is made of what they miss; give the base that it was made of, with "
                    f"--quantize {scheme} for what the adapter was trained beside"
                )
    refuse_mixed_bases(folders, (scheme,))


def refuse_mixed_bases(folders: Mapping[str, str | Path], schemes: Collection[str]) -> None:
    """Raise ConfigError for adapters of which LoftQ began one, beside weights of a scheme that is among `schemes`, and
    another was trained beside another base: a model holds one.

    folders: of the adapters, by name. Raises AdapterError where one cannot be read, or its note is nonsense.
    """
    begun = [folder for folder in folders.values() if _rounds_beside(folder, schemes) is not None]
    if not begun or len(folders) == 1:
        return
    own = _mark_of_base(begun[0], schemes)
    other = next((folder for folder in folders.values() if _mark_of_base(folder, schemes) != own), None)
    if other is not None:
        raise ConfigError(
            f"--adapter: {printable(begun[0])} was begun by loftq, beside a base of its own, which is not that of "
            f"{printable(other)}; give one of them, or answer on the whole base (--quantize none)"
        )


def _rounds_beside(folder: str | Path, schemes: Collection[str]) -> int | None:
    """Return the rounds of LoftQ with which the adapter began beside weights of one of these schemes; None where it
    began otherwise, and answers on whatever the base is held in.
    """
    about = about_adapter(folder)
    rounds = rounds_of(about, folder)
    return rounds if (about.base_quantization or {}).get("scheme") in schemes else None


def _mark_of_base(folder: str | Path, schemes: Collection[str]) -> str | None:
    """Return a mark of the base that an adapter was trained beside, alike for those that share one; None where that
    is the codes of the base itself.
    """
    rounds = _rounds_beside(folder, schemes)
    if rounds is None:
        return None
    saved = read_adapter(folder)
    digest = hashlib.sha256(f"{rounds} {sorted(saved.layers.items())}".encode())
    for name, entry in sorted(saved.layers.items()):
        origin = origin_of(saved.delta_of(name), max(1, len(entry.slots)))
        for factor in (origin.a, origin.b):
            digest.update(factor.double().contiguous().numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()


@torch.no_grad()
def approximate_base(model: nn.Module, folder: str | Path, *, name: str = "lora") -> bool:
    """Let the quantised base be the one that the adapter in FOLDER, loaded as `name`, was trained beside.

    It returns whether there was anything to do: an adapter that LoftQ began, beside weights of the scheme of its note.
    Every model-parallel rank has to call it. Raises AdapterError for a note of nonsense, ConfigError where the weights
    that were quantised are not to be had any more, or are the base of another adapter and would become another one.
    """
    adapters = adapters_of(model, name)
    layers = {path: adapter.target.site.module for path, adapter in adapters.items()}
    weights = {path: weight for path, layer in layers.items() if (weight := quantized_weight_of(layer)) is not None}
    if not weights:
        return False
    saved = about_adapter(folder)
    rounds = rounds_of(saved, folder)
    scheme = (saved.base_quantization or {}).get("scheme")
    if rounds is None:
        return False
    names = {key.rpartition("mixins.")[2] for key in lora_mixins(model)} - {name}
    shared = {path for other in names for path in adapters_of(model, other)}
    is_done = False
    for path, weight in weights.items():
        if weight.scheme.name != scheme:
            continue
        adapter = adapters[path]
        before = weight.clone() if path in shared else None
        origin = origin_of(adapter.delta(), adapter.target.slots_count)
        encoded = adapter.encoded_part(layers[path], adapter.delta_rank // 2, rounds)
        adapter.approximate(layers[path], encoded, origin.a.contiguous(), origin.b.contiguous())
        if before is not None and not torch.equal(weight, before):
            weight.take(before)
            raise ConfigError(
                f"{printable(folder)} was begun by loftq, beside a base of its own, and {path} has another adapter, "
                "beside another base; load it into a model that has none, or into whole weights"
            )
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

"""The adapter on disk, without a model.

FOLDER/adapter_model.safetensors   whole tensors, whatever the parallel layout was:
                                   `<layer>.lora_A` (r, in), `<layer>.lora_B` (out, r), with DoRA
                                   `<layer>.lora_magnitude` (out,); for q/k/v slots `<layer>.q.lora_A` and so on;
                                   and parameters of the base that were trained whole, under their own names
FOLDER/adapter_config.json         the LoraConfig, and under `sat_lora` the format version, for every layer its kind,
                                   rank, scale, slots and their rows, the names of what was trained whole, the
                                   fingerprint of the base model (its names and shapes) and under `base` what the base
                                   was: name of its folder, family, number of parameters, and some of its values, see
                                   `base_identity`; where the base was quantised, under `base_quantization` how, which
                                   nobody has to obey; of adapters combined, where it was so for all of them
FOLDER/README.md                   for people, see `card`; nothing reads it

It is always a plain LoRA for the original base: what PiSSA and OLoRA take from the base is subtracted in the pair.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from sat_lora.adapters.card import Section, write_card
from sat_lora.files.atomic import replaced_folder
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.config import DTYPES, LoraConfig
from sat_lora.lora.deltas.delta import Delta

FORMAT_VERSION = 2
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SAT_WEIGHTS = "mp_rank_*_model_states.pt"  # of a whole model, which may have an adapter in it: see `whole_model`
PAIR = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude"
LARGEST_SCALE = torch.finfo(torch.float32).max
TENSOR_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """What the file says about one adapted layer."""

    kind: str
    r: int
    scale: float
    slots: tuple[str, ...]
    rows: tuple[tuple[int, int], ...]  # of the whole weight as a matrix (see `lora.deltas.layers`), one range per slot

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerEntry":
        """Return the entry of a layer's JSON object. Raises ValueError, TypeError or LookupError if it is none."""
        kind = values["kind"]
        rank = values["r"]
        scale = values["scale"]
        slots = strings_of(values["slots"])
        rows = tuple((start, stop) for start, stop in values["rows"])
        if not isinstance(kind, str) or len(set(slots)) != len(slots):
            raise ValueError(f"kind {kind!r} with slots {slots}")
        if any(type(number) is not int for number in (rank, *sum(rows, ()))):
            raise TypeError(f"r {rank!r} and rows {rows} have to be whole numbers")
        if rank < 1 or any(not 0 <= start < stop for start, stop in rows):
            raise ValueError(f"r {rank} and rows {rows}")
        if type(scale) not in (int, float) or not abs(scale) <= LARGEST_SCALE:
            raise ValueError(f"scale {scale!r} is no finite number")
        if len(rows) != max(1, len(slots)):
            raise ValueError(f"{len(slots)} slots, {len(rows)} ranges of rows")
        return cls(kind, rank, float(scale), slots, rows)


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter as its folder holds it."""

    config: LoraConfig
    base_fingerprint: str
    layers: dict[str, LayerEntry]
    trained: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    base: BaseIdentity | None = None  # None: an adapter of a version that did not know
    base_quantization: Mapping[str, Any] | None = None  # as Quantization has it; None: no one scheme

    @property
    def base_title(self) -> str:
        """The base, for people."""
        return self.base.title if self.base else "a base that it does not name"

    def of_layer(self, name: str) -> dict[str, torch.Tensor]:
        """Return a layer's tensors by leaf, slots stacked: A (slots * r, in), B (rows, r), magnitude (rows,) of
        DoRA.
        """
        leaves = (*PAIR, MAGNITUDE) if self.config.use_dora else PAIR
        return {leaf: self._stacked(name, leaf) for leaf in leaves}

    def delta_of(self, name: str) -> Delta:
        """Return the delta of all slots of that layer."""
        a, b = (self._stacked(name, leaf) for leaf in PAIR)
        return Delta(a, b, self.layers[name].scale)

    def magnitude_of(self, name: str) -> torch.Tensor | None:
        """Return DoRA's magnitude (rows of all slots,) of that layer; None without DoRA."""
        return self._stacked(name, MAGNITUDE) if self.config.use_dora else None

    def _stacked(self, name: str, leaf: str) -> torch.Tensor:
        return torch.cat([self.tensors[key] for key in self.keys(name, leaf)])

    def keys(self, name: str, leaf: str) -> list[str]:
        """Return the names of a layer's tensors of that leaf, slot by slot."""
        return [f"{name}.{slot}.{leaf}" for slot in self.layers[name].slots] or [f"{name}.{leaf}"]

    def expected(self, in_features: dict[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes, by key, that the tensors of those layers have to have, given the layers' `in`."""
        shapes = {}
        for name, entry in ((name, self.layers[name]) for name in in_features):
            for number, (start, stop) in enumerate(entry.rows):
                rows = stop - start
                leaves = {PAIR[0]: (entry.r, in_features[name]), PAIR[1]: (rows, entry.r), MAGNITUDE: (rows,)}
                for leaf in leaves if self.config.use_dora else PAIR:
                    shapes[self.keys(name, leaf)[number]] = leaves[leaf]
        return shapes


def cut_slots(
    name: str, slots: tuple[str, ...], rows: list[int], stacked: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, by key, for the stacked ones of a layer (see `SavedAdapter.of_layer`)."""
    if not slots:
        return {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in stacked.items()}
    rank = stacked[PAIR[0]].shape[0] // len(slots)
    return {
        f"{name}.{slot}.{leaf}": part.contiguous()
        for leaf, tensor in stacked.items()
        for slot, part in zip(slots, tensor.split(rank if leaf == PAIR[0] else rows))
    }


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the config of the plain LoRA that stands for one of `config`: of twice the rank for PiSSA and OLoRA."""
    if not config.takes_from_base:
        return config
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init_lora_weights="kaiming",
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
    )


def write_adapter(folder: str | Path, adapter: SavedAdapter, sections: Sequence[Section] = ()) -> None:
    """Write the folder; a reader sees the old one or the new one, never a torn one.

    sections: what the card says beside what is saved. A card there that somebody has edited stays. Raises OSError if
    it cannot be written.
    """
    config = {
        "peft_type": "LORA",
        **adapter.config.to_dict(),
        "sat_lora": {
            "format_version": FORMAT_VERSION,
            "base_fingerprint": adapter.base_fingerprint,
            **({} if adapter.base is None else {"base": adapter.base.to_dict()}),
            **({} if adapter.base_quantization is None else {"base_quantization": adapter.base_quantization}),
            "layers": {name: dataclasses.asdict(entry) for name, entry in sorted(adapter.layers.items())},
            "trained": sorted(adapter.trained),
        },
    }
    with replaced_folder(folder) as temporary:
        try:  # unlike `save`, it lets other threads run meanwhile
            save_file(dict(sorted(adapter.tensors.items())), temporary / WEIGHTS, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_card(temporary, adapter, sections, Path(folder))


def strings_of(values: object) -> tuple[str, ...]:
    """Return the texts of a list in a file. Raises TypeError if it is no list of texts."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"wanted a list of texts, got {brief(repr(values))}")
    return tuple(values)


def brief(text: str) -> str:
    """Return the text, shortened: a damaged file may put anything of any length into a message."""
    return text if len(text) <= 500 else text[:500] + " ..."


def __getattr__(name: str) -> Any:
    """Return what `read` has: reading was in this module before, under its old name `sat_lora.adapter_format` too."""
    from sat_lora.adapters import read

    if name.startswith("_") or not hasattr(read, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(read, name)

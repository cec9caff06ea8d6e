"""How the weights of a quantised base lie in a SAT folder.

FOLDER/model_config.json   under `quantization` the format version, the scheme and patterns as Quantization has them,
                           the dtype to decode to, the names of the quantised weights, and the base that it was made of
FOLDER/<latest>/...        in the place of each of these weights two tensors, NAME.codes and NAME.scales

They are plain tensors, and their rows are those of the weight: the folder is cut for any number of ranks like another.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sat_lora.errors import CheckpointError, ConfigError
from sat_lora.files.foreign import read_json
from sat_lora.files.patterns import shortened
from sat_lora.files.weight_files import Layout
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.config import DTYPES
from sat_lora.printable import printable
from sat_lora.quantization.config import Quantization
from sat_lora.quantized.quantized_weight import QuantizedWeight, parts_problem
from sat_lora.quantized.schemes import block_for

KEY = "quantization"
FORMAT_VERSION = 1
CODES = ".codes"
SCALES = ".scales"


@dataclass(frozen=True, kw_only=True)
class QuantizationNote:
    """What the config of a quantised base says about its weights."""

    quantization: Quantization
    dtype: torch.dtype
    weights: tuple[str, ...]
    base: BaseIdentity

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {
            "format_version": FORMAT_VERSION,
            **self.quantization.to_dict(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": list(self.weights),
            "base": {"fingerprint": self.base.fingerprint, **self.base.to_dict()},
        }


def note_in(config: Mapping[str, Any], path: Path) -> QuantizationNote | None:
    """Return the note in a model's config; None where it has none. Raises CheckpointError for one that is no note.

    path: of the folder, for the error.
    """
    if KEY not in config:
        return None
    content = config[KEY]
    try:
        if not isinstance(content, dict):
            raise ValueError(f"wanted an object, got {shortened(content)}")
        version = content["format_version"]
        if type(version) is not int:  # true and 1.0 are equal to 1
            raise ValueError(f"wanted a whole number for its format_version, got {shortened(version)}")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: it was quantised in format version {shortened(version)}, this sat_lora reads "
                f"{FORMAT_VERSION}; quantise the base anew: sat-lora quantize --base BASE --out DIR"
            )
        base = dict(content["base"])
        dtype = content["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"there is no dtype {shortened(dtype)}, only {', '.join(DTYPES)}")
        weights = content["weights"]
        if not isinstance(weights, list) or not all(isinstance(name, str) for name in weights):
            raise ValueError(f"no names of weights, but {shortened(weights)}")
        if not weights:
            raise ValueError("no names of weights, but an empty list")
        (twice, times), *_ = Counter(weights).most_common(1)
        if times > 1:
            raise ValueError(f"the weight {shortened(twice)} is named {times} times")
        return QuantizationNote(
            quantization=Quantization.from_dict(content),
            dtype=getattr(torch, content["dtype"]),
            weights=tuple(weights),
            base=BaseIdentity.from_dict(str(base.pop("fingerprint")), base),
        )
    except (ConfigError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{path}: `{KEY}` in its model_config.json is not what `sat-lora quantize` writes: {printable(problem)}"
        ) from error


def note_of_folder(folder: str | Path) -> QuantizationNote | None:
    """Return the note of a model folder, or of a model_config.json; None where there is none, or nothing can be read:
    that is told where the folder is opened. Raises CheckpointError as `note_in`.
    """
    path = Path(folder)
    try:
        config = read_json(path if path.suffix == ".json" else path / "model_config.json")
    except (OSError, ValueError):
        return None
    return note_in(config, path) if isinstance(config, dict) else None


def joined(state: Mapping[str, Any], note: QuantizationNote, file: Path) -> dict[str, Any]:
    """Return a state dict with a QuantizedWeight, of mapped parts, for each pair of codes and scales.

    Raises CheckpointError where they are not there, or do not belong together.
    """
    joined_state = dict(state)
    problems: list[str] = []
    for name in note.weights:
        codes = joined_state.pop(name + CODES, None)
        scales = joined_state.pop(name + SCALES, None)
        if not isinstance(codes, torch.Tensor) or not isinstance(scales, torch.Tensor):
            problems.append(f"{printable(name)}: no codes and scales")
            continue
        problem = parts_problem(codes, scales, note.quantization.weight_scheme)
        if problem:
            problems.append(f"{printable(name)}: {problem}")
            continue
        joined_state[name] = QuantizedWeight(codes, scales, note.quantization.weight_scheme, note.dtype)
    unnamed = names_of_codes(joined_state)
    problems += [f"{printable(name)}: codes and scales, and no name among its weights" for name in unnamed]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{file}: it does not hold what its config says: {'; '.join(problems[:8])}{more}")
    return joined_state


def names_of_codes(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the weights of which a state dict holds codes and scales."""
    names = [name.removesuffix(CODES) for name in state if isinstance(name, str) and name.endswith(CODES)]
    return [name for name in names if name + SCALES in state]


def refuse_codes(state: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError where a state dict, of whose weights no config says that they are quantised, has codes."""
    names = names_of_codes(state)
    if names:
        raise CheckpointError(
            f"{file}: {len(names)} of its weights are quantised ({printable(names[0])}, ...), and the config beside it "
            f"says nothing of that: `{KEY}` is missing in model_config.json; copy that again, or quantise the base "
            "anew: sat-lora quantize --base BASE --out DIR"
        )


def quantized_layout(layout: Layout, note: QuantizationNote) -> Layout:
    """Return the names, shapes and dtypes of the files, from those of the whole weights."""
    scheme = note.quantization.weight_scheme
    quantized: Layout = {}
    for name, (shape, dtype) in layout.items():
        block = block_for(shape[1]) if name in note.weights else None
        if block is None:
            quantized[name] = (shape, dtype)
            continue
        rows, columns = shape
        quantized[name + CODES] = ((rows, columns // scheme.elements_per_code), scheme.codes_dtype)
        quantized[name + SCALES] = ((rows, columns // block), torch.bfloat16)
    return quantized

"""A quantised base, written once from a SAT or Hugging Face folder; loading it then encodes nothing."""

from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.beside import copy_beside
from sat_lora.cogvlm.checkpoints.hugging_face_folder import CONFIG
from sat_lora.cogvlm.checkpoints.quantized_files import CODES, KEY, SCALES, QuantizationNote, quantized_layout
from sat_lora.cogvlm.checkpoints.sat_folder import make_sat_weights
from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.errors import CheckpointError
from sat_lora.files.atomic import replaced_folder
from sat_lora.quantization.config import Quantization
from sat_lora.quantization.select import select_layers
from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.terminal.progress import Progress


def quantize_base(
    base: str | Path,
    out: str | Path,
    quantization: Quantization,
    *,
    device: torch.device | str = "cpu",
    trust: bool = False,
    progress: Progress[str] = iter,
) -> list[str]:
    """Write OUT, a SAT folder of the base with quantised weights; return remarks on what was left out beside it.

    One tensor at a time is read, and encoded on the device. The other weights, the dtype and what lies beside are the
    base's. trust: see `map_weights`. progress: goes through the tensors' names, as tqdm does. Raises CheckpointError if
    a folder is wrong or cannot be written, ConfigError as `select_layers`, QuantizationError where a value is not
    finite. OUT is not there then.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"--out: {out} exists; give a new folder")
    weights = BaseWeights(base, trust=trust)
    if weights.note is not None:
        raise CheckpointError(f"--base: {base} is quantised already, to {weights.note.quantization.scheme}")
    layers = select_layers(build_cogvlm(weights.config, device="meta"), quantization)
    names = tuple(f"{name}.weight" for name in layers)
    note = QuantizationNote(
        quantization=quantization, dtype=weights.layout[names[0]][1], weights=names, base=weights.identity
    )
    try:
        with replaced_folder(out) as temporary:
            config = {**weights.config, KEY: note.to_dict()}
            (part,) = make_sat_weights(temporary, config, [quantized_layout(weights.layout, note)])
            for name in progress(weights.layout):
                if name not in names:
                    part[name].copy_(weights[name])
                    continue
                encoded = QuantizedWeight.of(weights[name].to(device), quantization.weight_scheme, name)
                part[name + CODES].copy_(encoded.codes)
                part[name + SCALES].copy_(encoded.scales)
            return copy_beside(Path(base), temporary, without={CONFIG})
    except (OSError, RuntimeError) as error:  # torch meets a full disk with a RuntimeError
        raise CheckpointError(f"--out: {out} cannot be written: {error}") from error

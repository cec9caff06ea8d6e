"""The whole state of a SAT folder, for what goes by names and shapes."""

from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoint import map_weights, weight_files
from sat_lora.errors import CheckpointError


def whole_state(base: str | Path) -> dict[str, torch.Tensor]:
    """The mapped tensors of an uncut SAT folder by name. CheckpointError: it is none, or is cut for several ranks."""
    files = weight_files(base)
    if len(files) > 1:
        raise CheckpointError(f"--base: {base} is cut for {len(files)} model-parallel ranks; give the whole checkpoint")
    return map_weights(files[0])

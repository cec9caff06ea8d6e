"""Weight files that are made first and filled afterwards, tensor by tensor, through a shared mapping.

What is written goes to the file's pages and not to the process's own memory, so a file may be larger than the memory.
The disk space is taken when the file is made: a full disk is an OSError there, and no signal later.
"""

import json
import math
import mmap
import os
from pathlib import Path

import torch

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Names, shapes and dtypes."""

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def make_sat_file(path: str | Path, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors, to be written to, of a new SAT checkpoint file, a state dict under `module`.

    Raises OSError if the disk is full.
    """
    with torch.serialization.skip_data():  # which leaves their place in the file, and out of its checksums
        torch.save({"module": {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}}, path)
    _take_space(path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["module"]
    return tensors


def make_safetensors_file(path: str | Path, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors, to be written to, of a new safetensors file. Raises OSError if the disk is full.

    The widest dtypes come first, so that each tensor is aligned.
    """
    names = sorted(layout, key=lambda name: (-layout[name][1].itemsize, name))
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in names:
        shape, dtype = layout[name]
        places[name] = (end, end + math.prod(shape) * dtype.itemsize)
        end = places[name][1]
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": list(places[name])
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
    _take_space(path)
    content = torch.from_file(str(path), shared=True, size=start + end, dtype=torch.uint8)[start:]
    return {name: content[slice(*places[name])].view(layout[name][1]).view(layout[name][0]) for name in layout}


def _take_space(path: str | Path) -> None:
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))

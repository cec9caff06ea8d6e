"""What lies beside the weights of a base, and goes with a model that is made of it."""

import shutil
from collections.abc import Collection
from pathlib import Path

from sat_lora.cogvlm.checkpoints.hugging_face_folder import INDEX
from sat_lora.printable import printable

_OF_WEIGHTS = {"latest", "model_config.json", INDEX, "pytorch_model.bin.index.json"}  # beside files with these endings
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"}


def copy_beside(base: Path, out: Path, *, without: Collection[str] = ()) -> list[str]:
    """Copy the tokenizer and whatever else lies beside the weights; return remarks on what is left out.

    No link is followed out of the base's folder: whoever made the folder would choose which of the reader's files the
    merged model is passed on with. The cache of Hugging Face is one folder in this, its files being links into `blobs`.
    """
    left_out = []
    for path in sorted(base.iterdir()):
        if path.name in _OF_WEIGHTS or path.name in without or path.suffix.lower() in _WEIGHT_SUFFIXES:
            continue
        if path.is_symlink() and not _stays_inside(path):
            left_out.append(printable(path.name))
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    if not left_out:
        return []
    return [f"left out, links that lead out of {printable(base)}: {', '.join(left_out)}; copy what they name yourself"]


def _stays_inside(link: Path) -> bool:
    """Return whether a link leads to something in its own folder, or in the `blobs` of a cache of Hugging Face."""
    folder = link.parent.resolve()
    blobs = folder.parent.parent / "blobs"
    homes = [folder, blobs] if folder.parent.name == "snapshots" else [folder]
    try:
        target = link.resolve(strict=True)
        return any(target.is_relative_to(home) for home in homes)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return False

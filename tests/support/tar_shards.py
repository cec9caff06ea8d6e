"""Tar shards for tests."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def png(colour=(9, 90, 200)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (21, 21), colour).save(content, "png")
    return content.getvalue()


def write_shard(path: Path, *members: tuple[str, str | bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_numbered_shards(folder: Path, sizes: list[int]) -> list[Path]:
    """Shards of samples whose answers are 0, 1, 2, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first, image = [], 0, png()
    for number, size in enumerate(sizes):
        answers = range(first, first + size)
        members = [(f"{n:06}.{kind}", content) for n in answers for kind, content in (("png", image), ("txt", str(n)))]
        paths.append(write_shard(folder / f"s-{number:03}.tar", *members))
        first += size
    return paths

"""Room for what a run keeps in shared memory and on disk."""

import math
import os
import tempfile
from pathlib import Path

from sat_lora.findings.finding import Finding, looks_for

PREFETCHED = 2  # batches that each worker of torch's DataLoader keeps ready


@looks_for("shared-memory")
def shared_memory_findings(
    num_workers: int, batch_bytes: int, ranks_here: int, path: str | Path = "/dev/shm"
) -> list[Finding]:
    """Return a finding if `path` has no room for the batches that data workers hold ready.

    num_workers: of one rank. batch_bytes: of a collated batch. ranks_here: ranks on this machine.
    """
    if num_workers == 0:
        return []
    needed = ranks_here * num_workers * PREFETCHED * batch_bytes
    need = (
        f"{ranks_here} ranks x {num_workers} workers x {PREFETCHED} batches of {_size(batch_bytes)} take "
        f"{_size(needed)}"
    )
    try:
        whole, free = _whole_and_free(path)
    except OSError as error:
        seen = f"{path} cannot be looked at ({error.strerror}); {need} there"
        return [Finding(code="shared-memory", seen=seen, file=str(path), option="--num-workers")]
    if needed <= free:
        return []
    seen = f"{path} has {_size(free)} free of {_size(whole)}; {need}"
    fix = f"start the container with --shm-size {math.ceil(2 * needed / 2**30)}g, or use --num-workers 0"
    if whole >= 2 * needed:
        fix = f"remove what dead processes have left in {path}, or use --num-workers 0"
    return [Finding(code="shared-memory", seen=seen, file=str(path), option="--num-workers", fix=fix)]


@looks_for("disk-space")
def disk_findings(
    folder: str | Path, bytes_per_save: int, keep: int, *, checkpoint_bytes: int = 0, saves: int = 1
) -> list[Finding]:
    """Return a finding if a run cannot write its adapters and its checkpoint below `folder`.

    The folder need not be there yet. bytes_per_save: of one adapter. keep: adapters that stay, 0 for all of the run's
    `saves`; beside them there are the best one and the one that is being written. checkpoint_bytes: of one checkpoint,
    of which there are three while a new one is written. What the folder holds already is replaced, and counts as free.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        seen = f"nothing can be written in {place}: {error.strerror}"
        fix = "name another folder with --save, or change its owner or rights"
        return [Finding(code="disk-space", seen=seen, file=str(folder), option="--save", fix=fix)]
    adapters = (keep or max(saves, 1)) + 2
    needed = adapters * bytes_per_save + 3 * checkpoint_bytes
    _, free = _whole_and_free(place)
    replaced = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    if needed <= free + replaced:
        return []
    seen = (
        f"{place} has {_size(free)} free; {adapters} adapters of {_size(bytes_per_save)} and three checkpoints of "
        f"{_size(checkpoint_bytes)} take {_size(needed)}"
    )
    return [Finding(code="disk-space", seen=seen, file=str(folder), option="--save")]


def _whole_and_free(path: str | Path) -> tuple[int, int]:
    """Return (bytes of the file system, those that this user may still take). Raises OSError without such a path."""
    stat = os.statvfs(path)
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"

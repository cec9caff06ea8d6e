"""Tar shards as WebDataset lays them out: named, counted, and read sample by sample."""

import itertools
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from sat_lora.errors import DataError
from sat_lora.foreign import printable
from sat_lora.training.data import IMAGE_SUFFIXES, BrokenSample, Item
from sat_lora.training.distributed import gather_lists
from sat_lora.training.item_files import read_object
from sat_lora.training.item_keys import METADATA_OF_SHARDS, key_problems


@dataclass(frozen=True)
class Shard:
    """A tar file and the number of samples in it."""

    path: str
    samples: int


@dataclass(frozen=True)
class Record:
    """Where a sample lies in its shard: (suffix, first byte, bytes) of each of its members.

    ignored: keys of its json to pass over, beside those that are known to carry nothing to learn.
    """

    shard: str
    key: str
    members: tuple[tuple[str, int, int], ...]
    ignored: tuple[str, ...] = ()

    def read(self) -> Item | BrokenSample:
        """KEY.json {"prompt", "answer"} or KEY.txt, the answer, and the image; what is wrong instead, if anything."""
        name = f"{self.shard}/{self.key}"
        try:
            with open(self.shard, "rb") as file:
                parts = {suffix: _read_part(file, first, size) for suffix, first, size in self.members}
            fields = read_object(parts.get(".json", b"{}"))
            fields = fields if isinstance(fields, dict) else {}
            answer = fields.get("answer", parts[".txt"].decode("utf-8-sig").strip() if ".txt" in parts else None)
        except (OSError, ValueError) as error:
            return BrokenSample(name, f"{name}: cannot be read: {error}")
        prompt, image = fields.get("prompt"), next((parts[s] for s in parts if s in IMAGE_SUFFIXES), None)
        problems = key_problems(fields, self.ignored, METADATA_OF_SHARDS)
        if image is None and fields.get("image"):
            problems.append(f"its json names an image, {str(fields['image'])[:80]!r}, but none lies beside it")
        if problems:
            return BrokenSample(name, f"{name}: {printable('; '.join(problems))}")
        if not isinstance(answer, str) or not isinstance(prompt, str | None) or (image is None and prompt is None):
            found = " ".join(parts)
            wanted = 'an image and KEY.txt or KEY.json {"prompt": ..., "answer": ...}; without an image both texts'
            return BrokenSample(name, f"{name}: wanted {wanted}; got {found}")
        return Item(image, answer, prompt, name)


def _read_part(file, first: int, size: int) -> bytes:
    file.seek(first)
    content = file.read(size)
    if len(content) < size:
        raise OSError(f"the shard ends {size - len(content)} bytes too early")
    return content


def is_shard(path: str | Path) -> bool:
    """Whether a data path means tar shards: its name, after braces, ends in .tar; or it is a `pipe:` command."""
    return str(path).endswith(".tar") or str(path).startswith("pipe:")


def expand_shards(paths: Sequence[str | Path]) -> list[str]:
    """The shards of data paths, `{000..127}` and `{a,b}` expanded, each once. DataError: unbalanced braces."""
    found = []
    for path in map(str, paths):
        try:
            found += expand_urls(path)
        except ValueError as error:
            raise DataError(f"{path}: {error}; write shards as 'shards-{{000..127}}.tar'") from error
    return list(dict.fromkeys(found))


def find_records(shard: str, *, ignored: Collection[str] = ()) -> Iterator[Record]:
    """The samples of a shard in its order: neighbours of one key. Only the headers are read. ignored: see `Record`.

    DataError: the shard is missing, no tar file, or cut off; raised when the samples before have been given.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            named = ((base_plus_ext(member.name), member) for member in tar if member.isreg())
            named = (entry for entry in named if entry[0][0] and not _is_meta(entry[0][0]))
            for key, members in itertools.groupby(named, lambda entry: entry[0][0]):
                places = (("." + suffix.lower(), one.offset_data, one.size) for (_, suffix), one in members)
                yield Record(shard, key, tuple(places), tuple(ignored))
            # tarfile takes a file that is cut off between two members, and damage behind the first, for the end.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard}: cannot be read as a tar file: {error}; write or copy it again") from error


def _is_meta(key: str) -> bool:
    name = PurePosixPath(key).name
    return name.startswith("__") and name.endswith("__")  # WebDataset's own notes


def count_shards(paths: Sequence[str | Path], *, data_parallel_rank: int, data_parallel_size: int) -> list[Shard]:
    """The shards of data paths with their sizes; the ranks share the counting, so every rank has to call it.

    DataError on every rank: all shards that cannot be read, or that there are no samples.
    """
    shards, problems = expand_shards(paths), []
    counts = {}
    for path in shards[data_parallel_rank::data_parallel_size]:
        try:
            counts[path] = sum(1 for _ in find_records(path))
        except DataError as error:
            problems.append(str(error))
    counts = dict(gather_lists(list(counts.items())))
    problems = sorted(set(gather_lists(problems)))
    if not problems and not any(counts.values()):
        problems = [f"{', '.join(map(str, paths))}: no samples there; wanted KEY.png with KEY.txt or KEY.json"]
    if problems:
        raise DataError("\n".join(problems))
    return [Shard(path, counts[path]) for path in shards]

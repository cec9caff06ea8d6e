"""Tar shards as WebDataset lays them out: named, counted, and read sample by sample."""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from webdataset.tariterators import base_plus_ext

from sat_lora.cogvlm.inputs.picture_kinds import FILM_SUFFIXES
from sat_lora.cogvlm.inputs.pictures import CONVERT, MAX_PIXELS, SUFFIXES, UNREAD_SUFFIXES, file_limit
from sat_lora.data.box_texts import picture_size, with_boxes
from sat_lora.data.folders import is_no_data_path
from sat_lora.data.json_texts import read_object
from sat_lora.data.reading import Beside, samples_of
from sat_lora.data.records.record import PLAIN, RecordError, RecordOptions
from sat_lora.data.records.record import Record as TextRecord
from sat_lora.data.samples import BrokenSample, Item
from sat_lora.data.shards.shard_names import expand_shards
from sat_lora.data.shards.tar_members import Links, Member, read_members, unpacking_program
from sat_lora.errors import DataError
from sat_lora.files.foreign import JSON_LIMIT, MEBIBYTE, open_file
from sat_lora.parallel.distributed import gather_lists
from sat_lora.printable import printable

TEXT_SUFFIXES = (".json", ".txt")
IMAGE_SUFFIXES = SUFFIXES | FILM_SUFFIXES
_NUMBERED = re.compile(r"\.(\d{1,4})(\.[a-z0-9]+)")
"""The suffix of one of several images of a key: KEY.0.png, KEY.1.png."""
FIRST_DOT = "a key ends at the first dot of a name, so rename members that have more than one"
SORT = "write the shard sorted by name (tar --sort=name)"


@dataclass(frozen=True)
class Shard:
    """A tar file and the number of samples in it."""

    path: str
    samples: int


@dataclass(frozen=True)
class Record:
    """Where a sample lies in its shard: (suffix, first byte, bytes) of each of its members.

    problem: why it cannot be read, if that is known from the headers.
    """

    shard: str
    key: str
    members: tuple[tuple[str, int, int], ...]
    problem: str | None = None

    def read(self, max_pixels: int = MAX_PIXELS, options: RecordOptions = PLAIN) -> Item | BrokenSample:
        """Return the item of the sample, or what is wrong with it.

        It has KEY.json, of any layout of records, or KEY.txt, the answer, and the image; several images are KEY.0.png,
        KEY.1.png, in the order of their numbers. No member is read that would
        be larger than a text, or a picture of `max_pixels`, may be. options: how the json is read.
        """
        name = printable(f"{self.shard}/{self.key}")
        try:
            parts = self._parts(max_pixels)
            fields = read_object(_text_of(".json", parts.get(".json", b"{}")))
            text = _text_of(".txt", parts[".txt"]).strip() if ".txt" in parts else None
        except (OSError, ValueError) as error:
            return BrokenSample(name, f"{name}: cannot be read: {printable(error)}")
        images = tuple(parts[suffix] for suffix in self._image_suffixes())
        try:
            record = _record_of(fields, text, images, options)
        except RecordError as error:
            problem = "; ".join(error.problems)
            if ".json" not in parts:
                problem = "its .txt is empty, so there is no answer to learn" if text == "" else ""
            if not problem or not images:
                problem = f"{problem}; {self._wanted()}" if problem else self._wanted()
            return BrokenSample(name, f"{name}: {printable(problem)}")
        return Item(
            images[0] if images else None,
            record.answer,
            record.prompt,
            name,
            history=record.history,
            system=record.system,
            more_images=images[1:],
            references=record.references,
            unlearnt=record.unlearnt,
        )

    def _wanted(self) -> str:
        """Return which members a sample has, and which this one has, as a clause."""
        wanted = 'an image and KEY.txt or KEY.json {"prompt": ..., "answer": ...}; without an image both texts'
        hint = ""
        if any(suffix.count(".") > 1 for suffix, _, _ in self.members):
            hint = f"; {FIRST_DOT}"
        elif len(self.members) == 1:
            hint = f"; members of one key, its folder included, have to follow each other: {SORT}"
        return f"wanted {wanted}; got {' '.join(suffix for suffix, _, _ in self.members)}{hint}"

    def _image_suffixes(self) -> list[str]:
        """Return the suffixes of the images, in their order."""
        suffixes = [
            suffix for suffix, _, _ in self.members if suffix in IMAGE_SUFFIXES or _number_of(suffix) is not None
        ]
        return sorted(suffixes, key=lambda suffix: _number_of(suffix) or 0)

    def _parts(self, max_pixels: int) -> dict[str, bytes]:
        """Return the texts and the images, by suffix. Raises OSError or ValueError if one cannot be read."""
        if self.problem is not None:
            raise ValueError(self.problem)
        images = self._image_suffixes()
        parts = {}
        with open_file(self.shard, sys.maxsize) as file:
            for suffix, first, size in self.members:
                if suffix not in (*TEXT_SUFFIXES, *images):
                    continue
                limit = file_limit(max_pixels) if suffix in images else JSON_LIMIT
                if size > limit:
                    raise ValueError(f"{suffix} is larger than {limit / MEBIBYTE:.0f} MiB")
                parts[suffix] = _read_part(file, first, size)
        return parts


def _number_of(suffix: str) -> int | None:
    """Return the number of one of several images, by its suffix; None of any other member."""
    match = _NUMBERED.fullmatch(suffix)
    return int(match[1]) if match is not None and match[2] in IMAGE_SUFFIXES else None


def _problem_with_numbers(suffixes: Sequence[str]) -> str | None:
    """Return what is wrong with the images of a key; None for one, or numbers from 0 or 1 without a gap."""
    plain = sorted(suffix for suffix in suffixes if suffix in IMAGE_SUFFIXES)
    numbered = sorted((number, suffix) for suffix in suffixes if (number := _number_of(suffix)) is not None)
    if len(plain) > 1:
        return f"it has two images, {' and '.join(plain[:2])}; a sample has one, or KEY.0.png, KEY.1.png, ..."
    if plain and numbered:
        return f"it has {plain[0]} beside {numbered[0][1]}; number all images of a sample, or have one"
    numbers = [number for number, _ in numbered]
    first = numbers[0] if numbers else 0
    if first > 1 or numbers != [*range(first, first + len(numbers))]:
        return f"its images {' '.join(suffix for _, suffix in numbered)} are not numbered from 0 or 1 without a gap"
    return None


def _text_of(suffix: str, content: bytes) -> str:
    """Return the text of a member. Raises ValueError if it is neither UTF-8, nor UTF-16 with its byte-order mark."""
    try:
        return content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{suffix} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None


def _record_of(fields: object, text: str | None, images: tuple[bytes, ...], options: RecordOptions) -> TextRecord:
    """Return what the JSON of a sample says, and the answer in its .txt beside it.

    Raises RecordError with what is wrong with them.
    """
    try:
        records, _, _ = samples_of(fields, options, Beside(images, text, ".txt"))
        if len(records) > 1:
            raise RecordError(f"has {len(records)} captions; a key is one sample")
        return with_boxes(records[0], images, picture_size)
    except RecordError as error:
        raise RecordError(*map(_of_json, error.problems)) from None


def _of_json(problem: str) -> str:
    return f"its json {problem}" if problem.startswith(("has ", "names ")) else f"its json: {problem}"


def _read_part(file, first: int, size: int) -> bytes:
    file.seek(first)
    content = file.read(size)
    if len(content) < size:
        raise OSError(f"the shard ends {size - len(content)} bytes too early")
    return content


def find_records(shard: str, left_out: Counter | None = None) -> Iterator[Record]:
    """Yield the samples of a shard in its order: neighbours of one key. Only the headers are read.

    A link stands for the member that it leads to, as a folder with links is packed. What an editor or a system has left
    (see `is_no_data`) is no member. left_out: members that no sample uses are added to it, by suffix. Raises DataError
    if the shard is missing, no tar file, or cut off, or the image and the text of a key lie apart: when the samples
    before have been given.
    """
    left_out = Counter() if left_out is None else left_out
    try:
        with open_file(shard, sys.maxsize) as file:
            program = unpacking_program(file)
            if program is not None:
                raise DataError(
                    f"{printable(shard)}: compressed, so no sample can be found in it; unpack it with {program}"
                )
            links = Links(file)
            members = _sample_members(read_members(file), left_out)
            halves: dict[int, bool] = {}  # by the hash of a key, whether it is the image that was alone
            for key, group in itertools.groupby(members, lambda entry: entry[0]):
                record = _record(shard, key, group, links, left_out)
                if record is None:
                    continue
                _check_is_whole(record, halves)
                yield record
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else error
        shown = printable(shard)
        raise DataError(f"{shown}: cannot be read as a tar file: {problem}; write or copy it again") from error


def _check_is_whole(record: Record, halves: dict[int, bool]) -> None:
    """Raise DataError if the members of a key lie apart: a text would be learnt without its image."""
    suffixes = {suffix for suffix, _, _ in record.members}
    has_image = any(suffix in IMAGE_SUFFIXES or _number_of(suffix) is not None for suffix in suffixes)
    if has_image != suffixes.isdisjoint(TEXT_SUFFIXES):
        return
    if halves.setdefault(hash(record.key), has_image) != has_image:
        key = printable(record.key)
        raise DataError(
            f"{printable(record.shard)}: the image and the text of {key} lie apart, with others between them; {SORT}"
        )


def _sample_members(members: Iterator[Member], left_out: Counter) -> Iterator[tuple[str, str, Member]]:
    """Yield (key, suffix, member) of the members that may be part of a sample."""
    for member in members:
        if member.kind == "a folder":
            continue
        key, suffix = base_plus_ext(member.name)
        if key and _is_meta(key):
            continue
        if is_no_data_path(member.name):
            left_out["hidden, or of the system"] += 1
        elif not key:
            left_out["members without a suffix"] += 1
        else:
            yield key, "." + suffix.lower(), member


def _record(shard: str, key: str, group: Iterator, links: Links, left_out: Counter) -> Record | None:
    """Return the sample of a key; None if its members are none of a text and a picture."""
    places = []
    problem = None
    other_picture = None
    members = [*group]
    has_text = any(suffix in TEXT_SUFFIXES for _, suffix, _ in members)
    pictures = [
        suffix for _, suffix, _ in members if suffix in IMAGE_SUFFIXES or (has_text and _number_of(suffix) is not None)
    ]
    for _, suffix, member in members:
        if suffix not in pictures and suffix not in TEXT_SUFFIXES:
            left_out[f"{printable(suffix)} members"] += 1
            if PurePosixPath(suffix).suffix in SUFFIXES | UNREAD_SUFFIXES or suffix in UNREAD_SUFFIXES:
                other_picture = suffix
        elif member.kind == "a link":
            target = links.find(member)
            if target is None:
                problem = f"{suffix} is a link to {member.target}, which is no file in the shard"
            else:
                member = target
        elif member.kind != "a file":
            problem = f"{suffix} is {member.kind}, which is not read"
        places.append((suffix, member.first, member.size))
    problem = _problem_with_numbers(pictures) or problem
    if not pictures:
        if other_picture is not None:  # without a word it would be trained on as text alone
            problem = f"{printable(other_picture)} is no image that is read; {CONVERT}, as KEY.png or KEY.jpg"
            if other_picture.count(".") > 1:
                problem += f"; {FIRST_DOT}"
        elif not has_text:
            return None
    return Record(shard, key, tuple(places), problem)


def _is_meta(key: str) -> bool:
    name = PurePosixPath(key).name
    return name.startswith("__") and name.endswith("__")  # WebDataset's own notes


def count_shards(
    paths: Sequence[str | Path], *, data_parallel_rank: int, data_parallel_size: int, left_out: Counter | None = None
) -> list[Shard]:
    """Return the shards of data paths with their sizes; the ranks share the counting, so every rank has to call it.

    left_out: members that no sample uses are added to it, by suffix; the same on every rank.
    Raises DataError, on every rank, with all shards that cannot be read, or if there are no samples.
    """
    shards = expand_shards(paths)
    problems: list[str] = []
    counts: dict[str | Path, int] = {}
    unused: dict[str | Path, Counter] = {}
    for path in shards[data_parallel_rank::data_parallel_size]:
        try:
            unused[path] = Counter()
            counts[path] = sum(1 for _ in find_records(path, unused[path]))
        except DataError as error:
            problems.append(str(error))
    counts = dict(gather_lists(list(counts.items())))
    problems = sorted(set(gather_lists(problems)))
    if not problems and not any(counts.values()):
        problems = [f"{', '.join(map(str, paths))}: no samples there; wanted KEY.png with KEY.txt or KEY.json"]
    if problems:
        raise DataError("\n".join(problems))
    for of_shard in dict(gather_lists(list(unused.items()))).values():
        if left_out is not None:
            left_out.update(of_shard)
    return [Shard(path, counts[path]) for path in shards]

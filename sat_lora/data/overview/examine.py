"""What lies in data paths: layouts, counts, lengths, broken, unused and repeated samples, sizes of pictures."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from sat_lora.cogvlm.inputs.films import middle_picture
from sat_lora.cogvlm.inputs.pictures import file_limit, read_picture
from sat_lora.cogvlm.inputs.text import IGNORED, Sample
from sat_lora.data.layouts import no_samples
from sat_lora.data.reading import Reading
from sat_lora.data.samples import DataCounts, ImageTextDataset, Item, picture_content, read_items
from sat_lora.data.shards.shard_names import expand_shards
from sat_lora.data.shards.shards import find_records
from sat_lora.errors import DataError, SatLoraError
from sat_lora.files.foreign import read_bytes
from sat_lora.files.paths import is_shard
from sat_lora.printable import printable

LAID_OUT = 5000  # samples that are tokenised, evenly spread where there are more
SHOWN = 8  # broken samples and the like by name

Walk = Callable[[Sequence, str], Iterable]
"""Goes through a sequence and shows, under a title, how far it is."""


@dataclass
class Spread:
    """The least, the median and the most of some numbers."""

    numbers: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.numbers:
            return "none"
        return f"{min(self.numbers):,} to {max(self.numbers):,}, median {statistics.median_low(self.numbers):,}"


@dataclass
class Overview:
    """What `examine` found."""

    samples: int = 0
    layouts: dict[str, int] = field(default_factory=dict)
    text_only: int = 0
    several_turns: int = 0
    several_images: int = 0
    laid_out: int = 0
    """Samples that were tokenised."""
    lengths: Spread = field(default_factory=Spread)
    """Tokens of a sample, all of its answers counted."""
    answers: Spread = field(default_factory=Spread)
    """Tokens that are learnt of a sample."""
    cut: int = 0
    """Samples of those whose answers do not fit."""
    looked_at: int = 0
    """Pictures that were decoded."""
    pictures: int = 0
    """Pictures that there are."""
    widths: Spread = field(default_factory=Spread)
    heights: Spread = field(default_factory=Spread)
    smaller: int = 0
    """Pictures, of those, that are smaller than the base takes them on both sides."""
    broken: dict[str, str] = field(default_factory=dict)
    """What is wrong with samples, by their place."""
    repeated: int = 0
    """Samples that are the same as one before: picture, texts and all."""
    contradicted: int = 0
    """Samples whose picture and question came before with another answer."""
    same_pictures: int = 0
    """Pictures, of those looked at, whose pixels lie in another file as well."""
    unused: list[tuple[str, int]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    """All samples, in their order."""


def examine(paths: Sequence[str], reading: Reading, dataset: ImageTextDataset, pictures: int, walk: Walk) -> Overview:
    """Return what lies in data paths of one option. dataset: how a run would lay samples out; it may be empty.

    pictures: how many are decoded at most, evenly spread. Raises DataError as a run would.
    """
    overview = Overview()
    if is_shard(paths[0]):
        _read_shards(paths, reading, dataset, overview, walk)
    else:
        counts = DataCounts()
        overview.items = read_items(paths, counts=counts, **vars(reading))
        for path, samples in zip(paths, counts.by_path, strict=True):
            if not samples:
                own = DataCounts()
                read_items([path], counts=own, **vars(reading))
                raise DataError(no_samples(Path(path), own.unused))
        overview.layouts = dict(counts.layouts)
        overview.unused = counts.left_out()
    overview.samples = len(overview.items) + len(overview.broken)
    overview.text_only = sum(item.image is None for item in overview.items)
    overview.several_turns = sum(bool(item.history) for item in overview.items)
    overview.several_images = sum(bool(item.more_images) for item in overview.items)
    _count_repeats(overview)
    _lay_out(overview, dataset, walk)
    _decode(overview, dataset, pictures, walk)
    return overview


def evenly(items: Sequence, most: int) -> list:
    """Return at most so many of the items, evenly spread."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _read_shards(
    paths: Sequence[str], reading: Reading, dataset: ImageTextDataset, overview: Overview, walk: Walk
) -> None:
    unused: Counter[str] = Counter()
    shards = expand_shards(paths)
    for shard in walk(shards, "reading shards"):
        for record in find_records(shard, unused):
            item = record.read(dataset.max_pixels, reading.records)
            if isinstance(item, Item):
                overview.items.append(item)
            else:
                overview.broken[item.path] = item.reason
    count = f"{len(shards):,} tar shard{'s' * (len(shards) > 1)}"
    overview.layouts = {count: len(overview.items) + len(overview.broken)}
    overview.unused = unused.most_common()


def _lay_out(overview: Overview, dataset: ImageTextDataset, walk: Walk) -> None:
    for item in walk(evenly(overview.items, LAID_OUT), "counting tokens"):
        try:
            sample = dataset.lay_out(item)
        except SatLoraError as error:
            overview.broken[place_of(item)] = str(error)
            continue
        overview.laid_out += 1
        overview.lengths.numbers.append(len(sample.input_ids) + sample.left_out)
        overview.answers.numbers.append(int((sample.labels != IGNORED).sum()) + sample.left_out)
        overview.cut += sample.left_out > 0


def _decode(overview: Overview, dataset: ImageTextDataset, most: int, walk: Walk) -> None:
    owners: dict[object, Item] = {}
    for item in overview.items:
        for image in item.images:
            owners.setdefault(image, item)
    overview.pictures = len(owners)
    height, width = dataset.image_size
    digests: Counter[bytes] = Counter()
    for image in walk(evenly([*owners], most), "looking at pictures"):
        item = owners[image]
        try:
            name = str(image) if isinstance(image, str | Path) else place_of(item)
            picture = shown_picture(image, dataset.max_pixels, name, takes_frames=dataset.takes_frames)
        except (DataError, OSError, ValueError) as error:
            overview.broken[place_of(item)] = str(error)
            continue
        overview.looked_at += 1
        overview.widths.numbers.append(picture.width)
        overview.heights.numbers.append(picture.height)
        overview.smaller += picture.width < width and picture.height < height
        digests[hashlib.sha256(picture.tobytes() + repr(picture.size).encode()).digest()] += 1
    overview.same_pictures = sum(count for count in digests.values() if count > 1)


def shown_picture(image: object, max_pixels: int, name: str, *, takes_frames: bool) -> Image.Image:
    """Return the picture of an image that people are shown: of a film, or a folder with its frames, one of its middle.

    takes_frames: whether the base takes films. Raises DataError, OSError or ValueError if it cannot be read.
    """
    if takes_frames:
        return middle_picture(picture_content(image), max_pixels=max_pixels, name=name)  # type: ignore[arg-type]
    return read_picture(picture_bytes(image, max_pixels), max_pixels=max_pixels, name=name)


def picture_bytes(image: object, max_pixels: int) -> bytes:
    """Return the content of an image's file. Raises DataError, OSError or ValueError if it cannot be read."""
    content = picture_content(image)  # type: ignore[arg-type]
    if isinstance(content, bytes):
        return content
    try:
        return read_bytes(content, file_limit(max_pixels))
    except OSError as error:
        raise DataError(f"{printable(content)}: cannot be read as an image: {error.strerror or error}") from error


def _count_repeats(overview: Overview) -> None:
    answers: dict[tuple, set[str]] = {}
    for item in overview.items:
        key = (item.images, item.history, item.prompt, item.system)
        known = answers.setdefault(key, set())
        overview.repeated += item.answer in known
        overview.contradicted += bool(known) and item.answer not in known
        known.add(item.answer)


def place_of(item: Item) -> str:
    """Return what reports call an item: the line where it stands, or the name of its image."""
    return printable(item.place or item.name or str(item.image))


def pieces_of(sample: Sample, decode: Callable[[list[int]], str]) -> list[tuple[str, str]]:
    """Return a sample as (kind, text) in its order: `image` for its places, `given` for text, `learnt` for what is
    trained on.
    """
    pieces: list[tuple[str, list[int]]] = []

    def add(kind: str, token: int) -> None:
        if not pieces or pieces[-1][0] != kind:
            pieces.append((kind, []))
        pieces[-1][1].append(token)

    before = 0
    for token, label, place, vision in zip(*map(torch.Tensor.tolist, _fields(sample))):
        if label != IGNORED:
            add("learnt", label)
        if place and not before:
            pieces.append(("image", []))
        if not place and label != token:
            add("given", token)
        before = place and vision  # the end of an image's places begins the next one's, or none
    return [(kind, decode(tokens) if kind != "image" else "<image>") for kind, tokens in pieces]


def _fields(sample: Sample) -> tuple[torch.Tensor, ...]:
    return sample.input_ids, sample.labels, sample.image_embed_mask, sample.vision_expert_mask

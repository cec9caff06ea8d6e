"""Images with an answer each: found, read, made into samples and put together into batches."""

import os
import pkgutil
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.data import Dataset

from sat_lora.cogvlm.inputs.films import MOST_FRAMES, count_frames, with_frames
from sat_lora.cogvlm.inputs.image import load_frames, load_image, load_sizes, no_images
from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS
from sat_lora.cogvlm.inputs.text import IGNORED, IMAGE_PLACE, Sample, build_sample, turn_texts
from sat_lora.data.folders import find_images as find_images
from sat_lora.data.image_sources import StoredImage
from sat_lora.data.item_files import Entries, line_called
from sat_lora.data.layouts import missing_file_hint
from sat_lora.data.reading import READERS, SHARDS, Reading, columns_of
from sat_lora.data.records.record import IMAGE
from sat_lora.data.records.registry import RECORDS
from sat_lora.errors import ConfigError, DataError
from sat_lora.printable import printable

Picture = Path | bytes | StoredImage
"""What an image is read from: its file, the content of that, or its place in a table."""


@dataclass(frozen=True)
class Item:
    """One question: an image (None: text only), the query (None: --prompt) and the answer to learn.

    history: (query, answer) of the turns before this one. system: the text that stands before all turns. more_images:
    further ones, in the order of their places; a query has IMAGE where one goes, and those without such a place come
    before all texts. name: what reports call the item; None is the image's path. file, line: where it is written down,
    if it is. references: all answers that are right, where there are several. unlearnt: places in `history` whose
    answers are not learnt.
    """

    image: Picture | None
    answer: str
    prompt: str | None = None
    name: str | None = None
    file: Path | None = field(default=None, compare=False)
    line: int | str | None = field(default=None, compare=False)
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    more_images: tuple[Picture, ...] = ()
    references: tuple[str, ...] = field(default=(), compare=False)
    unlearnt: tuple[int, ...] = ()

    @property
    def images(self) -> tuple[Picture, ...]:
        """All images, in the order of their places."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def place(self) -> str | None:
        """The file and the line, for messages; None where they are not known."""
        return None if self.file is None or self.line is None else f"{self.file}, {line_called(self.line)}"


@dataclass
class DataCounts:
    """Samples by kind, for those who are to know what a run trains on."""

    labelled_by_name: int = 0
    """Images of folders, whose file names are their answers."""
    labelled_by_text: int = 0
    text_only: int = 0
    """Samples labelled by text that have no image."""
    without_prompt: Counter[str] = field(default_factory=Counter)
    """Samples labelled by text, by their file, that are asked --prompt."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Keys that carry nothing to learn, with the samples that have them."""
    again: int = 0
    """Samples that an earlier path has given, too."""
    unused: Counter[str] = field(default_factory=Counter)
    """What lies in folders and is no sample, by reason."""
    layouts: Counter[str] = field(default_factory=Counter)
    """Samples by their layout, in words for people."""
    by_path: list[int] = field(default_factory=list)
    """Samples of each data path, in their order."""

    def left_out(self) -> list[tuple[str, int]]:
        """Return (what, how many) of what is not used, and of what samples lack or have for nothing: for their user."""
        counts = [("images (samples of text alone)", self.text_only), ("samples twice (paths overlap)", self.again)]
        lacking = self.without_prompt.total()
        if lacking < self.labelled_by_text:  # where all lack one, that is how the file is meant
            counts.append(("prompts (--prompt is asked)", lacking))
        counts += [(f'times "{printable(key)}" (not read)', count) for key, count in self.passed_over.items()]
        return [*self.unused.most_common(), *((reason, count) for reason, count in counts if count)]

    def add(self, path: Path, entries: Entries, container: str | None = None) -> None:
        """Count the entries of the file at `path`. container: what people call it; None: by its suffix."""
        self.labelled_by_text += len(entries.objects)
        self.text_only += sum(not entry.images for entry in entries.objects)
        lacking = sum(entry.record.prompt is None for entry in entries.objects)
        if lacking:
            self.without_prompt[str(path)] += lacking
        self.passed_over += entries.passed_over
        kind = container or path.suffix.lower().removeprefix(".") or "a file"
        for layout, count in entries.layouts.items():
            self.layouts[f"{kind}: {RECORDS[layout].WHOSE}"] += count


@dataclass(frozen=True)
class BrokenSample:
    """What a dataset returns for an item that cannot be used; `collate` leaves it out and names it.

    sample: what tells it from others of the same path, of many questions about one image; None: there are none.
    """

    path: str
    reason: str
    sample: str | None = None


class Reader(Protocol):
    """A way in which samples lie in a path. A module that `READERS` lists has these names."""

    WHOSE: str
    """What people call it."""
    READS_FOLDERS: bool

    def fits(self, path: Path) -> bool:
        """Return whether it reads a file, or a folder, by its content."""

    def read(self, path: Path, reading: Reading, counts: DataCounts, given: Sequence[Path]) -> list[Item]:
        """Return the samples of a path, and add to `counts` what was read. given: all data paths of the option.

        Raises DataError with all that is wrong with it.
        """


def read_items(paths: Sequence[str | Path], *, counts: DataCounts | None = None, **reading) -> list[Item]:
    """Return the items of data paths, each read by the first of READERS that it fits, or by --data-format's.

    reading: the fields of a Reading. counts: what was read, and what lies in the folders and is no sample, is added to
    it. Raises DataError if a path is missing or is plainly another layout, or with every wrong line of a file.
    """
    options = Reading(**reading)
    columns_of(options.columns)  # what is wrong with them is no file's
    counts = DataCounts() if counts is None else counts
    items: list[Item] = []
    given = [Path(path) for path in paths]
    before: set[str] = set()  # of folders their images, of files the files
    for path in given:
        own = reader_of(path, options).read(path, options, counts, given)
        items += own
        counts.by_path.append(len(own))
        if len(paths) > 1:
            is_by_name = bool(own) and own[0].file is None
            places = (
                {os.path.abspath(item.image) for item in own if isinstance(item.image, Path)} if is_by_name else set()
            )
            places = places or {os.path.abspath(path)}
            counts.again += len(places & before) if is_by_name else len(own) * (not places.isdisjoint(before))
            before |= places
    return items


def reader_of(path: Path, reading: Reading) -> Reader:
    """Return the reader of a data path. Raises DataError where --data-format names one of another kind."""
    is_folder = path.is_dir() or not path.exists()
    if reading.data_format in READERS:
        reader = pkgutil.resolve_name(READERS[reading.data_format])
        if is_folder != reader.READS_FOLDERS:
            kinds = ("files", "folders")
            raise DataError(
                f"{printable(path)} is a {'folder' if is_folder else 'file'}, and --data-format {reading.data_format} "
                f"reads {kinds[reader.READS_FOLDERS]}; leave it out to have the layout recognised"
            )
        return reader
    if reading.data_format == SHARDS:
        raise DataError(f"{printable(path)} is no .tar, and --data-format {SHARDS} reads those alone; leave it out")
    readers = (pkgutil.resolve_name(place) for place in READERS.values())
    return next(reader for reader in readers if is_folder == reader.READS_FOLDERS and reader.fits(path))


def items_of_entries(path: Path, entries: Entries, counts: DataCounts, container: str | None = None) -> list[Item]:
    """Return the items of a file's entries, and count them. container: what people call the file, see `add`."""
    counts.add(path, entries, container)
    items = []
    for entry in entries.objects:
        record = entry.record
        image, *more = entry.images or (None,)
        name = f"{path}, {line_called(entry.line)}" if image is not None and not isinstance(image, Path) else None
        items.append(
            Item(
                image,
                record.answer,
                record.prompt,
                name,
                file=path,
                line=entry.line,
                history=record.history,
                system=record.system,
                more_images=tuple(more),
                references=record.references,
                unlearnt=record.unlearnt,
            )
        )
    return items


def reading_options(settings: object) -> dict:
    """Return what `read_items` takes, as keywords, of an object that may have attributes of those names."""
    return vars(Reading.of(settings))


def split_items(items: Sequence[Item], proportions: Sequence[float], seed: int) -> tuple[list[Item], ...]:
    """Return (train, valid, test) in the given proportions, of a shuffle that is the same for the same seed.

    proportions: one to three numbers of any sum. Every share above zero gets an item while there are any;
    train comes first.
    """
    items = list(items)
    random.Random(seed).shuffle(items)
    shares = [*proportions, 0.0, 0.0][:3]
    sizes = [min(len(items), max(share > 0, int(len(items) * share / sum(shares)))) for share in shares[1:]]
    sizes[0] = min(sizes[0], max(0, len(items) - 1))
    sizes[1] = min(sizes[1], max(0, len(items) - 1 - sizes[0]))
    train = len(items) - sum(sizes)
    return items[:train], items[train : train + sizes[0]], items[train + sizes[0] :]


class ImageTextDataset(Dataset):
    """The samples of items, or of image paths whose stem is the answer.

    version, prompt: the base's prompt format and the query for items without their own (see `prompt_for`).
    image_size: (height, width) in pixels. image_length: patches per image. max_length: in tokens; longer answers
    are cut. max_pixels: of a picture that is read.
    with_answer: False gives the prompt alone, ready for generation; the answer is in `items[i].answer`.
    special_tokens: see `build_sample`. learns_all: whether the answers of earlier turns are learnt as well.
    cross_size: (height, width) of the picture for a second vision encoder, None where the base has none. takes_frames:
    whether an image is a film, or a picture as a film of one frame, see `inputs.films`.
    ends: ids of the tokens that end an answer; none: the tokenizer's EOS.
    """

    def __init__(
        self,
        items: Sequence[Item | Path],
        tokenizer,
        *,
        version: str,
        prompt: str,
        image_size: tuple[int, int],
        image_length: int,
        max_length: int,
        with_answer: bool = True,
        special_tokens: bool = False,
        max_pixels: int = MAX_PIXELS,
        learns_all: bool = True,
        cross_size: tuple[int, int] | None = None,
        takes_frames: bool = False,
        ends: Sequence[int] = (),
    ):
        self.items = [item if isinstance(item, Item) else Item(Path(item), Path(item).stem) for item in items]
        self.tokenizer = tokenizer
        self.version = version
        self.prompt = prompt
        self.image_size = image_size
        self.image_length = image_length
        self.max_length = max_length
        self.with_answer = with_answer
        self.special_tokens = special_tokens
        self.max_pixels = max_pixels
        self.learns_all = learns_all
        self.cross_size = cross_size
        self.takes_frames = takes_frames
        self._ends = tuple(ends)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of tokens that end an answer."""
        return self._ends or (self.tokenizer.eos_token_id,)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample | BrokenSample:
        item = self.items[index]
        name = item.name or str(item.image or item.place or f"text-only item {index}")
        sample = self.make_sample(item, name)
        return replace(sample, sample=str(index)) if isinstance(sample, BrokenSample) else sample

    def make_sample(self, item: Item, name: str | None = None) -> Sample | BrokenSample:
        """Return the sample, or what is wrong with it: an exception would stop one rank, and the others would wait."""
        name = name or item.name
        images: list[torch.Tensor] = []
        counts: list[int] = []
        cross_images: list[torch.Tensor] = []
        for image in item.images:
            called = name if image is item.image else None
            try:
                content = picture_content(image)
                if self.takes_frames:
                    frames = load_frames(
                        content, self.image_size, self.version, max_pixels=self.max_pixels, name=called
                    )
                    images += frames
                    counts.append(len(frames))
                    continue
                if self.cross_size is None:
                    images.append(load_image(content, self.image_size, called, max_pixels=self.max_pixels))
                    continue
                sizes = [self.image_size, self.cross_size]
                loaded, cross = load_sizes(content, sizes, called, max_pixels=self.max_pixels)
                images.append(loaded)
                cross_images.append(cross)
            except (DataError, OSError, ValueError) as error:
                where = f" (named in {item.place})" if item.place and item.place != name else ""
                path = printable(name if image is item.image else image)
                problem = error if isinstance(error, DataError) else f"{path}: cannot be read as an image: {error}"
                return BrokenSample(path, printable(f"{problem}{missing_file_hint(image)}{where}"))
        try:
            sample = self.lay_out(item, *images[:1], frames=counts)
            if images[1:] or cross_images:
                return replace(sample, more_images=tuple(images[1:]), cross_images=tuple(cross_images))
            return sample
        except (DataError, ConfigError) as error:
            # Many samples may share an image whose path is their name: what is wrong with a text is its line's.
            place = printable(item.place or name)
            return BrokenSample(place, f"{place}: {printable(error)}")

    def lay_out(self, item: Item, image: torch.Tensor | None = None, *, frames: Sequence[int] = ()) -> Sample:
        """Return the sample with the places of its images, and with `image`, its first.

        frames: how many each film has, where the base takes films; by default they are counted, and as many as one may
        have are taken for one that cannot be read. Raises DataError or ConfigError if it cannot be a sample.
        """
        *earlier, prompt = self._prompts(item)
        if self.takes_frames:
            counts = iter(frames or [self._count_frames(image) for image in item.images])
            earlier = [self._with_frames(parts, counts) for parts in earlier]
            prompt = self._with_frames(prompt, counts)
        answers = [answer for _, answer in item.history]
        return build_sample(
            self.tokenizer,
            prompt,
            item.answer if self.with_answer else None,
            self.image_length,
            self.max_length,
            image,
            self.special_tokens,
            earlier=[*zip(earlier, answers, strict=True)],
            learns_earlier=self.learns_all,
            unlearnt=item.unlearnt,
            joins_images=self.takes_frames,
        )

    def _count_frames(self, image: Picture) -> int:
        try:
            return count_frames(picture_content(image), self.version, max_pixels=self.max_pixels)
        except (OSError, ValueError):
            return MOST_FRAMES

    def _with_frames(self, prompt: str | tuple[str, ...], counts: Iterator[int]) -> tuple[str, ...]:
        """Return the texts around the frames of a prompt that has places for films; counts: frames of the next ones."""
        parts = prompt.split(IMAGE_PLACE) if isinstance(prompt, str) else prompt
        return with_frames(parts, [next(counts) for _ in parts[1:]], self.version)

    def _prompts(self, item: Item) -> list[str | tuple[str, ...]]:
        """Return the prompt of each turn as `build_sample` takes it: where special tokens are text, the parts around
        the images.
        """
        queries = [query for query, _ in item.history]
        queries.append(self.prompt if item.prompt is None else item.prompt)
        texts = turn_texts(self.version, queries, item.system)
        in_texts = sum(text.count(IMAGE) for text in texts)
        before = len(item.images) - in_texts
        if before < 0 or (in_texts and not item.more_images):
            raise DataError("a text holds half a character (U+DBFF)")
        if self.special_tokens:
            spelled = next((query for query in queries if IMAGE_PLACE in query), None)
            if spelled is not None:
                raise DataError(f"the prompt {spelled!r} holds {IMAGE_PLACE}, the mark of the image")
            marked = [text.replace(IMAGE, IMAGE_PLACE) for text in texts]
            return [IMAGE_PLACE * before + marked[0], *marked[1:]]
        parts = [tuple(text.split(IMAGE)) for text in texts]
        return [("",) * before + parts[0], *parts[1:]]


def picture_content(image: Picture) -> Path | bytes:
    """Return what `read_picture` takes of an image: what lies in a table is read. Raises OSError or ValueError."""
    return image if isinstance(image, str | Path | bytes) else image.read()


def collate(samples: Sequence[Sample | BrokenSample], *, image_size: tuple[int, int]) -> dict:
    """Return one batch, whatever the samples are: broken ones are left out.

    input_ids, position_ids, labels, image_embed_mask, vision_expert_mask: (batch, seq) int64, padded on the right
    to the longest. Padding has id 0, label -100 and the positions that follow. images: (images, 3, height, width)
    float32 in the order of their places, also with none of them: the vision tower then runs on nothing.
    cross_images: the same pictures for a second vision encoder, where samples have them.
    lengths: (batch,) int64, tokens of each row before its padding; left_out: (batch,) int64, those of its answer that
    did not fit. broken: list of (path, reason); broken_samples: of each, what tells the sample from others of its path.
    A batch without a usable sample is one padding-only row: every label is -100, so a mean over its labels must guard
    against dividing by zero.
    """
    broken = [sample for sample in samples if isinstance(sample, BrokenSample)]
    usable = [sample for sample in samples if not isinstance(sample, BrokenSample)] or [_padding_only()]
    images = [image for sample in usable for image in (sample.image, *sample.more_images) if image is not None]
    cross_images = [image for sample in usable for image in sample.cross_images]
    length = max(len(sample.input_ids) for sample in usable)

    def stack(field: str, fill: int) -> torch.Tensor:
        rows = torch.full((len(usable), length), fill, dtype=torch.int64)
        for row, sample in zip(rows, usable, strict=True):
            values = getattr(sample, field)
            row[: len(values)] = values
        return rows

    positions = stack("position_ids", 0)
    for row, sample in zip(positions, usable, strict=True):
        used = len(sample.position_ids)
        row[used:] = row[used - 1] + torch.arange(1, length - used + 1)
    return {
        "input_ids": stack("input_ids", 0),
        "position_ids": positions,
        "labels": stack("labels", IGNORED),
        "image_embed_mask": stack("image_embed_mask", 0),
        "vision_expert_mask": stack("vision_expert_mask", 0),
        "images": torch.stack(images) if images else no_images(image_size),
        **({"cross_images": torch.stack(cross_images)} if cross_images else {}),
        "lengths": torch.tensor([len(sample.input_ids) for sample in usable]),
        "left_out": torch.tensor([sample.left_out for sample in usable]),
        "broken": [(sample.path, sample.reason) for sample in broken],
        "broken_samples": [sample.sample or sample.path for sample in broken],
    }


def _padding_only() -> Sample:
    nothing = torch.zeros(2, dtype=torch.int64)  # two tokens, so that one is left after the shift by one
    return Sample(nothing, torch.arange(2), torch.full((2,), IGNORED), nothing, nothing)

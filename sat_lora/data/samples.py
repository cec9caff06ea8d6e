"""Images with an answer each: found, read, made into samples and put together into batches."""

import os
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from sat_lora.cogvlm.inputs.image import load_image, no_images
from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS
from sat_lora.cogvlm.inputs.text import IGNORED, IMAGE_PLACE, Sample, build_sample, prompt_for, prompt_text
from sat_lora.data.folders import find_images
from sat_lora.data.item_files import Entries, line_called, read_entries
from sat_lora.data.layouts import check_file_kind, check_layout, missing_file_hint
from sat_lora.errors import ConfigError, DataError
from sat_lora.printable import printable


@dataclass(frozen=True)
class Item:
    """One question: an image (None: text only), the query (None: --prompt) and the answer to learn.

    image: its path, or the content of its file. name: what reports call the item; None is the path. file, line: where
    it is written down, if it is.
    """

    image: Path | bytes | None
    answer: str
    prompt: str | None = None
    name: str | None = None
    file: Path | None = field(default=None, compare=False)
    line: int | str | None = field(default=None, compare=False)

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
    without_answer: int = 0
    """Their answer is empty: only the end is learnt."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Keys that carry nothing to learn, with the samples that have them."""
    again: int = 0
    """Samples that an earlier path has given, too."""
    unused: Counter[str] = field(default_factory=Counter)
    """What lies in folders and is no sample, by reason."""

    def left_out(self) -> list[tuple[str, int]]:
        """Return (what, how many) of what is not used, and of what samples lack or have for nothing: for their user."""
        counts = [("images (samples of text alone)", self.text_only), ("answers (empty ones)", self.without_answer)]
        counts.append(("samples twice (paths overlap)", self.again))
        lacking = self.without_prompt.total()
        if lacking < self.labelled_by_text:  # where all lack one, that is how the file is meant
            counts.append(("prompts (--prompt is asked)", lacking))
        counts += [(f'times "{printable(key)}" (not read)', count) for key, count in self.passed_over.items()]
        return [*self.unused.most_common(), *((reason, count) for reason, count in counts if count)]

    def add(self, path: Path, entries: Entries) -> None:
        """Count the entries of the file at `path`."""
        self.labelled_by_text += len(entries.objects)
        self.text_only += sum(entry.image is None for entry in entries.objects)
        self.without_answer += sum(not entry.answer.strip() for entry in entries.objects)
        lacking = sum(entry.prompt is None for entry in entries.objects)
        if lacking:
            self.without_prompt[str(path)] += lacking
        self.passed_over += entries.passed_over


@dataclass(frozen=True)
class BrokenSample:
    """What a dataset returns for an item that cannot be used; `collate` leaves it out and names it.

    sample: what tells it from others of the same path, of many questions about one image; None: there are none.
    """

    path: str
    reason: str
    sample: str | None = None


def read_items(
    paths: Sequence[str | Path],
    *,
    ignore_keys: Collection[str] = (),
    images_from: Sequence[str | Path] = (),
    names_are_answers: bool = False,
    run_folder: str | Path | None = None,
    counts: DataCounts | None = None,
) -> list[Item]:
    """Return the items of data paths: in a folder an image file's stem is its answer; a file has one object per line.

    A line: {"image": path relative to the file, or absent for text only, "prompt": ..., "answer": ...}; without a
    prompt, --prompt is asked. An array of such objects is read as well. ignore_keys, images_from: see `read_entries`.
    names_are_answers: of a folder that looks like another layout too. run_folder: of the run that asks. counts: what
    was read, and what lies in the folders and is no sample, is added to it.
    Raises DataError if a path is missing or is plainly another layout, or with every wrong line of a file.
    """
    items = []
    counts = DataCounts() if counts is None else counts
    before: set[str] = set()  # of folders their images, of files the files
    for path in map(Path, paths):
        if path.is_dir() or not path.exists():
            images = find_images([path], counts.unused, run_folder)
            if not names_are_answers:
                check_layout(path, images, given=[Path(data_path) for data_path in paths])
            items += [Item(image, image.stem) for image in images]
            counts.labelled_by_name += len(images)
            if len(paths) > 1:
                places = {os.path.abspath(image) for image in images}
                counts.again += len(places & before)
                before |= places
            continue
        check_file_kind(path)
        entries = read_entries(path, ignored=ignore_keys, images_from=images_from)
        items += [Item(e.image, e.answer, e.prompt, file=path, line=e.line) for e in entries.objects]
        counts.add(path, entries)
        place = os.path.abspath(path)
        counts.again += len(entries.objects) * (place in before)
        before.add(place)
    return items


def reading_options(settings: object) -> dict:
    """Return what `read_items` takes, as keywords, of an object that may have attributes of those names."""
    known = vars(settings)
    lists = {name: list(known.get(name) or ()) for name in ("ignore_keys", "images_from")}
    return {**lists, "names_are_answers": bool(known.get("names_are_answers")), "run_folder": known.get("run_folder")}


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
    special_tokens: see `build_sample`.
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
        try:
            image = None
            if item.image is not None:
                image = load_image(item.image, self.image_size, name, max_pixels=self.max_pixels)
        except DataError as error:
            where = f" (named in {item.place})" if item.place else ""
            return BrokenSample(printable(name), printable(f"{error}{missing_file_hint(item.image)}{where}"))
        try:
            return self.lay_out(item, image)
        except (DataError, ConfigError) as error:
            # Many samples may share an image whose path is their name: what is wrong with a text is its line's.
            place = printable(item.place or name)
            return BrokenSample(place, f"{place}: {printable(error)}")

    def lay_out(self, item: Item, image: torch.Tensor | None = None) -> Sample:
        """Return the sample with the places of its image, and with `image`.

        Raises DataError or ConfigError if it cannot be one.
        """
        answer = item.answer if self.with_answer else None
        settings = (self.image_length, self.max_length, image, self.special_tokens)
        return build_sample(self.tokenizer, self._prompt(item), answer, *settings)

    def _prompt(self, item: Item) -> str | tuple[str, ...]:
        """Return the prompt as `build_sample` takes it: where special tokens are text, the parts around the image."""
        query = self.prompt if item.prompt is None else item.prompt
        if not self.special_tokens:
            text = prompt_text(self.version, query)
            return (text,) if item.image is None else ("", text)
        prompt = prompt_for(self.version, query)
        if item.image is None:
            prompt = prompt.replace(IMAGE_PLACE, "", 1)
        if prompt.count(IMAGE_PLACE) != (item.image is not None):
            raise DataError(f"the prompt {query!r} holds {IMAGE_PLACE}, the mark of the image")
        return prompt


def collate(samples: Sequence[Sample | BrokenSample], *, image_size: tuple[int, int]) -> dict:
    """Return one batch, whatever the samples are: broken ones are left out.

    input_ids, position_ids, labels, image_embed_mask, vision_expert_mask: (batch, seq) int64, padded on the right
    to the longest. Padding has id 0, label -100 and the positions that follow. images: (images, 3, height, width)
    float32 in the order of their places, also with none of them: the vision tower then runs on nothing.
    lengths: (batch,) int64, tokens of each row before its padding; left_out: (batch,) int64, those of its answer that
    did not fit. broken: list of (path, reason); broken_samples: of each, what tells the sample from others of its path.
    A batch without a usable sample is one padding-only row: every label is -100, so a mean over its labels must guard
    against dividing by zero.
    """
    broken = [sample for sample in samples if isinstance(sample, BrokenSample)]
    usable = [sample for sample in samples if not isinstance(sample, BrokenSample)] or [_padding_only()]
    images = [sample.image for sample in usable if sample.image is not None]
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
        "lengths": torch.tensor([len(sample.input_ids) for sample in usable]),
        "left_out": torch.tensor([sample.left_out for sample in usable]),
        "broken": [(sample.path, sample.reason) for sample in broken],
        "broken_samples": [sample.sample or sample.path for sample in broken],
    }


def _padding_only() -> Sample:
    nothing = torch.zeros(2, dtype=torch.int64)  # two tokens, so that one is left after the shift by one
    return Sample(nothing, torch.arange(2), torch.full((2,), IGNORED), nothing, nothing)

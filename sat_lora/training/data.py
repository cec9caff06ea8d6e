"""Images with an answer each: found, read, made into samples and put together into batches."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from sat_lora.cogvlm.image import load_image
from sat_lora.cogvlm.pictures import MAX_PIXELS
from sat_lora.cogvlm.text import IGNORED, IMAGE_PLACE, Sample, build_sample, prompt_for
from sat_lora.errors import ConfigError, DataError
from sat_lora.foreign import printable
from sat_lora.training.folders import find_images


@dataclass(frozen=True)
class Item:
    """One question: an image (None: text only), the query (None: --prompt) and the answer to learn.

    image: its path, or the content of its file. name: what reports call the item; None is the path.
    """

    image: Path | bytes | None
    answer: str
    prompt: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class BrokenSample:
    """What a dataset returns for an item that cannot be used; `collate` leaves it out and names it.

    sample: what tells it from others of the same path, of many questions about one image; None: there are none.
    """

    path: str
    reason: str
    sample: str | None = None


def read_items(paths: Sequence[str | Path], *, left_out: Counter | None = None) -> list[Item]:
    """The items of data paths: in a folder an image file's stem is its answer; a .jsonl file has one object per line.

    A line: {"image": path relative to the file, or absent for text only, "prompt": ..., "answer": ...}; without a
    prompt, --prompt is asked. left_out: what lies in the folders and is no sample is added to it, by reason.
    DataError: a path is missing, or every wrong line of a file.
    """
    items = []
    for path in map(Path, paths):
        if path.suffix == ".jsonl" and path.is_file():
            items += _read_lines(path)
        else:
            items += [Item(image, image.stem) for image in find_images([path], left_out)]
    return items


def _read_lines(path: Path) -> list[Item]:
    items, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number} is not JSON: {error}")
            continue
        fields = entry if isinstance(entry, dict) else {}
        image, prompt, answer = fields.get("image"), fields.get("prompt"), fields.get("answer")
        texts = [isinstance(text, str) for text in (image or "", prompt or "", answer)]
        if not all(texts) or (image is None and prompt is None):
            problems.append(f'line {number}: wanted {{"image": ..., "prompt": ..., "answer": ...}}, got {line[:80]}')
            continue
        items.append(Item(path.parent / image if image else None, answer, prompt))
    if problems:
        shown = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
        raise DataError(f"{path}: {len(problems)} lines cannot be used:\n  {shown}")
    return items


def split_items(items: Sequence[Item], proportions: Sequence[float], seed: int) -> tuple[list[Item], ...]:
    """(train, valid, test) in the given proportions, of a seeded shuffle; the same for the same seed.

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
    """Samples of items, or of image paths whose stem is the answer.

    version, prompt: the base's prompt format and the query for items without their own (see `prompt_for`).
    image_size: (height, width) in pixels. image_length: patches per image. max_length: in tokens; longer answers
    are cut. max_pixels: of a picture that is read.
    with_answer: False gives the prompt alone, ready for generation; the answer is in `items[i].answer`.
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
        max_pixels: int = MAX_PIXELS,
    ):
        self.items = [item if isinstance(item, Item) else Item(Path(item), Path(item).stem) for item in items]
        self.tokenizer = tokenizer
        self.version, self.prompt = version, prompt
        self.image_size, self.image_length, self.max_length = image_size, image_length, max_length
        self.with_answer, self.max_pixels = with_answer, max_pixels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample | BrokenSample:
        item = self.items[index]
        sample = self.make_sample(item, item.name or str(item.image or f"text-only item {index}"))
        return replace(sample, sample=str(index)) if isinstance(sample, BrokenSample) else sample

    def make_sample(self, item: Item, name: str | None = None) -> Sample | BrokenSample:
        """The sample, or what is wrong with it: an exception would stop one rank and leave the others waiting."""
        name = name or item.name
        try:
            prompt = prompt_for(self.version, self.prompt if item.prompt is None else item.prompt)
            image = None
            if item.image is None:
                prompt = prompt.replace(IMAGE_PLACE, "", 1)
            else:
                image = load_image(item.image, self.image_size, name, max_pixels=self.max_pixels)
            if prompt.count(IMAGE_PLACE) != (image is not None):
                raise DataError(f"the prompt {item.prompt or self.prompt!r} holds {IMAGE_PLACE}, the mark of the image")
            answer = item.answer if self.with_answer else None
            return build_sample(self.tokenizer, prompt, answer, self.image_length, self.max_length, image)
        except (DataError, ConfigError) as error:
            return BrokenSample(printable(name), str(error))


def collate(samples: Sequence[Sample | BrokenSample], *, image_size: tuple[int, int]) -> dict:
    """One batch, whatever the samples are: broken ones are left out; with nothing else there is nothing to learn.

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
        "images": torch.stack(images) if images else torch.zeros(0, 3, *image_size),
        "lengths": torch.tensor([len(sample.input_ids) for sample in usable]),
        "left_out": torch.tensor([sample.left_out for sample in usable]),
        "broken": [(sample.path, sample.reason) for sample in broken],
        "broken_samples": [sample.sample or sample.path for sample in broken],
    }


def _padding_only() -> Sample:
    nothing = torch.zeros(2, dtype=torch.int64)  # two tokens, so that one is left after the shift by one
    return Sample(nothing, torch.arange(2), torch.full((2,), IGNORED), nothing, nothing)

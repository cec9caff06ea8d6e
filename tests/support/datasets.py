"""Samples, the data set that reads them, and the source that a run makes of it."""

from argparse import Namespace

import torch

from sat_lora.data.batches.sources import FileSource
from sat_lora.data.samples import ImageTextDataset, Item
from sat_lora.parallel.distributed import World

WORLD = World(0, 4, torch.device("cpu"), 0, 2)


def dataset(items, tokenizer, **changes):
    """The ImageTextDataset of these items for a model of 21 x 21 pixels; changes: to its settings."""
    settings = dict(version="base", prompt="Q:", image_size=(21, 21), image_length=9, max_length=40)
    return ImageTextDataset(items, tokenizer, **{**settings, **changes})


def source_of(items, tokenizer, left_out=(), layouts=(), **changes):
    """What a run on two data-parallel ranks reads these items from; layouts: what they
    are said to be of; changes: to the settings of its data set."""
    changes = {"prompt": "What is this?", **changes}
    kinds = dict.fromkeys(layouts, 1)
    return FileSource(items, lambda own: dataset(own, tokenizer, **changes), Namespace(), WORLD, left_out, kinds)


def numbered(count):
    """Items of `count` images that are nowhere, answered by their numbers."""
    return [Item(f"images/{number}.png", f"{number}") for number in range(count)]

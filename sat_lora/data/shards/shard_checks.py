"""What can be known to be wrong with tar shards before a run starts."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS, read_picture
from sat_lora.data.records.record import PLAIN, RecordOptions
from sat_lora.data.samples import BrokenSample, Item, picture_content
from sat_lora.data.shards.shard_names import expand_shards
from sat_lora.data.shards.shards import find_records
from sat_lora.errors import ConfigError, DataError
from sat_lora.files.paths import COMPRESSED_SUFFIXES, is_shard
from sat_lora.printable import printable

SHOWN = 10  # names of shards
SAMPLES_TRIED = 300  # one usable sample among so many is enough to begin


class Trial(Protocol):
    """How the first samples are tried. max_pixels: see `Record.read`."""

    max_pixels: int

    def try_item(self, item: Item) -> None:
        """Raise DataError for a sample that cannot be used, and ConfigError for one that does not fit."""


@dataclass
class PictureTrial:
    """Tries whether the pictures of a sample can be read."""

    max_pixels: int = MAX_PIXELS

    def try_item(self, item: Item) -> None:
        """Raise DataError where a picture cannot be read."""
        for image in item.images:
            read_picture(picture_content(image), max_pixels=self.max_pixels, name=item.name)


def problems_with_shards(
    paths: list[str], option: str, options: RecordOptions = PLAIN, trial: Trial | None = None
) -> Iterator[str]:
    """Yield what is wrong with the paths of one option, as text: with the names and the first samples.

    options: see `Record.read`. trial: of the samples; by default a PictureTrial. Whole shards are read later, when all
    ranks together count their samples.
    """
    no_shards = [path for path in paths if not is_shard(path)]
    if option == "--test-data":
        yield f"{', '.join(paths)}: tar shards cannot be answered by generation; unpack them and give the folder"
    elif no_shards:
        yield f"tar shards and {', '.join(no_shards)}: give tar shards alone, or folders and .jsonl files alone"
    elif pipes := [path for path in paths if path.startswith("pipe:")]:
        yield f"{', '.join(pipes)}: the samples of a pipe cannot be counted; give .tar files on a mounted file system"
    else:
        try:
            shards = expand_shards(paths)
            missing = [shard for shard in shards if not os.path.exists(shard)]
            compressed = [shard for shard in shards if shard.lower().endswith(COMPRESSED_SUFFIXES)]
            if compressed:
                names = _first_of(compressed)
                yield f"{names}: compressed, so no sample can be found in it; unpack it to a .tar, or to a folder"
            elif missing:
                names = _first_of(missing)
                yield f"{len(missing)} of {len(shards)} shards are missing: {names}; mend the path or copy them"
            elif problem := _problem_with_samples(shards, options, trial or PictureTrial()):
                yield problem
        except DataError as error:
            yield str(error)


def _first_of(names: list[str]) -> str:
    return printable(", ".join(names[:SHOWN])) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _problem_with_samples(shards: list[str], options: RecordOptions, trial: Trial) -> str | None:
    records = itertools.chain.from_iterable(map(find_records, shards))
    tried = 0
    first_error = None
    for record in itertools.islice(records, SAMPLES_TRIED):
        tried += 1
        item = record.read(trial.max_pixels, options)
        if isinstance(item, BrokenSample):
            first_error = first_error or item.reason
            continue
        try:
            trial.try_item(item)
            return None
        except ConfigError as error:
            return f"{shards[0]}: {error}"
        except DataError as error:
            first_error = first_error or str(error)
    if not tried:
        return f"{_first_of(shards)}: no samples there; wanted members KEY.png with KEY.txt or KEY.json"
    return f"none of the first {tried} samples of {shards[0]} can be used; pack them again; {first_error}"

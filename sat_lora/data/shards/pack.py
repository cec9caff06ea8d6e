"""Pack folders of images and files of samples into WebDataset tar shards."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from webdataset import ShardWriter

from sat_lora.cogvlm.inputs.picture_kinds import FILM_SUFFIXES, film_suffix
from sat_lora.cogvlm.inputs.pictures import SUFFIXES, file_limit, suffix_of
from sat_lora.data.reading import Reading
from sat_lora.data.records.record import IMAGE
from sat_lora.data.samples import Item, Picture, picture_content, read_items
from sat_lora.errors import DataError
from sat_lora.files.foreign import read_bytes
from sat_lora.files.paths import packed_shards
from sat_lora.printable import printable


def pack_shards(
    data: Sequence[str | Path],
    out: str | Path,
    samples_per_shard: int = 1000,
    *,
    overwrite: bool = False,
    **reading: Any,
) -> tuple[str, int]:
    """Write the items of `data`, in their order, and return (what --train-data takes, how many samples).

    A sample is KEY.json {"prompt", "answer"}, with its turns before, and the image's file as it is, with its own
    suffix, or with that of its format where it has none that is known; several images are KEY.0.png, KEY.1.png, ...
    Films are images, too. What is in `out` is as it was until all shards are written. reading: further arguments of
    `read_items`. Raises DataError where an image is missing, or is no file, or there is nothing to pack; ConfigError
    where `out` holds shards, which stay unless `overwrite` replaces all of them.
    """
    out = Path(out)
    before = packed_shards(out, overwrite)
    items = read_items(data, **reading)
    if not items:
        raise DataError(f"{printable(', '.join(map(str, data)))}: no samples there, so there is nothing to pack")
    _check(items)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as draft:
        _write(items, Path(draft), samples_per_shard, Reading(**reading).image_mark)
        for path in before:
            path.unlink()
        for path in sorted(Path(draft).iterdir()):
            path.rename(out / path.name)
    last = (len(items) - 1) // samples_per_shard
    numbers = f"{{000000..{last:06d}}}" if last else "000000"
    return str(out / f"shard-{numbers}.tar"), len(items)


def _check(items: Sequence[Item]) -> None:
    """Raise DataError for a sample that no shard can hold."""
    for image in (image for item in items for image in item.images):
        if isinstance(image, Path) and image.is_dir():
            raise DataError(
                f"{printable(image)}: cannot be packed: a folder, no file; a sample of a shard has files alone, so "
                "write the frames of a folder as a film, or train on the samples as they lie"
            )


def _write(items: Sequence[Item], folder: Path, samples_per_shard: int, mark: str) -> None:
    """Write the items as shards into the folder. Raises DataError where an image cannot be read."""
    with ShardWriter(str(folder / "shard-%06d.tar"), maxcount=samples_per_shard, maxsize=1e12, verbose=0) as writer:
        for number, item in enumerate(items):
            record = _record_of(item, mark)
            unicode = json.dumps(record, ensure_ascii=False)
            content = (unicode if _is_unicode(unicode) else json.dumps(record)).encode()
            sample = {"__key__": f"{number:09d}", "json": content}
            for place, image in enumerate(item.images):
                content = _content(image, item.name if image is item.image else None)
                suffix = image.suffix.lower() if isinstance(image, Path) else ""
                if suffix not in SUFFIXES | FILM_SUFFIXES:
                    suffix = film_suffix(content) or suffix_of(content)
                sample[f"{place}{suffix}" if item.more_images else suffix[1:]] = content
            writer.write(sample)


def _record_of(item: Item, mark: str) -> dict[str, Any]:
    """Return the object of an item; mark: what stands in its texts for each of several images."""
    queries = [query for query, _ in item.history] + ([] if item.prompt is None else [item.prompt])
    in_texts = sum(query.count(IMAGE) for query in queries)
    if in_texts:  # all of them have a place then, those before all texts too
        queries[0] = IMAGE * (len(item.images) - in_texts) + queries[0]
    queries = [query.replace(IMAGE, mark) for query in queries]
    history = [[query, answer] for query, (_, answer) in zip(queries, item.history)]
    turns = {"history": history, "system": item.system, "answers": item.references, "unlearnt": item.unlearnt}
    texts = {"answer": item.answer, **({"prompt": queries[-1]} if item.prompt is not None else {})}
    return {**texts, **{name: value for name, value in turns.items() if value}}


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can write a text. Half a character it cannot: that is packed as it was escaped, and left to
    whoever reads it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(image: Picture, name: str | None) -> bytes:
    """Return the bytes of an image of that name. Raises DataError where it cannot be read."""
    try:
        content = picture_content(image)
        return content if isinstance(content, bytes) else read_bytes(content, file_limit())
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        shown = printable(name or image)
        raise DataError(f"{shown}: cannot be packed: {problem}; mend the file or the path") from error

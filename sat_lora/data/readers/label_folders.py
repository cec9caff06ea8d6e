"""Folders of CogVLM-SFT-311K: images/STEM.jpg and, in labels_en, labels_zh or labels, STEM.json with one object."""

import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from sat_lora.cogvlm.inputs.pictures import SUFFIXES
from sat_lora.data.box_texts import picture_size, with_boxes
from sat_lora.data.folders import is_no_data
from sat_lora.data.item_files import Entries, Entry, Problems
from sat_lora.data.item_keys import without_images
from sat_lora.data.json_texts import read_object
from sat_lora.data.reading import Beside, Reading, check_columns, samples_of
from sat_lora.data.records.record import RecordError
from sat_lora.data.samples import DataCounts, Item, items_of_entries
from sat_lora.errors import DataError
from sat_lora.files.foreign import JSON_LIMIT, read_bytes
from sat_lora.printable import printable

WHOSE = "CogVLM-SFT-311K"
READS_FOLDERS = True
IMAGES = "images"
LABELS = re.compile(r"labels(_[A-Za-z]{2,8})?")
TRIED = 20  # labels of a folder, of which one has to be an object with turns or captions


def fits(path: Path) -> bool:
    """Return whether a folder holds `images` and folders of labels, is one of labels beside `images`, or holds such
    folders alone.
    """
    return bool(_sets(path))


def read(path: Path, reading: Reading, counts: DataCounts, given: Sequence[Path]) -> list[Item]:
    """Return the items of a folder: one for each label, in the order of their names; a label whose image is missing
    gives one whose image is not there. Images without a label are counted as unused.

    Raises DataError if there are several folders of labels, or with all labels that cannot be used.
    """
    sets = _sets(path)
    if not sets:
        raise DataError(f"{printable(path)} has no {IMAGES} with labels, labels_en or labels_zh beside them")
    return [item for folder in sets for item in _read_set(folder, reading, counts)]


def _sets(path: Path) -> list[Path]:
    """Return the folders of images and labels: the path itself, or all that lie in it; none where others do too."""
    path = Path(os.path.abspath(path))
    if any(map(_are_labels, _label_folders(path))):
        return [path]
    try:
        with os.scandir(path) as entries:
            inner = sorted(entry.path for entry in entries if entry.is_dir() and not is_no_data(entry.name))
    except OSError:
        return []
    folders = [Path(folder) for folder in inner]
    return folders if all(any(map(_are_labels, _label_folders(folder))) for folder in folders) else []


def _read_set(path: Path, reading: Reading, counts: DataCounts) -> list[Item]:
    folders = [folder for folder in _label_folders(path) if _are_labels(folder)]
    if len(folders) > 1:
        names = " and ".join(folder.name for folder in folders)
        raise DataError(f"{printable(path)} has {names}; give the one to learn, such as {printable(folders[0])}")
    labels = folders[0]
    images: dict[str, list[str]] = {}
    for stem, name in _named(labels.parent / IMAGES, SUFFIXES):
        images.setdefault(unicodedata.normalize("NFC", stem), []).append(name)
    entries = Entries()
    problems = Problems()
    options = reading.records
    keys: dict[str, None] = {}
    read_labels = sorted(_files(labels, (".json",)).items())
    for stem, name in read_labels:
        file = labels / name
        try:
            content = _content(file)
            image = labels.parent / IMAGES / _image_of(stem, content, images, options.ignored)
            keys.update(dict.fromkeys(content if isinstance(content, dict) else ()))
            labelled, passed_over, layout = samples_of(content, options, Beside((image,)))
            records = [with_boxes(record, (image,), picture_size) for record in labelled]
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or error
            problems.add(name, f": {'; '.join(error.problems) if isinstance(error, RecordError) else text}")
            continue
        entries.objects += [Entry(record, (image,), name) for record in records]
        entries.passed_over.update(passed_over)
        entries.layouts[layout] += len(records)
    problems.raise_any(labels)
    check_columns(labels, options.columns, keys)
    labelled_stems = {unicodedata.normalize("NFC", stem) for stem, _ in read_labels}
    unlabelled = sum(len(names) for stem, names in images.items() if stem not in labelled_stems)
    if unlabelled:
        counts.unused["images without a label"] += unlabelled
    return items_of_entries(labels, entries, counts, WHOSE)


def _image_of(stem: str, content: object, images: Mapping[str, Sequence[str]], ignored: Collection[str]) -> str:
    """Return the name of the image of a label. images: names by their stems in NFC: archives of macOS have NFD.

    Raises RecordError where several images have its name, or the label itself names another.
    """
    names = images.get(unicodedata.normalize("NFC", stem), [])
    own = [name for name in names if os.path.splitext(name)[0] == stem]
    if len(own or names) > 1:
        raise RecordError(f"may be of {' or '.join(own or names)}; leave one of them in {IMAGES}")
    image = (own or names or [f"{stem}.jpg"])[0]
    named = without_images(content, ignored)[1] if isinstance(content, dict) else {}
    for key, value in named.items():
        other = value[0] if isinstance(value, list) and len(value) == 1 else value
        text = other.replace("\\", "/").rpartition("/")[2] if isinstance(other, str) else None
        if text and unicodedata.normalize("NFC", os.path.splitext(text)[0]) != unicodedata.normalize("NFC", stem):
            raise RecordError(
                f'"{key}" names {text[:80]!r}, and the image of that label is {image!r}, by its name; rename the '
                f"label, or give --ignore-keys {key} if the name of the label is right"
            )
    return image


def _content(file: Path) -> object:
    content = read_object(read_bytes(file, JSON_LIMIT))
    return content[0] if isinstance(content, list) and len(content) == 1 else content


def _label_folders(path: Path) -> list[Path]:
    path = Path(os.path.abspath(path))
    if LABELS.fullmatch(path.name) and (path.parent / IMAGES).is_dir():
        return [path]
    try:
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        return []
    return [path / name for name in names if LABELS.fullmatch(name)] if IMAGES in names else []


def _are_labels(folder: Path) -> bool:
    """Return whether the first labels of a folder that are JSON have turns or captions."""
    for _, name in zip(range(TRIED), sorted(_files(folder, (".json",)).values())):
        try:
            content = _content(folder / name)
        except (OSError, ValueError):
            continue
        return isinstance(content, dict) and bool(content.keys() & {"conversations", "captions", "messages"})
    return False


def _files(folder: Path, suffixes: Sequence[str] | frozenset[str]) -> dict[str, str]:
    """Return the names of a folder's files by their stems; none where it cannot be read."""
    return dict(_named(folder, suffixes))


def _named(folder: Path, suffixes: Sequence[str] | frozenset[str]) -> Iterator[tuple[str, str]]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be read: {error.strerror}") from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and not is_no_data(name):
            yield stem, name

"""What a data path plainly is not, though it could be taken for it: other kinds of files, other layouts of folders."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sat_lora.errors import DataError
from sat_lora.foreign import open_file, printable
from sat_lora.paths import ENTRIES_SEEN, nearest
from sat_lora.training.item_files import FILE_LIMIT
from sat_lora.training.item_keys import WANTED

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
TEXT_SUFFIXES = (".txt", ".json", ".caption", ".captions", ".xml", ".cap", ".lab", ".gt", ".md", ".yaml", ".yml")
LISTS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".xml")  # files that may hold the answers of many images
TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".yaml", ".yml")
TEXTS = tuple({*TEXT_SUFFIXES, *LISTS, *TABLES})
ANSWER_TABLE = re.compile(r"(labels?|annotations?|captions?|metadata|answers?|ground_?truth)([_.-].*)?", re.IGNORECASE)
LABEL_FOLDERS = re.compile(r"(labels?|annotations?|captions?|anns?|texts?)([ _.-].*)?", re.IGNORECASE)
IMAGE_NAME = re.compile(r"[^\s\"'`,;:|<>\\/]+\.(?:png|jpe?g|bmp|webp|gif|tiff?)", re.IGNORECASE)
LISTED = 3  # names of images in a file that make it a list of them
LISTS_READ, LIST_HEAD = 20, 1 << 16

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
HEAD = 1 << 12  # bytes
MAGIC = (
    (b"\x1f\x8b", "is compressed (gzip): unpack it first"),
    (b"PK\x03\x04", "is an archive (zip): unpack it first"),
    (b"BZh", "is compressed (bzip2): unpack it first"),
    (b"\xfd7zXZ", "is compressed (xz): unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd): unpack it first"),
    (b"7z\xbc\xaf", "is an archive (7z): unpack it first"),
    (b"PAR1", "is a parquet file"),
    (b"SQLite format 3", "is a database"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"),
    (b"<!doctype", "is a web page"),
    (b"<html", "is a web page"),
)


def is_shard(path: str | Path) -> bool:
    """Whether a data path means tar shards: its name, after braces, ends in .tar, or as a compressed one does, which is
    refused later with what to do; or it is a `pipe:` command.
    """
    return str(path).lower().endswith((".tar", *COMPRESSED_SUFFIXES)) or str(path).startswith("pipe:")


def check_file_kind(path: Path) -> None:
    """DataError where a data path that is no folder cannot be a file of JSON objects, judged by how it begins."""
    try:
        with open_file(path, FILE_LIMIT) as file:
            head = file.read(HEAD)
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    wanted = "give the folder of the images, or a .jsonl file"
    for magic, kind in MAGIC:
        if head[: len(magic)].lower() == magic.lower():
            raise DataError(f"{printable(path)} {kind}; {wanted}")
    begins = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xfe\xff \t\r\n")[:1]
    if path.suffix.lower() not in JSON_SUFFIXES and begins not in (b"{", b"["):
        raise DataError(f"{printable(path)} is a file; {wanted} with lines {WANTED}")


def check_layout(folder: Path, images: Sequence[Path]) -> None:
    """DataError where texts in or below a folder are the answers of its images, whose names would be learnt instead."""
    if not images:
        return
    stems, lists, tables = {}, [], []
    for path in itertools.islice(_texts_in(folder), ENTRIES_SEEN):
        relative = path.relative_to(folder)
        suffix = path.suffix.lower()
        if suffix in TEXT_SUFFIXES:
            if any(LABEL_FOLDERS.fullmatch(part) for part in relative.parts[:-1]):
                _refuse(folder, f"{relative} looks like the answer to an image")
            stems.setdefault(path.stem, relative)
            stems.setdefault(path.stem.removesuffix(".gt"), relative)  # of Tesseract
        if suffix in TABLES and ANSWER_TABLE.fullmatch(path.stem):
            tables.append(relative)
        if suffix in LISTS:
            lists.append(path)
    answered = [image for image in images if image.stem in stems or image.name in stems]
    if answered and 2 * len(answered) >= len(images):
        text = stems.get(answered[0].stem) or stems[answered[0].name]
        _refuse(folder, f"{len(answered)} of its {len(images)} images have a text of their name, such as {text}")
    names = {image.name for image in images}
    for path in lists[:LISTS_READ]:
        if len(names & _names_in(path)) >= min(LISTED, len(names)):
            _refuse(folder, f"{path.relative_to(folder)} lists its images; give that file if it has samples")
    if tables:
        _refuse(folder, f"{tables[0]} looks like the answers to its images")


def _refuse(folder: Path, why: str) -> None:
    raise DataError(
        f"{printable(folder)} is laid out in another way: {printable(why)}. Of a folder only images are read, and "
        f"their file names would be learnt as answers: write a .jsonl file with a line {WANTED} for each, or "
        "give a folder that holds the images alone"
    )


def _texts_in(folder: Path) -> Iterator[Path]:
    """Files of texts in and below the folder, hidden ones, what links lead to and runs of this program aside."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "run.json" in files:
            folders.clear()
            continue
        texts = [name for name in files if name.lower().endswith(TEXTS) and not name.startswith(".")]
        yield from (Path(where, name) for name in sorted(texts) if not os.path.islink(os.path.join(where, name)))


def _names_in(path: Path) -> set[str]:
    """Names of images in the beginning of a text file."""
    try:
        with open_file(path, FILE_LIMIT) as file:
            return set(IMAGE_NAME.findall(file.read(LIST_HEAD).decode("utf-8", errors="replace")))
    except (OSError, ValueError):
        return set()


def missing_file_hint(path: Path | bytes | None) -> str:
    """What the user of a path that leads nowhere may have meant, as the end of a sentence; "" if nothing is near."""
    return nearest(path) if isinstance(path, Path) else ""

"""Whether a file lists the answers of images: a table, a list, JSON or XML that names them with something beside."""

import csv
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from sat_lora.data.formats import SEPARATORS, encoding_of, separator_of, texts_of
from sat_lora.data.item_files import FILE_LIMIT, LINE_LIMIT
from sat_lora.files.foreign import open_file, parse_json

LISTS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".tab", ".txt", ".lst", ".list", ".xml", ".yaml", ".yml")
"""Suffixes of files that are looked into."""
_TABLES = (".csv", ".tsv", ".tab", ".txt", ".lst", ".list", ".yaml", ".yml")
WHOLE = 1 << 17  # bytes of a file that is looked at to its end
SAMPLE = 1 << 14  # bytes that are looked at in each place of a longer one
SEARCHED = 1 << 26  # bytes that such places are looked for in
PROBES = 8  # images that they are looked for by
LISTED = 3  # names of images that make a file a list of them
_NAME = re.compile(
    r"(?:([^\s\"'`,;:|<>\\/]+)[\\/]+)?([^\s\"'`,;:|<>\\/]+\.(?:png|jpe?g|bmp|webp|gif|tiff?))", re.IGNORECASE
)
_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # as Label Studio calls a file
_TOKEN = re.compile(r"\"([^\"\\\n]{1,200})\"|>([^<>\n]{1,200})<")
_NAMES_IMAGES = re.compile(
    r".*(image|img|file|photo|pic|path|uuid|图|圖|文件|檔).*|(.*[ _.-])?(id|name|key|sample|编号|名称|序号)",
    re.IGNORECASE,
)
_ANSWERS = re.compile(
    r"(.*[ _.-])?(labels?|annotations?|annots?|captions?|metadata|answers?|ground[ _-]?truths?|gt|transcripts?|"
    r"transcriptions?|train|training|val|valid|validation|test|targets?|标签|标注|答案)([ _.-].*)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Listing:
    """What a file says of some images.

    listed: images that a file names, of all its names and its whole length. is_part: whether only some of it was
    read. says_more: whether something else stands beside the names that is not them again.
    """

    listed: int
    is_part: bool
    says_more: bool


class Names:
    """The names of images, as files refer to them. elsewhere: folders that a path in a file may name instead."""

    def __init__(self, images: Sequence[Path], elsewhere: Collection[str] = ()):
        self.files = {image.name for image in images}
        self.stems = {_plain(image.stem): image.stem for image in images}
        self.elsewhere = frozenset(elsewhere)
        self.probes = [image.stem for image in images[:: max(1, len(images) // PROBES)]][:PROBES]

    def file(self, path: str) -> str | None:
        """Return the name of the image that a path in a file names; None if it is none of these images."""
        folder, name = _split(path)
        if name in self.files:
            return None if folder in self.elsewhere else name
        if "%" in name:
            name = unquote(name)
        uploaded = _UPLOADED.fullmatch(name)
        name = uploaded[1] if uploaded else name
        return name if name in self.files and folder not in self.elsewhere else None

    def stem(self, path: str) -> str | None:
        """Return the stem of the image that a path in a file names, with or without its suffix; None if it is none."""
        folder, name = _split(path)
        stem = self.stems.get(_plain(name))
        if stem is None and "." in name:
            stem = self.stems.get(_plain(os.path.splitext(name)[0]))
        return None if folder in self.elsewhere else stem


def _split(path: str) -> tuple[str, str]:
    """Return (the name of the path's folder, its own); the folder is "" where it names none."""
    if "/" not in path and "\\" not in path:
        return "", path
    folder, _, name = path.replace("\\", "/").rpartition("/")
    return folder.rpartition("/")[2], name


def _plain(stem: str) -> str:
    """Return the stem without the zeros before a number, which Excel drops."""
    return (stem.lstrip("0") or "0") if stem.isdecimal() else stem


def looks_like_answers(path: Path) -> bool:
    """Return whether a file is called as files of answers are."""
    return _ANSWERS.fullmatch(path.stem) is not None


def is_predictions(path: Path) -> bool:
    """Return whether a file begins with a line as an evaluation writes them (predictions.jsonl), or is empty. Raises
    OSError if it cannot be read.
    """
    try:
        with open_file(path, FILE_LIMIT) as file:
            line = file.readline(LINE_LIMIT)
        content = parse_json(line) if line else {"sample": "", "predictions": {}, "scores": {}}
    except ValueError:
        return False
    is_one = isinstance(content, dict) and {"sample", "predictions", "scores"} <= content.keys()
    return is_one and isinstance(content["predictions"], dict) and isinstance(content["scores"], dict)


def find_listing(path: Path, names: Names) -> Listing:
    """Return what a text file says of these images; it lists none if it cannot be read, or is of an evaluation."""
    best = Listing(0, False, False)
    try:
        if path.suffix.lower() == ".jsonl" and is_predictions(path):
            return best
        chunks, is_part = _read(path, names.probes)
    except (OSError, ValueError):
        return best
    for texts in zip(*map(texts_of, chunks), strict=False):
        in_cells = _by_cells(path, texts, names)
        in_text = _by_file_names(texts, names)
        listed, says_more = in_cells if in_cells[0] >= in_text[0] else in_text
        if listed > best.listed:
            best = Listing(listed, is_part, says_more)
    return best


def _read(path: Path, probes: Sequence[str]) -> tuple[list[bytes], bool]:
    """Return (pieces of a file, whether they are not the whole of it).

    The pieces are the whole, or its begin, its end and places where it names some images.
    """
    with open_file(path, FILE_LIMIT) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(SEARCHED)
        if size <= WHOLE:
            return [content], False
        encoding = encoding_of(content)
        width = 4 if "32" in encoding else 2 if "16" in encoding else 1
        mark = content[:4] if width > 1 else b""
        end = "be" if content.startswith((b"\xfe\xff", b"\0")) else "le"
        encodings = ("utf-8", "gb18030", "cp1252") if width == 1 else (f"utf-{8 * width}-{end}",)
        spelled = {probe.encode(name, "ignore") for probe in probes for name in encodings} - {b""}
        hits = [content.find(probe, SAMPLE) for probe in spelled]
        places = sorted({max(0, hit - SAMPLE // 2) // width * width for hit in hits if hit >= 0})
        file.seek((size - SAMPLE) // width * width)
        parts = [*(content[place : place + SAMPLE] for place in places), file.read(SAMPLE)]
        if width == 1:  # whole lines, which begin with a whole character
            parts = [part[part.find(b"\n") + 1 :] for part in parts]
    return [content[:SAMPLE], *(mark + part for part in parts)], True


def _by_file_names(texts: Sequence[str], names: Names) -> tuple[int, bool]:
    """Return (images that are named with their suffix, whether more than names stands there)."""
    named = set()
    lines_with_more = 0
    for text in texts:
        for match in _NAME.finditer(text):
            name = names.file(f"{match[1] or ''}/{match[2]}")
            if name is not None:
                named.add(name)
        lines_with_more += any(_NAME.sub("", line).strip(" \t,;|\"'/\\.:~-") for line in text.splitlines())
    return len(named), lines_with_more > 0


def _by_cells(path: Path, texts: Sequence[str], names: Names) -> tuple[int, bool]:
    """Return (images that are named, whether more stands there), by names without suffix and names with spaces.

    They stand in the columns of a table or in quotes.
    """
    if path.suffix.lower() in _TABLES:
        return _in_columns(path, texts, names)
    tokens = {token.strip() for text in texts for match in _TOKEN.finditer(text) for token in match.groups() if token}
    # A word may well be that of a class; with a digit in it, it is hardly anything but the name.
    stems = {stem for token in tokens if any(map(str.isdigit, token)) and (stem := names.stem(token))}
    files = {name for token in tokens if (name := names.file(token))}
    return max(len(files), len(stems) if any(len(stem) > 2 for stem in stems) else 0), True


def _in_columns(path: Path, texts: Sequence[str], names: Names) -> tuple[int, bool]:
    rows = [row for text in texts for row in _rows(text, _separator(path, texts[0])) if len(row) > 1]
    columns: dict[int, dict[str, bool]] = {}  # by the images' stems, whether their rows say more
    for row in rows:
        stems = [names.stem(cell) for cell in row[:20]]
        for column, stem in enumerate(stems):
            if stem is not None:
                other_cells = stems[:column] + stems[column + 1 :]
                columns.setdefault(column, {})[stem] = any(other != stem for other in other_cells)
    best = 0, False
    for column, says_more in columns.items():
        headers = [row[column] for row in rows[:3] if column < len(row)]  # a remark may stand before
        is_number = all(map(str.isdecimal, says_more))
        begins_at_once = names.stem(headers[0]) is not None if headers else False
        is_named = any(map(_NAMES_IMAGES.fullmatch, headers)) or looks_like_answers(path)
        has_suffix = any(map(names.file, headers[-1:]))
        if is_named or has_suffix or (begins_at_once and not is_number):
            best = max(best, (len(says_more), any(says_more.values())))
    return best


def _separator(path: Path, text: str) -> str | None:
    mark = separator_of(text)
    if mark is None and path.suffix.lower() in (".csv", ".tsv", ".tab"):  # remarks and cells of several lines
        lines = text.splitlines()[:50]
        mark = max(SEPARATORS, key=lambda mark: sum(mark in line for line in lines))
    return ":" if mark is None and path.suffix.lower() in (".yaml", ".yml") else mark


def _rows(text: str, mark: str | None) -> Iterator[list[str]]:
    lines = text.lstrip("\ufeff").splitlines()
    if mark is None:
        yield from (line.split(None, 1) for line in lines if line.strip())
        return
    try:
        for row in csv.reader(lines, delimiter=mark):
            if any(row):
                yield [cell.strip().strip("\"'") for cell in row]
    except csv.Error:  # a cell without end
        return

"""Formats of data sets that are not our own, known by their keys or their first bytes, so that they can be named."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sat_lora.files.foreign import parse_json_at

QUESTIONS = "a line for each question and answer"
IMAGES = "a line for each image"


@dataclass(frozen=True)
class Format:
    """A format of data sets that is not our own.

    whose: its name. marks: sets of keys, separated by white space, of which one is enough; `a[].b` is the key `b` in
    the first object of the list `a`, `*.b` that in the first object among the values. instead: what to write. is_read:
    whether a module of `records` reads it.
    """

    whose: str
    marks: tuple[str, ...]
    instead: str
    is_read: bool = False


FORMATS = (
    Format(
        "Label Studio",
        ("annotations data", "annotations predictions", "annotations file_upload", "annotation_id lead_time",
         "annotations[].result"),
        IMAGES,
    ),
    Format("LabelMe", ("shapes imagePath", "shapes flags", "shapes imageData"), IMAGES),
    Format(
        "VIA, the VGG image annotator",
        ("_via_img_metadata", "_via_settings", "*.regions *.filename", "regions filename", "*.file_attributes"),
        IMAGES,
    ),
    Format("CLEVR", ("questions[].image_filename",), QUESTIONS),
    Format("CreateML", ("annotations[].coordinates",), IMAGES),
    Format(
        "VQA",
        ("annotations[].multiple_choice_answer", "annotations[].question_id", "questions[].question",
         "dataset_type data", "dataset_name data", "dataset_version data"),
        QUESTIONS,
    ),
    Format("Visual Genome", ("regions[].phrase", "qas[].question", "qas"), QUESTIONS),
    Format("Supervisely", ("objects size", "objects[].classTitle"), IMAGES),
    Format("Labelbox", ("data_row",), IMAGES),
    Format("Prodigy", ("_input_hash", "_task_hash"), IMAGES),
    Format("docTR", ("*.img_dimensions", "*.polygons"), IMAGES),
    Format(
        "COCO",
        ("annotations categories", "annotations images", "annotations licenses", "images categories",
         "images licenses"),
        IMAGES,
    ),
    Format(
        "LLaVA, ShareGPT and CogVLM-SFT-311K",
        ("conversations", "conversation", "captions[].role"),
        QUESTIONS,
        True,
    ),
    Format(
        "chat data sets (OpenAI, ms-swift, LLaMA-Factory)",
        ("messages", "dialog", "dialogue", "dialogs", "turns"),
        QUESTIONS,
        True,
    ),
    Format("ms-swift and LLaMA-Factory", ("history", "system", "response", "query"), QUESTIONS, True),
    Format("Alpaca", ("instruction", "output"), QUESTIONS, True),
    Format("Donut", ("file_name ground_truth", "ground_truth gt_parse", "gt_parse"), IMAGES),
    Format("Hugging Face's image folders", ("file_name",), IMAGES, True),
    Format("VQA", ("question", "answers", "multiple_choice_answer"), "a line for each question", True),
)  # fmt: skip


MARKS = frozenset(key for foreign in FORMATS for marks in foreign.marks for key in marks.split())


_MARKS_OF = [(known, [frozenset(marks.split()) for marks in known.marks]) for known in FORMATS]


def format_of(entry: Mapping) -> Format | None:
    """Return the format that an object of a file has; None if it is none of FORMATS."""
    keys = {*entry}
    for key, value in entry.items():
        if isinstance(value, dict):
            keys.update(f"*.{name}" for name in value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            keys.update(f"{key}[].{name}" for name in value[0])
    return next((known for known, marks in _MARKS_OF if any(keys.issuperset(mark) for mark in marks)), None)


JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
HEAD = 1 << 12  # bytes of a file, enough for all below
_MAGIC = (
    (b"\x1f\x8b", "is compressed (gzip): unpack it first"),
    (b"BZh", "is compressed (bzip2): unpack it first"),
    (b"\xfd7zXZ", "is compressed (xz): unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd): unpack it first"),
    (b"7z\xbc\xaf", "is an archive (7z): unpack it first"),
    (b"Rar!", "is an archive (rar): unpack it first"),
    (b"PAR1", "is a parquet file"),
    (b"ARROW1", "is an Arrow file"),
    (b"FEA1", "is a Feather file"),
    (b"SQLite format 3", "is a database"),
    (b"\x89HDF", "is an HDF5 file"),
    (b"\x93NUMPY", "is a NumPy array"),
    (b"MATLAB", "is a MATLAB file"),
    (b"\xd0\xcf\x11\xe0", "is a table or document of Microsoft Office"),
    (b"\x80\x02", "is a pickle"),
    (b"\x80\x03", "is a pickle"),
    (b"\x80\x04\x95", "is a pickle"),
    (b"\x80\x05\x95", "is a pickle"),
    (b"\x89PNG", "is one picture"),
    (b"\xff\xd8\xff", "is one picture"),
    (b"GIF8", "is one picture"),
    (b"%PDF", "is a PDF file"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"),
    (b"<!doctype html", "is a web page"),
    (b"<html", "is a web page"),
)
_ZIPS = {
    ".xlsx": "a table of Excel", ".xlsm": "a table of Excel", ".ods": "a table of LibreOffice", ".npz": "NumPy arrays",
    ".docx": "a document of Word", ".pt": "a file of PyTorch", ".pth": "a file of PyTorch",
}  # fmt: skip
_XML = (
    (r"<annotations\b.*?(<image\b|<version>|<meta>)", "holds annotations of CVAT (XML)"),
    (r"<annotations?\b", "holds annotations of Pascal VOC (XML)"),
    (r"<PcGts\b", "holds a page of PAGE XML"),
    (r"<alto\b", "holds a page of ALTO XML"),
    (r"<TEI\b", "holds a text of TEI XML"),
)
_SUFFIXES = {
    ".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".md": "Markdown", ".py": "a program", ".tfrecord": "TFRecord",
    ".mdb": "an LMDB database", ".lmdb": "an LMDB database",
}  # fmt: skip
_BOXES = re.compile(r"\d+([ \t]+-?\d*\.?\d+(e-?\d+)?){4,}", re.IGNORECASE)
_NAME = re.compile(r"[^\t,;|\"']+\.(png|jpe?g|bmp|webp|gif|tiff?)", re.IGNORECASE)
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}


def kind_of_file(head: bytes, suffix: str) -> str | None:
    """Return what a file is that is no JSON, by its first HEAD bytes and its suffix; None if nobody knows.

    It is `is ...`, or `holds ...` where it may have the answers to images.
    """
    suffix = suffix.lower()
    begin = head[:64].lower()
    if kind := next((kind for magic, kind in _MAGIC if begin.startswith(magic.lower())), None):
        return kind
    if head.startswith(b"PK\x03\x04"):
        return f"is {_ZIPS[suffix]}" if suffix in _ZIPS else "is an archive (zip): unpack it first"
    if head[16:20] == b"\xde\xc0\xef\xbe":
        return "is an LMDB database"
    text = texts_of(head)[0].lstrip("\ufeff \t\r\n")
    if text.startswith("<"):
        if re.search(r"<html\b", text[:1000], re.IGNORECASE):
            return "is a web page"
        return next((kind for pattern, kind in _XML if re.search(pattern, text, re.DOTALL)), "is XML")
    lines = _lines(text)
    if lines and all(map(_BOXES.fullmatch, lines)):
        return "holds the boxes of YOLO"
    if suffix in _SUFFIXES:
        return f"is {_SUFFIXES[suffix]}"
    separator = separator_of(text)
    if suffix in (".csv", ".tsv") or (separator is not None and suffix not in JSON_SUFFIXES and "\0" not in text):
        return f"holds a table{f' (columns between {SEPARATORS[separator]})' if separator else ''}"
    if lines and all(map(_NAME.match, lines)):
        return "holds a list of images"
    return None


def _lines(text: str) -> list[str]:
    """Return the first lines that are not empty; without the last, which may be cut off, if there are others."""
    lines = [line.strip(" ") for line in text.splitlines()[:20] if line.strip()]
    return lines[:-1] or lines


def separator_of(text: str) -> str | None:
    """Return the character between the columns of a table, by its first lines; None if it is no table."""
    lines = _lines(text)
    return next((mark for mark in SEPARATORS if lines and all(mark in line for line in lines)), None)


def encoding_of(content: bytes) -> str:
    """Return the encoding of a text, by its first bytes: of JSON's encodings, UTF-8 for NUL bytes alone."""
    return json.detect_encoding(content[:4]) if any(content[:4]) else "utf-8"


def texts_of(content: bytes) -> list[str]:
    """Return part of a text file as text: one way to read it if its encoding is plain, else several ways.

    UTF-16 and UTF-32 are known by their byte-order mark or their NUL bytes, as JSON's are; what is no UTF-8 is read as
    Windows writes it in Western Europe and in China.
    """
    encoding = encoding_of(content)
    if not encoding.startswith("utf-8"):
        return [content.decode(encoding, "replace")]
    for cut in range(min(4, len(content) + 1)):  # a character may be cut off at the end
        try:
            return [content[: len(content) - cut].decode("utf-8-sig")]
        except UnicodeDecodeError:
            continue
    return [content.decode(name, "replace") for name in ("cp1252", "gb18030")]


def named_format(path: Path, head: bytes, unread: bool = False) -> str | None:
    """Return what a file that has the answers to images is, as `kind_of_file` says it; None if nobody knows.

    JSON is known by its first object, or, where that goes on beyond HEAD bytes, by the keys up to there. unread: says
    nothing of formats that are read.
    """
    text = texts_of(head)[0].lstrip("\ufeff \t\r\n")
    if not text.startswith(("{", "[")):
        return kind_of_file(head, path.suffix)
    foreign = format_of(_first_object(text))
    return None if foreign is None or (unread and foreign.is_read) else f"is of {foreign.whose}"


def _first_object(text: str) -> Mapping:
    try:
        entry, _ = parse_json_at(text, text.index("{"))
        if isinstance(entry, dict):
            return entry
    except ValueError:
        pass
    return dict.fromkeys(re.findall(r'"([^"\\]{1,60})"\s*:', text))

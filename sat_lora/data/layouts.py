"""What a data path plainly is not, though it could be taken for it: other kinds of files, other layouts of folders."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from sat_lora.cogvlm.inputs.pictures import FORMATS, SUFFIXES
from sat_lora.data.answer_lists import LISTED, LISTS, Names, find_listing, looks_like_answers
from sat_lora.data.folders import left_out_lines
from sat_lora.data.formats import HEAD, JSON_SUFFIXES, kind_of_file, named_format
from sat_lora.data.item_files import FILE_LIMIT, LINE_LIMIT
from sat_lora.data.item_keys import WANTED
from sat_lora.errors import DataError
from sat_lora.files.foreign import open_file
from sat_lora.files.paths import ENTRIES_SEEN, NAMES_COMPARED, nearest
from sat_lora.printable import printable

TEXT_SUFFIXES = (
    ".txt", ".json", ".caption", ".captions", ".xml", ".cap", ".lab", ".gt", ".md", ".yaml", ".yml", ".tags", ".label",
    ".desc", ".ann", ".text",
)  # fmt: skip
TABLES = (
    ".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".feather", ".yaml", ".yml", ".npy", ".npz", ".mat",
    ".pkl", ".pickle", ".h5", ".hdf5", ".db", ".sqlite", ".sqlite3",
)  # fmt: skip
TEXTS = tuple({*TEXT_SUFFIXES, *LISTS, *TABLES})
ANSWER_TABLE = re.compile(
    r"(.*[_.-])?(labels?|annotations?|captions?|metadata|answers?|ground_?truth)([_.-].*)?", re.IGNORECASE
)
LABEL_FOLDERS = re.compile(
    r"(labels?|annotations?|annots?|captions?|anns?|texts?|txts?|gts?|ground[ _-]?truths?|transcripts?|transcriptions?|"
    r"标注|标签)([ _.-].*)?",
    re.IGNORECASE,
)
MASK_FOLDERS = re.compile(
    r"(.*[ _.-])?(masks?|segmentations?|segmentationclass|segmentationobject|labels?|annotations?|gts?|ground_?truth)",
    re.IGNORECASE,
)
NUMBERED = re.compile(r"(.*?)[ _.-]*\(?(\d+)\)?")
OUTPUTS = re.compile(r"(.*[ _.-])?(pred\w*|outputs?|results?|eval\w*|runs?|logs?)([ _.-].*)?", re.IGNORECASE)
PARTS = re.compile(r"(train|val|valid|test|dev|training|validation|testing|part|split|fold).*|\d+", re.IGNORECASE)
ABOUT_SAMPLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""Files that Hugging Face's data sets have beside their samples."""
_TABLES_READ = (".csv", ".tsv", ".tab", ".parquet")
LISTS_READ = 20
ENOUGH = 20  # images that part of a long file names
FOLDERS_READ = 50
ENTRIES_BESIDE = 20_000


def check_file_kind(path: Path) -> None:
    """Raise DataError if a data path that is no folder cannot be a file of JSON objects, by how it begins."""
    try:
        with open_file(path, FILE_LIMIT) as file:
            head = file.read(HEAD)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    begins = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xfe\xff \t\r\n")[:1]
    if begins in (b"{", b"["):
        # One line of hundreds of MB would be refused for its length alone.
        kind = named_format(path, head, unread=True) if size > LINE_LIMIT and b"\n" not in head else None
        if kind is not None:
            raise DataError(f"{printable(path)} {kind}, a layout that is not read here: write lines {WANTED}")
        return
    kind = kind_of_file(head, path.suffix)
    if kind is None and path.suffix.lower() in JSON_SUFFIXES:
        return
    instead = f"give the folder of the images, or a .jsonl file with lines {WANTED}"
    if path.suffix.lower() == ".arrow" and kind is None:  # the stream that `datasets` writes
        kind = "is an Arrow file"
        instead = _of_saved_dataset(path.parent)
    if kind is not None and kind.startswith("holds"):
        instead = f"write a .jsonl file with a line {WANTED} for each image"
    raise DataError(f"{printable(path)} {kind or 'is a file'}; {instead}")


def no_samples(path: Path, unused: Counter[str]) -> str:
    """Return that a data path has no samples, what lies there instead, and which of its files may be meant.

    unused: what was found there and is no sample, by reason.
    """
    wanted = f"images ({', '.join(FORMATS)}) in or below it" if path.is_dir() else "lines in it"
    others = ", ".join(left_out_lines(unused)) or "nothing"
    advice = "give a folder or file that has some"
    files = _files_of_samples(path) if path.is_dir() else []
    if files:
        shown = [*map(printable, files[:3]), *["..."] * (len(files) > 3)]
        advice = f"of a folder only images are read: give its file{'s' * (len(files) > 1)}, {', '.join(shown)}"
    elif any(reason.startswith(".arrow") for reason in unused):
        advice = _of_saved_dataset(path)
    return f"{path} has no {wanted}; found {others}; {advice}"


def _of_saved_dataset(folder: Path) -> str:
    """Return how a folder of `save_to_disk`, or of other Arrow files, becomes one that is read."""
    inner = sorted(file.parent for file in itertools.islice(folder.glob("*/state.json"), FOLDERS_READ))
    saved = folder if (folder / "state.json").exists() or not inner else inner[0]
    others = f" (so for {', '.join(printable(place.name) for place in inner)})" if len(inner) > 1 else ""
    return (
        "write it as parquet, with to_parquet of Hugging Face's datasets, and give that file: python -c "
        f'"from datasets import load_from_disk; load_from_disk({printable(repr(str(saved)))})'
        f".to_parquet('{printable(saved.name or 'data')}.parquet')\"{others}"
    )


def _files_of_samples(folder: Path) -> list[Path]:
    """Return the files in or below a folder that may hold samples, by their names."""
    files = []
    for where, _, names in itertools.islice(os.walk(folder), FOLDERS_READ):
        for name in sorted(names):
            is_of_samples = name.lower().endswith((*JSON_SUFFIXES, *_TABLES_READ, ".tar"))
            if is_of_samples and name not in ABOUT_SAMPLES and not name.startswith("."):
                files.append(Path(where, name))
    return files


def check_layout(folder: Path, images: Sequence[Path], given: Collection[Path] = ()) -> None:
    """Raise DataError if texts in, below or beside a folder are the answers of its images.

    Their names would be learnt instead. given: files that are data paths themselves; they are no such texts.
    """
    if images:
        _check_inside(folder, images)
        _check_beside(folder, images, {os.path.realpath(path) for path in given})


def _check_inside(folder: Path, images: Sequence[Path]) -> None:
    stems: dict[str, Path] = {}
    lists: list[Path] = []
    tables: list[Path] = []
    for path in itertools.islice(_texts_in(folder), ENTRIES_SEEN):
        relative = path.relative_to(folder)
        suffix = path.suffix.lower()
        if suffix in TEXT_SUFFIXES:
            if any(LABEL_FOLDERS.fullmatch(part) for part in relative.parts[:-1]):
                _refuse(folder, path, f"{relative} looks like the answer to an image")
            for stem in _stems_answered(path.stem):
                stems.setdefault(stem, path)
        if suffix in TABLES and (ANSWER_TABLE.fullmatch(path.stem) or _is_closed_table(path)):
            tables.append(path)
        if suffix in LISTS:
            lists.append(path)
    answered = [image for image in images if image.stem in stems or image.name in stems]
    if answered and 2 * len(answered) >= len(images):
        text = stems.get(answered[0].stem) or stems[answered[0].name]
        count = f"{len(answered)} of its {len(images)} images"
        _refuse(folder, text, f"{count} have a text of their name, such as {text.relative_to(folder)}")
    names = Names(images)
    for path in sorted(lists, key=lambda path: not looks_like_answers(path))[:LISTS_READ]:
        listing = find_listing(path, names)
        if listing.listed >= min(LISTED, len(images)):
            if listing.says_more:
                _refuse(folder, path, f"{path.relative_to(folder)} lists its images{_advice(path)}")
            tables = [table for table in tables if table != path]
    if tables:
        _refuse(folder, tables[0], f"{tables[0].relative_to(folder)} looks like the answers to its images")
    _check_masks(folder, images)
    _check_classes(folder, images)


def _check_classes(folder: Path, images: Sequence[Path]) -> None:
    """Raise DataError if the answers of images are their folders, as of `cat/0001.png` beside `dog/0001.png`.

    So are those of `cat/cat_1.png`.
    """
    classes: dict[Path, list[str]] = {}
    for image in images:
        classes.setdefault(image.parent, []).append(image.stem)
    if len(classes) < 2 or folder in classes:
        return
    named = 0
    numbered = 0
    for place, stems in classes.items():
        matches = [match for stem in stems if (match := NUMBERED.fullmatch(stem))]
        named += sum(match[1].casefold() == place.name.casefold() for match in matches)
        numbers = {int(match[2][:18]) for match in matches}
        # Names that are answers may be numbers; but hardly ones with zeros before them and without a gap.
        is_counted = len(numbers) >= LISTED and max(numbers) - min(numbers) < len(numbers)
        numbered += len(stems) * (is_counted and any(re.match("0[0-9]{2}", match[2]) for match in matches))
    if 5 * max(named, numbered) >= 4 * len(images):
        first, second = ((place / stems[0]).relative_to(folder) for place, stems in [*classes.items()][:2])
        _refuse(folder, None, f"its images are numbered in folders ({first}, {second}), as those of classes are")


def _check_masks(folder: Path, images: Sequence[Path]) -> None:
    """Raise DataError if pictures are the answers to other pictures."""
    masks = {}
    others = set()
    for image in images:
        parts = image.relative_to(folder).parts[:-1]
        if any(map(MASK_FOLDERS.fullmatch, parts)):
            masks[image.stem.removesuffix("_mask")] = image.relative_to(folder)
        else:
            others.add(image.stem)
    both = masks.keys() & others
    if both and 2 * len(both) >= len(masks):
        mask = masks[min(both)]
        _refuse(folder, None, f"{mask} looks like the mask of another image, for as many as {len(both)}")


def _is_closed_table(path: Path) -> bool:
    """Return whether a table that nobody looks into may, by its name, be of the images it lies among."""
    return path.suffix.lower() not in LISTS and looks_like_answers(path)


def _stems_answered(stem: str) -> set[str]:
    """Return the names of images, with or without suffix, that a text of that stem may belong to."""
    bare = re.sub(r"^gt_|(_gt|[._](caption|label|annotation)s?|\.gt)$", "", stem, flags=re.IGNORECASE)
    return {stem, bare}


def _check_beside(folder: Path, images: Sequence[Path], given: Collection[str]) -> None:
    stems = {stem for image in images for stem in (image.stem, image.name)}
    subfolders = {image.parent.relative_to(folder) for image in images[:: max(1, len(images) // 10)]}
    for base in dict.fromkeys((Path(os.path.abspath(folder)), Path(os.path.realpath(folder)))):
        is_part = PARTS.fullmatch(base.name) is not None
        for parent in list(base.parents)[: 2 if is_part else 1]:
            if parent == Path(parent.anchor):
                break
            relative = base.relative_to(parent)
            folders, files = _entries_of(parent, relative.parts[0])
            near = parent == base.parent
            for sibling in folders:
                is_label = LABEL_FOLDERS.fullmatch(sibling.name) is not None
                if not is_label and (not near or OUTPUTS.fullmatch(sibling.name)):
                    continue
                inner = Path(*relative.parts[1:])
                for place in dict.fromkeys(
                    (sibling, sibling / inner, *(sibling / inner / name for name in subfolders))
                ):
                    _check_texts_of(folder, place, stems, len(images), is_label)
            lists = [
                *files,
                *(path for place in folders if LABEL_FOLDERS.fullmatch(place.name) for path in _files_of(place)),
            ]
            lists = [path for path in lists if os.path.realpath(path) not in given]
            _check_lists_beside(folder, images, lists, {place.name for place in folders})


def _entries_of(parent: Path, without: str) -> tuple[list[Path], list[Path]]:
    """Return (folders, files of texts) in a folder that holds the images' own; likely answers come first."""
    folders = []
    files = []
    try:
        with os.scandir(parent) as entries:
            for entry in itertools.islice(entries, NAMES_COMPARED):
                if entry.name.startswith(".") or entry.name == without:
                    continue
                if entry.is_dir():
                    folders.append(Path(entry.path))
                elif entry.name.lower().endswith(TEXTS):
                    files.append(Path(entry.path))
    except OSError:
        return [], []
    if any(file.name == "run.json" for file in files):
        return [], []
    folders.sort(key=lambda path: (LABEL_FOLDERS.fullmatch(path.name) is None, path.name))
    return folders[:FOLDERS_READ], files


def _files_of(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, ENTRIES_BESIDE)]
    except OSError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _check_texts_of(folder: Path, place: Path, stems: set[str], count: int, is_label: bool) -> None:
    """Refuse the images if `place`, which has no images itself, holds texts of their names."""
    files = _files_of(place)
    texts = {path for path in files if path.suffix.lower() in TEXT_SUFFIXES}
    answered = [path for path in texts if not stems.isdisjoint(_stems_answered(path.stem))]
    enough = min(count, len(texts)) if is_label else max(count, len(texts))
    if not answered or 2 * len(answered) < enough or (not is_label and len(answered) < LISTED):
        return
    if any(path.suffix.lower() in SUFFIXES and path.stem in stems for path in files):
        return  # they are of the images there
    text = min(answered)
    _refuse(folder, text, f"{len(answered)} texts beside it have the names of its images, such as {text}")


def _check_lists_beside(
    folder: Path, images: Sequence[Path], lists: Sequence[Path], elsewhere: Collection[str]
) -> None:
    names = Names(images, elsewhere)
    closed = [path for path in lists if path.suffix.lower() not in LISTS and ANSWER_TABLE.fullmatch(path.stem)]
    if closed:
        _refuse(folder, closed[0], f"{min(closed)} beside it looks like the answers to its images")
    lists = [path for path in lists if path.suffix.lower() in LISTS]
    for path in sorted(lists, key=lambda path: not looks_like_answers(path))[:LISTS_READ]:
        listing = find_listing(path, names)
        enough = listing.listed >= min(LISTED, len(images)) and (
            2 * listing.listed >= len(images) or (listing.is_part and listing.listed >= ENOUGH)
        )
        if enough and listing.says_more:
            _refuse(folder, path, f"{path} lists its images{_advice(path)}")


def _advice(path: Path) -> str:
    return "; give that file if it has samples" if path.suffix.lower() in (*JSON_SUFFIXES, *_TABLES_READ) else ""


def _refuse(folder: Path, text: Path | None, why: str) -> None:
    kind = None if text is None else _kind_of_text(text)
    where = "" if text is None or kind is None else f" ({text.name} {kind})"
    raise DataError(
        f"{printable(folder)} is laid out in another way: {printable(why + where)}. Of a folder only images are read, "
        f"and their file names would be learnt as answers: write a .jsonl file with a line {WANTED} for each, or, if "
        "the file names are the answers, give --names-are-answers"
    )


def _kind_of_text(path: Path) -> str | None:
    try:
        with open_file(path, FILE_LIMIT) as file:
            return named_format(path, file.read(HEAD))
    except (OSError, ValueError):
        return None


def _texts_in(folder: Path) -> Iterator[Path]:
    """Yield files of texts in and below the folder; not hidden ones, what links lead to and runs of this program."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "run.json" in files:
            folders.clear()
            continue
        texts = [name for name in files if name.lower().endswith(TEXTS) and not name.startswith(".")]
        yield from (Path(where, name) for name in sorted(texts) if not os.path.islink(os.path.join(where, name)))


def missing_file_hint(path: object) -> str:
    """Return what was most likely meant by a path that leads nowhere, as the end of a sentence; "" if unknown."""
    return nearest(path) if isinstance(path, Path) else ""

"""Paths that lead nowhere: said with what their user may have meant. It needs nothing but Python's own library."""

import difflib
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from sat_lora.errors import ConfigError
from sat_lora.printable import printable

ENTRIES_SEEN = 200_000
NAMES_COMPARED = 2_000
CLOSE = 0.8  # of difflib: how alike a name is that was meant
SAT_PARTS = ("latest", "model_config.json")
BASE_WANTED = (
    f"the base's folder: SAT's with {' and '.join(SAT_PARTS)}, or Hugging Face's with config.json and safetensors"
)
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
ADAPTER_WANTED = "give the folder of an adapter, such as runs/NAME/adapter"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_WEIGHTED = re.compile(r"(.*[^:/\\]):(\d+\.?\d*|\.\d+)", re.DOTALL)
SMALLEST_SHARE = 0.001
"""The least part of all weights that a data path may have: of a thousand samples one is then its."""
_QUOTES = "\"'`“”„‘’«»"


def missing_path(text: str, wanted: str) -> str | None:
    """Return what is wrong with a path that leads to nothing, and what its user may have meant or `wanted` says.

    It is None where something is there, or where it cannot be seen whether it is.
    """
    if not text.strip():
        return f"got {text!r}, an empty name; a variable of the shell may not be set; {wanted}"
    try:
        os.stat(text)
        return None
    except ValueError:  # it holds a NUL
        pass
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            return None  # it may be there, and whoever reads it says what is wrong
    if os.path.islink(text):
        return f"{printable(text)} is a link to {printable(os.readlink(text))}, which is not there; mend the link"
    return f"{printable(text)} does not exist{_written_as(text) or nearest(Path(text))}; {wanted}"


def split_weight(text: str) -> tuple[str, float | None]:
    """Return (path, weight) of a data path that is written PATH:WEIGHT; the weight is None where there is none.

    What is there under the whole text is a path.
    """
    match = _WEIGHTED.fullmatch(text)
    if match is None or os.path.lexists(text):
        return text, None
    return match[1], float(match[2])


def missing_data(text: str, wanted: str) -> str | None:
    """Return `missing_path` of a data path, whose user may have meant a weight by its end."""
    return _no_weight(text) or missing_path(text, wanted)


def _no_weight(text: str) -> str | None:
    """Return that what follows an existing path is no weight; None where nothing seems to be meant as one."""
    head, _, end = text.rpartition(":" if ":" in text else "=")
    if not head or "\0" in text or os.path.lexists(text) or not os.path.exists(head) or _written_as(text):
        return None
    shown = printable(head)
    problem = f"{printable(text)} does not exist; {shown} does"
    return f"{problem}: a weight is a number above 0, as in {shown}:0.7, got {printable(repr(end))}"


def weights_problem(texts: Sequence[str], option: str) -> str | None:
    """Return what is wrong with the weights of the data paths of an option; None where there is nothing."""
    weighted = [split_weight(text) for text in texts]
    given = [(path, weight) for path, weight in weighted if weight is not None]
    if not given:
        return None
    shown = printable(f"{given[0][0]}:{given[0][1]:g}")
    if option != "--train-data":
        return f"{shown}: a weight is for --train-data; give the path alone"
    if len(given) < len(weighted):
        lacking = [path for path, weight in weighted if weight is None]
        none = f"{shown} has a weight and {printable(lacking[0])} has none; give each path one, or none"
        return next(filter(None, map(_no_weight, lacking)), none)
    if nothing := [path for path, weight in given if not weight]:
        return f"{printable(nothing[0])}: a weight of 0; leave the path out, or give a number above 0"
    total = sum(weight for _, weight in given)
    if math.isinf(total):
        largest = max(given, key=lambda entry: entry[1])[0]
        return f"{printable(largest)}: its weight is too large to be a number; give shares, such as 0.7 and 0.3"
    if small := [(path, weight / total) for path, weight in given if weight / total < SMALLEST_SHARE]:
        path, share = min(small, key=lambda entry: entry[1])
        return (
            f"{printable(path)}: its weight is {share:.2g} of all weights, and {SMALLEST_SHARE:g} is the least; leave "
            "the path out, or give a larger one"
        )
    if shards := [path for path, _ in given if is_shard(path)]:
        return f"{printable(shards[0])}: tar shards are streamed, shard by shard, and take no weight"
    return None


def is_shard(path: str | Path) -> bool:
    """Return whether a data path means tar shards: its name, after braces, ends in .tar, or it is a `pipe:` command.

    So does one that ends as a compressed one does, which is refused later with what to do.
    """
    return str(path).lower().endswith((".tar", *COMPRESSED_SUFFIXES)) or str(path).startswith("pipe:")


def missing_adapter(folder: str, wanted: str = ADAPTER_WANTED) -> str | None:
    """Return what is wrong with the folder of an adapter that is not there; None if something is there."""
    return missing_path(folder, wanted)


def missing_base(folder: str | Path) -> str | None:
    """Return what is wrong with the folder of a base that is not there, and what to do; None if something is there."""
    folder = Path(folder)
    if folder.exists():
        return None
    problem = f"{printable(folder)} is not a SAT model folder: it does not exist"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder)):  # the name of a model on a hub looks like this
        return (
            f"{problem} (found: no such folder). Nothing is fetched: if it is a model's name, download it with "
            f"`huggingface-cli download {folder} --local-dir {folder.name}`, then give that folder"
        )
    near = difflib.get_close_matches(folder.name, names_in(folder.parent), n=1)
    meant = f"did you mean {printable(folder.parent / near[0])}?" if near else f"give {BASE_WANTED}"
    return f"{problem}; found: no such folder; {meant}"


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, of the first 10,000; none if it cannot be read."""
    try:
        return sorted(itertools.islice((entry.name for entry in os.scandir(folder)), 10_000))
    except OSError:
        return []


def _written_as(text: str) -> str:
    """Return what no name of a file is meant by, as the end of a sentence; "" for a name."""
    address = _ADDRESS.match(text)
    if address:
        if address[1].lower() == "file":
            return "; give the path alone, without file://"
        return "; nothing is fetched: download it first"
    if text.startswith("~"):
        return f"; the shell has left ~ as it is: give {printable(os.path.expanduser(text))}"
    if text[0] in _QUOTES and text[-1] in _QUOTES:
        return "; its quotes are a part of the name: leave them out"
    if re.search(r"\$\w|\$\{|%[A-Za-z]\w{2,}%", text):
        return "; the shell has left the variable as it is: single quotes keep it from being replaced"
    if re.search(r"[*?]", text):
        return "; the shell has found nothing for * and ?, or quotes kept them: give the folder itself"
    for separator, name in ((",", "commas"), (";", "semicolons"), (os.pathsep, "colons")):
        parts = text.split(separator)
        if len(parts) > 1 and all(part.strip() and os.path.exists(split_weight(part.strip())[0]) for part in parts):
            return f"; several paths have spaces between them, not {name}"
    if re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        return "; it is a path of Windows: under WSL its drive is below /mnt"
    if text != text.strip() and os.path.exists(text.strip()):
        return "; it begins or ends with a space: leave that out"
    return ""


def nearest(path: Path) -> str:
    """Return the name beside a path's that was most likely meant, as the end of a sentence; "" if nothing is near."""
    parent = path
    missing: list[str] = []
    while not os.path.lexists(parent) and parent != parent.parent:
        missing.insert(0, parent.name)
        parent = parent.parent
    if not missing:
        return ""
    if not os.path.isdir(parent):
        return f"; {printable(parent)} is no folder" if os.path.lexists(parent) else ""
    first, *rest = missing
    near = _near_name(str(parent), first)
    if not rest:
        is_same = near is not None and _plain(near) in (_plain(first), _plain(unquote(first)))
        return "" if near is None else f"; its folder has {near!r}" if is_same else f"; did you mean {near!r}?"
    none = f"; there is no folder {printable(parent / first)}"
    if near is None or not os.path.isdir(parent / near):
        return none
    for name in rest:  # as far as its names lead on
        parent = parent / near
        near = None
        near = _near_name(str(parent), name)
        if near is None:
            break
    meant = parent if near is None else parent / near
    return f"{none}, did you mean {str(meant)!r}?"


def _near_name(folder: str, name: str) -> str | None:
    """Return the name in a folder that is the same but for what is not seen, or else the one most like it."""
    names = _names_of(os.path.abspath(folder))
    plain = {_plain(entry): entry for entry in names}
    for meant in (name, unquote(name)):
        if near := plain.get(_plain(meant)):
            return near
    matches = difflib.get_close_matches(name, names[:NAMES_COMPARED], 1, CLOSE)
    return matches[0] if matches else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


@lru_cache(maxsize=4)
def _names_of(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry, _ in zip(entries, range(ENTRIES_SEEN))]
    except (OSError, ValueError):
        return []


def packed_shards(out: Path, overwrite: bool) -> list[Path]:
    """Return the shards that are in `out` already, in order. Raises ConfigError where nothing may replace them."""
    shards = sorted(out.glob("shard-[0-9]*.tar"))
    if shards and not overwrite:
        count = f"{len(shards)} shard{'s' * (len(shards) > 1)}"
        raise ConfigError(
            f"--out: {printable(out)} holds {count} ({printable(shards[0].name)}, ...); nothing was changed. Give "
            "another folder, or replace them (--overwrite)"
        )
    return shards

"""How data paths are read, and the samples of one object, whatever container it lies in."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sat_lora.data.box_texts import BOX_MARK, boxes_problem
from sat_lora.data.item_keys import (
    FILM_NAMES,
    METADATA,
    METADATA_OF_SHARDS,
    NAMES,
    OURS,
    WANTED,
    is_film_name,
    key_problems,
    with_references,
    with_usual_names,
)
from sat_lora.data.records.record import (
    COLUMNS,
    IMAGE_MARK,
    TURNS,
    Fields,
    Record,
    RecordError,
    RecordOptions,
    listed,
    place_images,
)
from sat_lora.data.records.registry import RECORDS, USUAL
from sat_lora.errors import ConfigError
from sat_lora.printable import printable

READERS = {
    "cogvlm-sft": "sat_lora.data.readers.label_folders",
    "images": "sat_lora.data.readers.named_images",
    "parquet": "sat_lora.data.readers.parquet_files",
    "csv": "sat_lora.data.readers.tables",
    "json": "sat_lora.data.readers.json_files",
}
"""How samples lie in a path, by the names that --data-format has for it, in the order in which they are tried: the
module of each, which is a `Reader`. A new one is a module of that folder and a line here.
"""
_MAY_BE_LEFT_OUT = frozenset({"history", "system", "boxes"})
_NO_IMAGES = (type(None), bool, int, float, list)
_TEXTS = (*NAMES, "system")
SHARDS = "tar"
"""The name of --data-format for tar shards, which are streamed."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The options of a run that say how its data paths are read, under their names.

    run_folder: of the run that asks.
    """

    ignore_keys: Collection[str] = ()
    images_from: Sequence[str | Path] = ()
    names_are_answers: bool = False
    run_folder: str | Path | None = None
    data_format: str | None = None
    columns: Sequence[str] = ()
    image_mark: str = IMAGE_MARK
    images_per_sample: int = 1

    @classmethod
    def of(cls, settings: object, **changes) -> "Reading":
        """Return the reading that an object's attributes of these names say; one that it lacks is the default.

        changes: to them.
        """
        known = vars(settings)
        values = {name: known[name] for name in cls.__dataclass_fields__ if known.get(name) is not None}
        return cls(**{**values, **changes})

    @property
    def records(self) -> RecordOptions:
        """How the objects of a file are read. Raises ConfigError for columns that are none."""
        return RecordOptions(
            ignored=self.ignore_keys,
            layout=self.data_format if self.data_format in RECORDS else None,
            columns=columns_of(self.columns),
            image_mark=self.image_mark,
            most_images=self.images_per_sample,
        )


def columns_of(texts: Sequence[str]) -> dict[str, str]:
    """Return {our name: the column} of the values of --columns. Raises ConfigError where they are none."""
    columns: dict[str, str] = {}
    for text in (part for texts_of_one in texts for part in texts_of_one.split(",") if part.strip()):
        ours, mark, column = (part.strip() for part in text.partition("="))
        if not mark or not column or ours not in COLUMNS:
            raise ConfigError(
                f"--columns: got {printable(text)}, wanted NAME=COLUMN with a name of {', '.join(COLUMNS)}, such as "
                "prompt=question"
            )
        if ours in columns:
            raise ConfigError(f"--columns: {ours} is given twice, {columns[ours]} and {column}; give it once")
        columns[ours] = column
    return columns


def samples_of(
    value: object, options: RecordOptions, beside: Sequence | None = None
) -> tuple[list[Record], set[str], str]:
    """Return (the samples of one object, keys that were passed over, the name of its layout).

    beside: the images that lie beside the object, which then names none. Raises RecordError with all that is wrong with
    it, but not with what its images lead to.
    """
    rewritten, layout = rewrite(value, options)
    names = NAMES if beside is None else NAMES[1:]
    metadata = METADATA if beside is None else METADATA_OF_SHARDS
    records = []
    passed_over: set[str] = set()
    for fields in rewritten:
        fields, references = with_references(fields, options.ignored) if layout == USUAL else (fields, ())
        entry, called = with_usual_names(fields, options.ignored, names)
        images = _images(entry.get("image")) if beside is None else [*beside]
        checked = {**entry, "image": "named"} if images else {k: v for k, v in entry.items() if k != "image"}
        problems = [
            f'"{called.get("image", "image")}" is {kind_of_value(image)}, wanted a text in quotes'
            for image in images
            if isinstance(image, _NO_IMAGES)
        ]
        problems += object_problems(checked, options.ignored, metadata, called)
        if problems:
            raise RecordError(*problems)
        needs_places = RECORDS[layout].NAMES_PLACES and beside is None
        are_films = called.get("image") in FILM_NAMES or any(map(is_film_name, images))
        record = place_images(entry, images, options, needs_places, are_films=are_films)
        records.append(replace(record, references=references) if references else record)
        passed_over |= entry.keys() - OURS
    return records, passed_over, layout


def rewrite(value: object, options: RecordOptions) -> tuple[list[Fields], str]:
    """Return (the samples of one object with our keys, unchecked, the name of its layout). Raises RecordError."""
    if not isinstance(value, dict):
        raise RecordError(f"wanted {WANTED}, got {kind_of_value(value)}: {json.dumps(value)[:80]}")
    record = _with_columns(value, options.columns)
    layout = options.layout or _layout_of(record)
    if options.layout is not None and not RECORDS[layout].fits(record):
        raise RecordError(
            f"has not the keys of --data-format {layout}, {RECORDS[layout].WHOSE}; got {listed([*record], 8) or 'none'}"
        )
    if layout == USUAL and options.layout is None and record.get("answer") is None:
        turns = [key for key in record if key in TURNS and key not in options.ignored]
        if turns and record.get("prompt") is None:
            raise RecordError(_unknown_turns(record, turns))
    samples = RECORDS[layout].rewrite(record, options.image_mark)
    left_out = _MAY_BE_LEFT_OUT.intersection(options.ignored) if options.ignored else ()
    if not left_out:
        return [*samples], layout
    return [{key: text for key, text in fields.items() if key not in left_out} for fields in samples], layout


def _layout_of(record: Mapping) -> str:
    """Return the name of the first layout that a record is of; ours takes all that none of the others does."""
    for name, layout in RECORDS.items():
        if name != USUAL and layout.fits(record):
            return name
    return USUAL


def _unknown_turns(record: Mapping, keys: list[str]) -> str:
    wanted = '[{"role": "user", "content": ...}, {"role": "assistant", ...}], or "from" and "value", or pairs of texts'
    if len(keys) > 1:
        return f"{listed(keys)} could each be the turns; --columns messages=KEY says which, --ignore-keys the others"
    turns = record[keys[0]]
    if not isinstance(turns, list):
        return f'"{keys[0]}" is {kind_of_value(turns)}, wanted {wanted}'
    if not turns:
        return f'"{keys[0]}" is an empty list: a conversation ends with an answer to learn'
    got = f"the keys {listed([*turns[0]], 5)}" if isinstance(turns[0], dict) else kind_of_value(turns[0])
    return f'the turns of "{keys[0]}" are none that are known: got {got}, wanted {wanted}'


def _with_columns(record: dict, columns: Mapping[str, str]) -> dict:
    """Return the record with the keys that --columns names under our names. Raises RecordError where one is missing."""
    if not columns:
        return record
    lacking = [column for ours, column in columns.items() if column not in record and ours in ("prompt", "answer")]
    if lacking:
        raise RecordError(f"has no {listed(lacking)}, which --columns names; got {listed([*record], 8) or 'no key'}")
    ours_of = {column: ours for ours, column in columns.items() if column in record}
    both = [ours for column, ours in ours_of.items() if ours in record and ours not in ours_of]
    if both:
        raise RecordError(f"has {listed(both)} beside what --columns gives that name; --columns may leave it out")
    return {ours_of.get(key, key): value for key, value in record.items()}


def _images(value: object) -> list:
    if value is None or value == []:
        return []
    return value if isinstance(value, list) else [value]


def object_problems(
    value: object,
    ignored: Collection[str],
    metadata: Collection[str] = METADATA,
    called: Mapping[str, str] | None = None,
) -> list[str]:
    """Return what is wrong with the keys and types of one sample's JSON, but not with what its paths lead to.

    called: what the object itself calls our keys, where that is another name.
    """
    if not isinstance(value, dict):
        return [f"wanted {WANTED}, got {kind_of_value(value)}: {json.dumps(value)[:80]}"]
    problems = key_problems(value, ignored, metadata)
    if problems:
        return problems
    names = called or {}
    for name in _TEXTS:
        text = value.get(name)
        if text is not None and not isinstance(text, str):
            problems.append(f'"{names.get(name, name)}" is {kind_of_value(text)}, wanted a text in quotes')
    history = value.get("history")
    if history is not None and not (isinstance(history, list) and all(map(_is_turn, history))):
        problems.append('"history" is no list of [query, answer]')
    boxes = value.get("boxes")
    if boxes is not None and (problem := boxes_problem(boxes)):
        problems.append(problem)
    if boxes == [] and BOX_MARK in json.dumps([value.get("prompt"), value.get("answer"), history]):
        problems.append(f'"boxes" is empty, and {BOX_MARK} stands in its texts; leave the key out where it is a text')
    if value.get("answer") is None:
        how = "null" if "answer" in value else "missing"
        problems.append(f'"answer" is {how}; wanted {WANTED}, got {keys_of(value, names)}')
    if value.get("image") is None and value.get("prompt") is None and "image" not in metadata:
        problems.append(f'neither "image" nor "prompt" is there; wanted {WANTED}, got {keys_of(value, names)}')
    return problems


def _is_turn(turn: object) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def kind_of_value(value: object) -> str:
    """Return what JSON calls a value's type, with the number itself."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {str(value)[:20]}"
    names: dict[type, str] = {list: "a list", dict: "an object", str: "a text"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def keys_of(value: dict, names: Mapping[str, str]) -> str:
    """Return the keys that an object has, for messages. names: what it calls ours."""
    keys = [names.get(key, key)[:60] for key in [*value][:8]]
    return f"the keys {listed(keys)}" if keys else "no key"

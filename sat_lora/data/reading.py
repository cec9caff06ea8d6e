"""How data paths are read, and the samples of one object, whatever container it lies in."""

import difflib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sat_lora.cogvlm.inputs.picture_kinds import film_suffix
from sat_lora.data.box_texts import BOX_MARK, boxes_problem
from sat_lora.data.item_keys import (
    FILM_NAMES,
    NAMES,
    OURS,
    WANTED,
    is_film_name,
    key_problems,
    means,
    with_references,
    with_usual_names,
    without_empty,
    without_images,
)
from sat_lora.data.json_texts import json_problem, short_problem
from sat_lora.data.records.record import (
    COLUMNS,
    IMAGE_MARK,
    TURNS,
    Fields,
    Record,
    RecordError,
    RecordOptions,
    is_blank,
    listed,
    place_images,
)
from sat_lora.data.records.registry import RECORDS, USUAL
from sat_lora.errors import ConfigError, DataError
from sat_lora.files.foreign import parse_json
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
_MAY_BE_LEFT_OUT = frozenset({"history", "system", "boxes", "unlearnt"})
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
        if column in columns.values():
            other = next(name for name, taken in columns.items() if taken == column)
            raise ConfigError(
                f"--columns: the column {printable(column)} is given twice, as {other} and as {ours}; it can be one of "
                "them"
            )
        columns[ours] = column
    return columns


@dataclass(frozen=True)
class Beside:
    """What belongs to the sample of an object and lies beside it: its images, and maybe its answer.

    answer_file: what messages call the place of an answer; None where there is none.
    """

    images: tuple = ()
    answer: str | None = None
    answer_file: str | None = None


def samples_of(
    value: object, options: RecordOptions, beside: Beside | None = None
) -> tuple[list[Record], set[str], str]:
    """Return (the samples of one object, keys that were passed over, the name of its layout).

    beside: what lies beside the object; the images are there then. Raises RecordError with all that is wrong with it,
    but not with what its images lead to.
    """
    rewritten, layout = rewrite(value, options)
    records = []
    passed_over: set[str] = set()
    for fields in rewritten:
        fields, empty = without_empty(fields, options.ignored)
        if beside is not None:
            fields, named = without_images(fields, options.ignored)
            fields = _with_answer(fields, beside, named)
        fields, references = with_references(fields, options.ignored) if layout == USUAL else (fields, ())
        entry, called = with_usual_names(fields, options.ignored)
        images = _images(entry.get("image")) if beside is None else [*beside.images]
        checked = {**entry, "image": "named"} if images else {k: v for k, v in entry.items() if k != "image"}
        problems = [
            f'"{called.get("image", "image")}" is {kind_of_value(image)}, wanted a text in quotes'
            for image in images
            if isinstance(image, _NO_IMAGES)
        ]
        problems += object_problems(checked, options.ignored, called, empty, beside)
        if problems:
            raise RecordError(*problems)
        needs_places = RECORDS[layout].NAMES_PLACES and (beside is None or len(images) > 1)
        are_films = called.get("image") in FILM_NAMES or any(map(_is_film, images))
        record = place_images(entry, images, options, needs_places, are_films=are_films)
        records.append(replace(record, references=references) if references else record)
        passed_over |= entry.keys() - OURS
    return records, passed_over, layout


def _is_film(image: object) -> bool:
    return film_suffix(image) is not None if isinstance(image, bytes) else is_film_name(image)


def _with_answer(fields: Fields, beside: Beside, named: Mapping[str, object]) -> Fields:
    """Return the fields with the answer that lies beside them. named: the keys that name images, with their values.

    Raises RecordError where the object has another answer, or names other images than those beside it.
    """
    for name, value in named.items():
        count = len(value) if isinstance(value, list) else 1
        if not beside.images:
            raise RecordError(
                f"names an image, {str(value)[:80]!r}, but none lies beside it; --ignore-keys {shlex.quote(name[:60])} "
                "passes over what names none"
            )
        if isinstance(value, list) and count != len(beside.images):
            raise RecordError(f'"{name}" names {count} images, and {len(beside.images)} lie beside it')
    if beside.answer is None or is_blank(beside.answer):
        return fields
    answer = fields.get("answer")
    if answer is None:
        others = [key for key, value in fields.items() if isinstance(value, str) and means(key, "answer")]
        if len(others) == 1:
            answer = fields[others[0]]
    if isinstance(answer, str) and answer.strip() != beside.answer:
        raise RecordError(
            f"has the answer {answer[:40]!r} and its {beside.answer_file} {beside.answer[:40]!r}; leave one of them "
            "out, or make them equal"
        )
    return fields if answer is not None else {**fields, "answer": beside.answer}


def rewrite(value: object, options: RecordOptions) -> tuple[list[Fields], str]:
    """Return (the samples of one object with our keys, unchecked, the name of its layout). Raises RecordError."""
    if not isinstance(value, dict):
        raise RecordError(f"wanted {WANTED}, got {kind_of_value(value)}: {json.dumps(value)[:80]}")
    record = _unpacked(_with_columns(value, options.columns), options.ignored)
    layout = options.layout or _layout_of(record)
    if options.layout is not None and not RECORDS[layout].fits(record):
        raise RecordError(
            f"has not the keys of --data-format {layout}, {RECORDS[layout].WHOSE}; got {listed([*record], 8) or 'none'}"
        )
    if layout == USUAL and options.layout is None and record.get("answer") is None:
        turns = [key for key in record if key in TURNS and key not in options.ignored]
        if turns and record.get("prompt") is None:
            raise RecordError(_unknown_turns(record, turns))
    samples = RECORDS[layout].rewrite(record, options)
    left_out = _MAY_BE_LEFT_OUT.intersection(options.ignored) if options.ignored else ()
    if not left_out:
        return [*samples], layout
    return [{key: text for key, text in fields.items() if key not in left_out} for fields in samples], layout


_LISTS = frozenset(("answers", "boxes", "image", "images", "unlearnt"))
"""Our keys beside the turns that may have lists. A text under another one is a text, whatever it looks like."""


def _unpacked(record: Fields, ignored: Collection[str]) -> Fields:
    """Return the record with its turns, and what else is a list, as lists: tables hold them as JSON, and `datasets` has
    turns as lists in an object.

    Raises RecordError for a text that begins as such a list and is none.
    """
    lists: Fields = {}
    for key in {*TURNS, "history"}.intersection(record).difference(ignored):
        value = record[key]
        if isinstance(value, str) and value.lstrip().startswith(("[{", "[[", "{")):
            try:
                value = parse_json(value)
            except json.JSONDecodeError as error:
                raise RecordError(f'"{key}" is a text that is no JSON: {json_problem(error)}') from None
            except ValueError as error:
                raise RecordError(f'"{key}" is a text that is no JSON: {short_problem(error)}') from None
        if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
            counts = {name: len(column) for name, column in value.items()}
            if len({*counts.values()}) > 1:
                shown = ", ".join(f'"{name[:60]}" has {count}' for name, count in counts.items())
                raise RecordError(f'the lists in "{key}" are not of one length: {shown}')
            value = [dict(zip(value, turn)) for turn in zip(*value.values())]
        if value is not record[key]:
            lists[key] = value
    for key in _LISTS.intersection(record).difference(ignored):
        value = _list_in(record[key])
        if value is not None and (key != "answers" or all(isinstance(answer, str | dict) for answer in value)):
            lists[key] = value
    return {**record, **lists} if lists else record


def _list_in(text: object) -> list | None:
    """Return the list that a text is as JSON; None where it is none, which whoever reads the key tells."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return None
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


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
        raise RecordError(f"has no {listed(lacking)}, which --columns names; {_nearest(lacking, [*record])}")
    ours_of = {column: ours for ours, column in columns.items() if column in record}
    both = [ours for column, ours in ours_of.items() if ours in record and ours not in ours_of]
    if both:
        raise RecordError(f"has {listed(both)} beside what --columns gives that name; --columns may leave it out")
    return {ours_of.get(key, key): value for key, value in record.items()}


def check_columns(path: Path, columns: Mapping[str, str], keys: Collection[str]) -> None:
    """Raise DataError where --columns names what no record of a file has. keys: all that they have."""
    lacking = {ours: column for ours, column in columns.items() if column not in keys}
    if not lacking or not keys:
        return
    given = " ".join(f"{ours}={column}" for ours, column in lacking.items())
    raise DataError(
        printable(
            f"{path}: no record has {listed([*lacking.values()])}, which --columns {given} names; "
            f"{_nearest(lacking.values(), keys)}; give a column that is there, or leave it out"
        )
    )


def _nearest(names: Collection[str], keys: Collection[str]) -> str:
    """Return the keys that may have been meant by names, or else the first of them, as a clause."""
    near = dict.fromkeys(key for name in names for key in difflib.get_close_matches(name, keys, 3))
    return f"did you mean {listed([*near], 3)}?" if near else f"got {listed([*keys], 8) or 'no key'}"


def _images(value: object) -> list:
    if value is None or value == []:
        return []
    return value if isinstance(value, list) else [value]


def object_problems(
    value: Mapping[str, Any],
    ignored: Collection[str],
    called: Mapping[str, str],
    empty: Collection[str],
    beside: Beside | None,
) -> list[str]:
    """Return what is wrong with the keys and types of one sample's JSON, but not with what its paths lead to.

    called: what the object itself calls our keys, where that is another name. empty: those of our names whose texts
    have nothing in them. beside: what lies beside the object.
    """
    problems = key_problems({**value}, ignored)
    if problems:
        return problems
    names = called
    for name in _TEXTS:
        text = value.get(name)
        if text is not None and not isinstance(text, str):
            problems.append(f'"{names.get(name, name)}" is {kind_of_value(text)}, wanted a text in quotes')
    history = value.get("history")
    if history is not None and not (isinstance(history, list) and all(map(_is_turn, history))):
        problems.append('"history" is no list of [query, answer]')
        return problems
    unlearnt = value.get("unlearnt")
    places = range(len(history or ()))
    if unlearnt is not None and not (
        isinstance(unlearnt, list) and all(type(n) is int and n in places for n in unlearnt)
    ):
        problems.append('"unlearnt" is no list of places in "history", from 0')
        return problems
    problems += [
        f"answer {number + 1} of its turns is empty"
        for number, (_, answer) in enumerate(history or ())
        if is_blank(answer) and number not in (unlearnt or ())
    ]
    boxes = value.get("boxes")
    if boxes is not None and (problem := boxes_problem(boxes)):
        problems.append(problem)
    if boxes == [] and BOX_MARK in json.dumps([value.get("prompt"), value.get("answer"), history]):
        problems.append(f'"boxes" is empty, and {BOX_MARK} stands in its texts; leave the key out where it is a text')
    if value.get("answer") is None:
        how = "null" if "answer" in value else "empty" if "answer" in empty else "missing"
        if beside is not None and beside.answer_file is not None:
            how += f", and there is no {beside.answer_file} with one"
        problems.append(f'"answer" is {how}; wanted {WANTED}, got {keys_of(value, names)}')
    if value.get("image") is None and value.get("prompt") is None:
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


def keys_of(value: Mapping, names: Mapping[str, str]) -> str:
    """Return the keys that an object has, for messages. names: what it calls ours."""
    keys = [names.get(key, key)[:60] for key in [*value][:8]]
    return f"the keys {listed(keys)}" if keys else "no key"

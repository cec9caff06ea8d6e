"""What a record says, whatever its layout, and what a layout is."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

IMAGE = "\udbff"
"""Stands in a text where an image goes: half a character, which no text has that can be encoded."""
IMAGE_MARK = "<image>"
FILM_MARK = "<video>"
"""Stands in texts for a film where others write them; here a film is an image."""
TURNS = (
    "conversations", "conversation", "messages", "dialogue", "dialogues", "dialog", "dialogs", "turns", "texts",
)  # fmt: skip
"""The keys that lists of turns have."""
COLUMNS = ("image", "prompt", "answer", "history", "system", "conversations", "messages")
"""What --columns may name."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One sample, as its record names it.

    prompt, answer: of the last turn; without a prompt, or with an empty one, --prompt is asked. images: in the order of
    their places. history: (query, answer) of the turns before. system: the text that stands before all turns. A query
    has IMAGE where an image goes; images without such a place come before all texts.
    """

    prompt: str | None
    answer: str
    images: tuple[Any, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    boxes: tuple[Any, ...] = ()
    """What goes into the texts in place of each <box>: a box, or several of one phrase, as `boxes_text` takes them."""
    references: tuple[str, ...] = ()
    """What several people answered, where the record has all of it."""
    unlearnt: tuple[int, ...] = ()
    """Places in `history` whose answers stand there and are not learnt."""


class RecordError(ValueError):
    """What is wrong with one record, a sentence each."""

    def __init__(self, *problems: str):
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How records are read, by options of a run.

    ignored: keys to pass over, of turns too. layout: the name of the only layout that may be. columns: our names of
    keys, with those that the records have for them. image_mark: what stands in a text for an image; none with "", and
    images come first. most_images: of one sample. folder: what paths in texts are relative to.
    """

    ignored: Collection[str] = ()
    layout: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    image_mark: str = IMAGE_MARK
    most_images: int = 1
    folder: Path | None = None


PLAIN = RecordOptions()
"""The options of a run that names none."""


class RecordLayout(Protocol):
    """A layout of keys. A module of this folder that is one has these names; `registry` lists it."""

    WHOSE: str
    """What people call it."""
    NAMES_PLACES: bool
    """Whether an image has a mark in the texts."""

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record is of this layout, by its keys and their types."""

    def rewrite(self, record: Fields, options: "RecordOptions") -> Sequence[Fields]:
        """Return the samples of a record with the keys of our own layout (image, prompt, answer, history, system), and
        with all other keys as they are; the mark of the options stands in a text for an image. Raises RecordError.
        """


def place_images(
    fields: Mapping[str, Any],
    images: Sequence[Any],
    options: RecordOptions,
    needs_places: bool,
    *,
    are_films: bool = False,
) -> Record:
    """Return the record of fields whose types are right, with IMAGE in its texts. Raises RecordError.

    needs_places: whether an image has to have one. are_films: whether images are films, for which texts may have
    FILM_MARK, where they have no mark of an image.
    """
    history = [tuple(turn) for turn in fields.get("history") or ()]
    prompt = fields.get("prompt")
    texts = [*(query for query, _ in history), prompt or ""]
    system = fields.get("system") or None
    together = "".join([*texts, fields["answer"], system or "", *[answer for _, answer in history]])
    if IMAGE in together:
        raise RecordError("a text holds half a character (U+DBFF)")
    mark = options.image_mark
    if are_films and mark == IMAGE_MARK and mark not in together and any(FILM_MARK in text for text in texts):
        mark = FILM_MARK
    places = sum([text.count(mark) for text in texts]) if mark and mark in together else 0
    count = len(images)
    if count > options.most_images:
        takes = "the base takes one" if options.most_images == 1 else f"--images-per-sample is {options.most_images}"
        raise RecordError(f"{count} images, and {takes}; leave the others out, or give --images-per-sample {count}")
    if places > count or (mark and places < count and (places or needs_places)):
        advice = f'write {mark} where each image stands, or give --image-mark "" to have images first'
        if places > count:
            advice = f"name the image, or give another --image-mark if {mark} is a text like any other"
        raise RecordError(f"{_count(places, 'place')} for images in its texts and {_count(count, 'image')}; {advice}")
    if places:
        # The base was trained with its one image before all texts; of several the first ones may stand there.
        texts = [_without_place(text, mark) if count == 1 else _placed(text, mark) for text in texts]
        texts[0] = texts[0].lstrip(IMAGE)
        history = [(text, answer) for text, (_, answer) in zip(texts, history)]
        prompt = texts[-1]
    return Record(
        None if is_blank(prompt) else prompt,
        fields["answer"],
        tuple(images),
        tuple(history),
        system,
        tuple(fields.get("boxes") or ()),
        unlearnt=tuple(fields.get("unlearnt") or ()),
    )


def is_blank(value: object) -> bool:
    """Return whether a value is a text of nothing but white space."""
    return isinstance(value, str) and not value.strip()


def _placed(text: str, mark: str) -> str:
    """Return the text with IMAGE in place of the marks; the line breaks beside a mark go with it."""
    first, *others = text.split(mark)
    parts = [first.rstrip("\n") if others else first, *(part.strip("\n") for part in others[:-1])]
    return IMAGE.join([*parts, *(part.lstrip("\n") for part in others[-1:])])


def _without_place(text: str, mark: str) -> str:
    """Return the text without the one mark that it may have, and without the space around it."""
    before, place, after = text.partition(mark)
    if not place:
        return text
    if not before.strip():
        return after.lstrip("\n")
    if not after.strip():
        return before.rstrip()
    between = "\n" if before.endswith("\n") or after.startswith("\n") else " "
    return before.rstrip() + between + after.lstrip()


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"


def listed(keys: Sequence[str], most: float = math.inf) -> str:
    """Return keys in quotes, for a message."""
    shown = [f'"{key[:60]}"' for number, key in enumerate(keys) if number < most]
    return ", ".join([*shown, *["..."] * (len(keys) > len(shown))])

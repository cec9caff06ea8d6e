"""The keys of a sample's JSON object: which are read, which carry nothing to learn, and what others call them."""

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Collection

from sat_lora.cogvlm.inputs.picture_kinds import FILM_SUFFIXES
from sat_lora.data.formats import MARKS, format_of
from sat_lora.data.records.record import is_blank
from sat_lora.data.records.registry import RECORDS

SHOWN = 8  # keys of one object
NESTED = 3  # levels of what lies beside a sample that are looked through for its image
FILMS = tuple(FILM_SUFFIXES - {".ts"})  # which is also the suffix of programs
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".heic", ".avif", *FILMS)
NAMES = ("image", "prompt", "answer")
READ = (*NAMES, "history", "system", "boxes", "unlearnt")
OURS = frozenset(READ)
WANTED = '{"image": ..., "prompt": ..., "answer": ...}'

# What data sets write beside a sample and no run needs; also every name that begins with an underscore, but for those
# that mark another format.
METADATA = frozenset(
    """
    id idx index uid uuid guid image_id question_id answer_id sample_id conversation_id row row_id line
    source dataset dataset_name data_source origin split subset fold license licence copyright
    author annotator annotator_id worker_id reviewer created created_at updated_at timestamp date time
    key status error_message exif original_width original_height
    score scores confidence similarity quality width height size file_size image_size image_width image_height
    language lang locale tag tags topic domain category type task task_type question_type answer_type difficulty level
    comment comments note notes remark meta metadata extra info hash md5 sha1 sha256 checksum version
    """.split()
)

OTHER_NAMES = {
    "image": """
        img imgs images image_path image_paths image_file image_files image_name image_url img_path img_file file_name
        filename filepath file_path file path url picture pictures photo pic media video videos video_path film
    """,
    "prompt": """
        question questions query instruction input user human text_in request problem q prompts sent
    """,
    "answer": """
        answers response responses output label labels target completion reply caption captions text text_out gpt
        assistant solution ground_truth groundtruth gt a multiple_choice_answer transcription
    """,
}
FILM_NAMES = frozenset({"video", "videos", "video_path", "film"})
"""Those of them whose images are films."""
READ_INSTEAD = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}


def with_usual_names(
    entry: dict, ignored: Collection[str], names: Collection[str] = NAMES
) -> tuple[dict, dict[str, str]]:
    """Return (the object with our own names in place of those that others have for them, {ours: theirs}).

    A name of others' is read where ours is not there, and no second one that could be meant is. names: which of ours
    may be called otherwise. Objects of formats that are not read stay as they are.
    """
    if entry.keys() <= OURS:
        return entry, {}
    others = {key: value for key, value in entry.items() if key not in OURS and key not in ignored}
    called: dict[str, str] = {}
    lacking = [name for name in names if entry.get(name) is None] if others else []
    for name in lacking:
        keys = [key for key, value in others.items() if value is not None and _meant_by(key) == name]
        if len(keys) == 1:
            called[name] = keys[0]
    foreign = format_of(others) if called else None
    if not called or (foreign is not None and not foreign.is_read):
        return entry, {}
    ours = {other: name for name, other in called.items()}
    kept = {key: value for key, value in entry.items() if key not in called}
    return {ours.get(key, key): value for key, value in kept.items()}, called


def with_references(entry: dict, ignored: Collection[str]) -> tuple[dict, tuple[str, ...]]:
    """Return (the object without its list "answers", the texts of that): what several people answered, as VQA has it,
    each as a text or as the "answer" of an object. Without another answer, the commonest is the one to learn.

    An object without such a list stays as it is, with no texts.
    """
    values = entry.get("answers")
    if "answers" in ignored or not isinstance(values, list) or not values:
        return entry, ()
    given = [value.get("answer") if isinstance(value, dict) else value for value in values]
    texts = tuple(text for text in given if isinstance(text, str))
    if len(texts) < len(given):
        return entry, ()
    rest = {key: value for key, value in entry.items() if key != "answers"}
    if not any(value is not None and _meant_by(key) == "answer" for key, value in rest.items() if key not in ignored):
        rest["answer"] = Counter(texts).most_common(1)[0][0]
    return rest, texts


def means(key: str, name: str) -> bool:
    """Return whether a key is one of ours, or one that others have for it."""
    return _meant_by(key) == name


def without_images(entry: dict, ignored: Collection[str]) -> tuple[dict, dict[str, object]]:
    """Return (an object without the keys that name images, these with their values): of one beside which they lie."""
    named = {key: value for key, value in entry.items() if _meant_by(key) == "image" and key not in ignored}
    rest = {key: value for key, value in entry.items() if _meant_by(key) != "image"} if named else entry
    return rest, {key: value for key, value in named.items() if value not in (None, "", [])}


def without_empty(entry: dict, ignored: Collection[str]) -> tuple[dict, set[str]]:
    """Return (an object without its keys that say nothing, our names of the texts among these).

    Nothing is said by a prompt or an answer of white space alone, under any of their names, and by null or an empty
    text under a key that is not ours: a table has nothing in such a cell.
    """
    empty = {
        key: _meant_by(key)
        for key, value in entry.items()
        if (is_blank(value) and _meant_by(key) in NAMES[1:])
        or (key not in OURS and key not in ignored and value in (None, ""))
    }
    if not empty:
        return entry, set()
    names = {name for key, name in empty.items() if name is not None and entry[key] is not None}
    return {key: value for key, value in entry.items() if key not in empty}, names


def _meant_by(key: str) -> str | None:
    """Return our name for what others call so; None if there is none."""
    plain = key.strip().casefold().replace("-", "_").replace(" ", "_")
    return plain if plain in NAMES else READ_INSTEAD.get(plain)


def key_problems(entry: dict, ignored: Collection[str]) -> list[str]:
    """Return what is wrong with the names of an object's keys, a sentence each.

    ignored: names that the user has passed over, as METADATA are. Where there is no image, those that speak of one are
    not among these: the sample would be learnt as text alone. Nor are those that hold a question where there is no
    prompt: another one would be asked.
    """
    if entry.keys() <= OURS:
        return []
    lacks_image = entry.get("image") is None
    lacks_prompt = entry.get("prompt") is None
    unknown = [
        key
        for key, value in entry.items()
        if key not in OURS
        and key not in ignored
        and (
            not _is_metadata(key)
            or (lacks_image and _speaks_of_an_image(key, value))
            or (lacks_prompt and _holds_a_question(key, value))
        )
    ]
    if not unknown:
        return []
    meant = {key: _instead(key, entry) for key in unknown}
    noted = {key: _why_not_noted(key, entry) for key in unknown[:SHOWN]}
    problems = [f"the key {_shown(key)} is not known{meant[key] or noted[key]}" for key in unknown[:SHOWN]]
    if len(unknown) > SHOWN:
        problems.append(f"nor are {len(unknown) - SHOWN} others")
    layout = _layout_of(entry, ignored)
    problems[-1] += f"; {layout}" if layout else ""
    twice = [name for name in NAMES if entry.get(name) is None and sum(_meant_by(key) == name for key in unknown) > 1]
    if twice and not layout:
        several = " or ".join(_shown(key) for key in unknown if _meant_by(key) == twice[0])
        problems[-1] += f"; {twice[0]} may be {several}: --columns {twice[0]}=KEY says which"
    problems[-1] += f"; wanted {WANTED}"
    if not layout and not any(key in READ for key in entry):
        problems[-1] += f", or another layout that is read: {', '.join(RECORDS)} (docs/data.md)"
    others = [key for key in unknown if not meant[key]]
    if others and not layout and "answer" in entry:
        problems[-1] += f"; --ignore-keys {_pasted(others)} passes over what is not to be learnt"
    return problems


def _is_metadata(key: str) -> bool:
    return (key.startswith("_") and key not in MARKS) or key.casefold() in METADATA


def _why_not_noted(key: str, entry: dict) -> str:
    """Return why a key that usually carries nothing to learn is not passed over, as the end of a sentence."""
    if not _is_metadata(key):
        return ""
    missing = "prompt" if entry.get("prompt") is None and _holds_a_question(key, entry[key]) else "image"
    return f" where there is no {missing}: it seems to hold one"


def _speaks_of_an_image(key: str, value: object, depth: int = 0) -> bool:
    if isinstance(value, dict | list) and depth < NESTED:
        pairs = value.items() if isinstance(value, dict) else ((key, element) for element in value[:SHOWN])
        return any(_speaks_of_an_image(str(name), content, depth + 1) for name, content in pairs)
    names_a_file = isinstance(value, str) and re.split(r"[?#]", value.strip().lower())[0].endswith(PICTURES)
    return value is not None and (names_a_file or any(word in key.casefold() for word in ("image", "img", "video")))


def is_film_name(value: object) -> bool:
    """Return whether a value is the path or the data URL of a film."""
    name = value.strip().lower() if isinstance(value, str) else ""
    return re.split(r"[?#]", name)[0].endswith(FILMS) or name.startswith("data:video/")


def _holds_a_question(key: str, value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    name = key.casefold().strip("_")
    is_named = name == "prompt" or READ_INSTEAD.get(name) == "prompt" or (name == "task" and value.count(" ") > 1)
    return is_named or value.rstrip().endswith(("?", "？", "؟"))


def _layout_of(entry: dict, ignored: Collection[str]) -> str | None:
    """Return, as a clause, that an object is of another format; None if its keys tell of none."""
    foreign = format_of({key: value for key, value in entry.items() if key not in READ and key not in ignored})
    if foreign is None or foreign.is_read:
        return None
    return f"such keys are those of {foreign.whose}, a layout that is not read here: write {foreign.instead}"


def _instead(key: str, entry: dict) -> str:
    plain = key.strip().casefold().replace("-", "_").replace(" ", "_")
    name = _meant_by(key)
    if name is None:
        near = difflib.get_close_matches(plain, [*READ, *READ_INSTEAD], 1, 0.75)
        name = READ_INSTEAD.get(near[0], near[0]) if near else None
    if name is not None and name not in entry:
        return f', did you mean "{name}"?'
    value = entry[key]
    if len(entry) == 1 and isinstance(value, list) and any(isinstance(element, dict) for element in value):
        return "; if its list holds the samples, give the list alone"
    return ""


def _shown(key: str) -> str:
    return f'"{key}"' if len(key) <= 60 else f'"{key[:60]}..."'


def _pasted(keys: list[str]) -> str:
    return " ".join(shlex.quote(key[:60]) for key in keys[:5])

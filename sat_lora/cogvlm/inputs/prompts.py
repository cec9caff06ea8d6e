"""The prompt formats of the published CogVLM. Imports nothing heavy: the command line names them in its help."""

from collections.abc import Sequence
from pathlib import Path

from sat_lora.cogvlm.families import COGVLM, family_of, hugging_face_family
from sat_lora.errors import CheckpointError, ConfigError
from sat_lora.files.foreign import read_json

IMAGE_PLACE = "<EOI>"


def _base(query, history):
    return query


def _chat(query, history):
    return " [INST] " + "".join(f"{q} [/INST] {a} [INST] " for q, a in history) + f"{query} [/INST] "


def _vqa(query, history):
    return f"Question: {query} Short answer:"


def _chat_old(query, history):
    turns = "".join(f"{q} Answer: {a}\nQuestion: " for q, a in history)
    return f"Question: {turns}{query} Answer:"


PROMPTS = {"base": _base, "chat": _chat, "vqa": _vqa, "chat_old": _chat_old}


def prompt_text(version: str, query: str, history: tuple[tuple[str, str], ...] = ()) -> str:
    """Return the prompt of a CogVLM `version` for a query and the (query, answer) turns before it.

    It is without its image, which comes first. Raises ConfigError if there is no such version.
    """
    if version not in PROMPTS:
        raise ConfigError(f"--version: got {version!r}, wanted one of {', '.join(PROMPTS)}")
    return PROMPTS[version](query, history)


def prompt_for(version: str, query: str, history: tuple[tuple[str, str], ...] = ()) -> str:
    """Return `prompt_text` with IMAGE_PLACE in front, where the image's tokens go."""
    return IMAGE_PLACE + prompt_text(version, query, history)


WITHOUT_HISTORY = frozenset({"base"})
"""Versions whose published templates have no place for the turns before the last. (SAT's code leaves them out of `vqa`
as well, Hugging Face's puts them as `chat_old` does.)
"""


def turn_texts(version: str, queries: Sequence[str], system: str | None = None) -> list[str]:
    """Return the text before the answer of each turn; with the answers between them they are the whole prompt.

    Raises ConfigError if there is no such version, its template has no place for several turns, or there is a system
    text, for which no published template has one.
    """
    if system:
        raise ConfigError(
            f"--version: {version} has no place for a system text, nor has any published template of CogVLM; "
            "--ignore-keys system leaves it out"
        )
    if len(queries) > 1 and version in WITHOUT_HISTORY:
        several = ", ".join(name for name in PROMPTS if name not in WITHOUT_HISTORY)
        raise ConfigError(
            f"--version: {version} has no place for the turns before the last of a conversation; give one of {several}"
        )
    between = "\n" if version in ("chat_old", "vqa") else ""
    texts = [prompt_text(version, query) for query in queries]
    return [texts[0], *(between + text for text in texts[1:])]


def version_of(base: str | Path) -> str | None:
    """Return the prompt format that the config of a base names; None if it names none, or cannot be read.

    SAT's model_config.json says it as text_processor_version, Hugging Face's config.json as template_version, whose
    names mean other prompts in some families. Where it names none, it is the format of its family, if that has one.
    """
    keys = (
        ("model_config.json", "text_processor_version", family_of),
        ("config.json", "template_version", hugging_face_family),
    )
    of_family = None
    for file, key, find_family in keys:
        try:
            content = read_json(Path(base) / file)
            version = content.get(key)
            family = find_family(content) or COGVLM
        except (OSError, ValueError, AttributeError):
            continue
        except CheckpointError:  # said where the folder is opened
            family = COGVLM
        if version is not None:
            names = family.versions if key == "template_version" else {}
            return names.get(str(version), str(version))
        of_family = of_family or family.version
    return of_family

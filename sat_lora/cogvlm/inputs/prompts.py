"""The prompt formats of the published CogVLM. Imports nothing heavy: the command line names them in its help."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sat_lora.cogvlm.families import (
    COGVLM,
    Family,
    family_of,
    hugging_face_family,
    is_published,
    published_config,
)
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
    """Return the prompt format that the config of a base names, or that of its family; None if neither says one."""
    version: str | None = settings_of_base(base).get("version")
    return version


def settings_of_base(base: str | Path) -> dict[str, Any]:
    """Return what a base says of a run's settings: version, the prompt format, and max_length; each where it does.

    SAT's model_config.json says the format as text_processor_version, Hugging Face's config.json as template_version,
    whose names mean other prompts in some families. Where it names none, it is the format of its family, if that has
    one. The length is the family's. The name of a published model stands for its folder. Of what cannot be read nothing
    is said: that is told where the folder is opened.
    """
    settings: dict[str, Any] = {}
    of_family: dict[str, Any] = {}
    for content, key, family in _configs_of(Path(base)):
        version = content.get(key)
        if version is not None:
            names = family.versions if key == "template_version" else {}
            settings = {"version": names.get(str(version), str(version))}
        of_family = of_family or {"version": family.version, "max_length": family.max_length}
        if settings:
            break
    return {**{name: value for name, value in of_family.items() if value is not None}, **settings}


def _configs_of(base: Path) -> Iterator[tuple[dict[str, Any], str, Family]]:
    """Yield (config, its key for the prompt format, its family) of a folder, CogVLM where that is not certain."""
    if is_published(base):
        config = published_config(base.name)
        yield config, "text_processor_version", family_of(config)
        return
    for file, key in (("model_config.json", "text_processor_version"), ("config.json", "template_version")):
        try:
            content = read_json(base / file)
            family = family_of(content) if file == "model_config.json" else _hugging_face_family(base, content)
        except (OSError, ValueError, AttributeError):
            continue
        except CheckpointError:
            family = None
        yield content, key, family or COGVLM


def _hugging_face_family(base: Path, content: dict[str, Any]) -> Family | None:
    """Return the family of Hugging Face's config.json; by the tensors in its index where the config does not say it."""
    family = hugging_face_family(content)
    if family is not None:
        return family
    try:
        return hugging_face_family(content, read_json(base / "model.safetensors.index.json")["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

"""Prompts and token sequences, as the published CogVLM lays them out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sat_lora.cogvlm.inputs.prompts import IMAGE_PLACE, PROMPTS, prompt_for, prompt_text
from sat_lora.cogvlm.inputs.tokens import WHOLE, first_tokens, text_tokens
from sat_lora.errors import ConfigError
from sat_lora.files.foreign import read_json, stand_in
from sat_lora.printable import printable

__all__ = [
    "IGNORED",
    "IMAGE_PLACE",
    "PROMPTS",
    "Sample",
    "build_sample",
    "load_tokenizer",
    "position_ids_for",
    "prompt_for",
    "prompt_text",
    "shortest_length",
]

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *VOCABULARIES)
IGNORED = -100  # a label that takes no part in the loss


VERY_LONG = 10**30  # what transformers itself has for a tokenizer without a limit


def load_tokenizer(path: str | Path):
    """Return a `transformers` tokenizer from a local folder, or by a name that its cache holds.

    Nothing is ever fetched, and no code that lies beside a tokenizer is run or offered.
    Raises ConfigError if it does not load.
    """
    from transformers import AutoTokenizer

    _refuse_files(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a broken file makes transformers raise KeyError, TypeError, ... and Rust panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if Path(path).is_dir():
            problem = f"does not hold a tokenizer that loads: {_first_line(error, Path(path))}"
        else:
            problem = (
                "is neither a folder nor a name in the local cache (nothing is fetched); download the tokenizer, for "
                "instance with `huggingface-cli download lmsys/vicuna-7b-v1.5 tokenizer.model tokenizer_config.json "
                "special_tokens_map.json --local-dir vicuna-7b-v1.5`"
            )
        raise ConfigError(
            f"--local_tokenizer: {path} {problem}; give the folder that holds tokenizer.json or tokenizer.model"
        ) from error
    tokenizer.model_max_length = VERY_LONG  # else it warns of long texts, which --max_length is there for
    return tokenizer


def _refuse_files(folder: Path) -> None:
    """Raise ConfigError where a file of the tokenizer is something else, or asks for code of its own."""
    for name in TOKENIZER_FILES:
        if not os.path.lexists(folder / name):
            continue
        instead = stand_in(folder / name)
        if instead is not None:
            raise ConfigError(
                f"--local_tokenizer: {folder} does not hold a tokenizer that loads: {name}: {instead}; give the folder "
                "that holds tokenizer.json or tokenizer.model"
            )
    try:
        config = read_json(folder / TOKENIZER_FILES[0])
    except (OSError, ValueError):  # transformers says what it wants of it
        return
    code = config.get("auto_map") if isinstance(config, dict) else None
    named = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if named and not _is_known(config.get("tokenizer_class")):
        first = next(iter(named), None) if isinstance(named, list) else named
        raise ConfigError(
            f"--local_tokenizer: {folder} asks for code of its own ({TOKENIZER_FILES[0]}: auto_map "
            f"{str(first)[:80]!r}), and no code of a tokenizer is run; give the folder of one that `transformers` "
            "knows, such as vicuna-7b-v1.5"
        )


def _is_known(tokenizer_class: object) -> bool:
    import transformers

    return isinstance(tokenizer_class, str) and hasattr(transformers, tokenizer_class)


def _first_line(error: BaseException, folder: Path) -> str:
    """Return what an error of `transformers` says, in short."""
    if not any((folder / name).exists() for name in VOCABULARIES):
        names = sorted(entry.name for entry in folder.iterdir())[:8]
        return f"none of {', '.join(VOCABULARIES)} is there; found: {', '.join(map(printable, names)) or 'nothing'}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else "no reason given"
    return f"{type(error).__name__}: {line if len(line) <= 200 else line[:200] + ' ...'}"


@dataclass(frozen=True)
class Sample:
    """One sequence; every field but the last two is a (seq,) int64 tensor."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor  # the token itself where it is to be predicted, IGNORED elsewhere
    image_embed_mask: torch.Tensor  # 1 on begin-of-image, patches, end-of-image
    vision_expert_mask: torch.Tensor  # 1 on begin-of-image and patches
    image: torch.Tensor | None = None  # (3, height, width)
    left_out: int = 0  # tokens of the answer, its EOS among them, that did not fit


def shortest_length(tokenizer, prompt: str | Sequence[str], image_length: int, special_tokens: bool = False) -> int:
    """Return how many tokens a sample with one token of answer takes: BOS, prompt, image, answer, EOS.

    The arguments are those of `build_sample`.
    """
    parts = _parts(prompt)
    text_length = sum(len(text_tokens(tokenizer, part, special_tokens)) for part in parts)
    return 1 + text_length + (len(parts) - 1) * (image_length + 2) + 1 + 1


def build_sample(
    tokenizer,
    prompt: str | Sequence[str],
    answer: str | None,
    image_length: int,
    max_length: int,
    image: torch.Tensor | None = None,
    special_tokens: bool = False,
) -> Sample:
    """Return the sample of BOS, prompt with its image, answer, EOS.

    Without an answer it is the prompt alone, ready for generation.
    An answer that does not fit into `max_length` is cut and has no EOS, which would teach to stop there; a prompt that
    does not fit is an error.
    prompt: with IMAGE_PLACE wherever an image goes, or the texts around the images. special_tokens: whether a text that
    spells one of the tokenizer's special tokens means it.
    Raises DataError if a text cannot be encoded.
    """
    ids = [tokenizer.bos_token_id]
    embed = [0]
    vision = [0]
    patches = [0]
    for number, part in enumerate(_parts(prompt)):
        part_ids, more = first_tokens(tokenizer, part, max_length, special_tokens, "prompt") if part else ([], 0)
        if number:
            ids += [0] * (image_length + 2)
            embed += [1] * (image_length + 2)
            vision += [1] * (image_length + 1) + [0]
            patches += [0] + [1] * image_length + [0]
        if more and (answer is not None or len(part) > WHOLE):
            length = len(ids) + len(part_ids) + more
            raise ConfigError(f"--max_length: {max_length} is too short, this prompt alone takes {length} tokens")
        if more:
            part_ids = text_tokens(tokenizer, part, special_tokens, "prompt")
        ids += part_ids
        for mask in (embed, vision, patches):
            mask += [0] * len(part_ids)
    start = len(ids)
    left_out = 0
    if answer is not None:
        if start + 2 > max_length:
            raise ConfigError(f"--max_length: {max_length} is too short, this prompt alone takes {start} tokens")
        answer_ids, more = first_tokens(tokenizer, answer, max_length - start, special_tokens, "answer")
        answer_ids.append(tokenizer.eos_token_id)
        ids += answer_ids[: max_length - start]
        left_out = start + len(answer_ids) + more - len(ids)
    embed, vision, patches = (torch.tensor(mask + [0] * (len(ids) - start)) for mask in (embed, vision, patches))
    input_ids = torch.tensor(ids)
    labels = input_ids.clone()
    labels[:start] = IGNORED
    return Sample(input_ids, position_ids_for(patches), labels, embed, vision, image, left_out)


def _parts(prompt: str | Sequence[str]) -> Sequence[str]:
    return prompt.split(IMAGE_PLACE) if isinstance(prompt, str) else prompt


def position_ids_for(patches: torch.Tensor) -> torch.Tensor:
    """Return positions (seq,): one more at every token, but all neighbouring patches of an image share one."""
    before = patches.roll(1)
    before[0] = 0
    return torch.cumsum((patches == 0) | (before == 0), 0) - 1

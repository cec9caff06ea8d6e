"""Prompts and token sequences, as the published CogVLM lays them out."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from sat_lora.cogvlm.inputs.prompts import IMAGE_PLACE, PROMPTS, prompt_for, prompt_text, turn_texts
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
    "end_tokens",
    "load_tokenizer",
    "position_ids_for",
    "prompt_for",
    "prompt_text",
    "shortest_length",
    "turn_texts",
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
    """One sequence; every field but the last three is a (seq,) int64 tensor."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor  # what is to be predicted there, IGNORED where nothing is; see `build_sample`
    image_embed_mask: torch.Tensor  # 1 on begin-of-image, patches, end-of-image
    vision_expert_mask: torch.Tensor  # 1 on begin-of-image and patches
    image: torch.Tensor | None = None  # (3, height, width)
    left_out: int = 0  # tokens that did not fit: of answers and of the turns behind them, EOS among them
    more_images: tuple[torch.Tensor, ...] = ()  # those after `image`, in the order of their places
    cross_images: tuple[torch.Tensor, ...] = ()  # the same pictures for a second vision encoder, where there is one


def end_tokens(tokenizer, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's EOS, and those that the config of a base lists beside it.

    LLaMA 3 ends a turn with another token than a text.
    """
    listed = config.get("eos_token_id")
    more = [number for number in listed if type(number) is int] if isinstance(listed, list) else []
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *more]))


def shortest_length(tokenizer, prompt: str | Sequence[str], image_length: int, special_tokens: bool = False) -> int:
    """Return how many tokens a sample with one token of answer takes: BOS, prompt, image, answer, EOS.

    The arguments are those of `build_sample`.
    """
    parts = _parts(prompt)
    text_length = sum(len(text_tokens(tokenizer, part, special_tokens)) for part in parts)
    return 1 + text_length + (len(parts) - 1) * (image_length + 2) + 1 + 1


Turn = tuple[str | Sequence[str], str]
"""A prompt as `build_sample` takes it, and its answer."""


def build_sample(
    tokenizer,
    prompt: str | Sequence[str],
    answer: str | None,
    image_length: int,
    max_length: int,
    image: torch.Tensor | None = None,
    special_tokens: bool = False,
    *,
    earlier: Sequence[Turn] = (),
    learns_earlier: bool = True,
    unlearnt: Collection[int] = (),
    joins_images: bool = False,
) -> Sample:
    """Return the sample of BOS, the earlier turns, prompt with its image, answer, EOS.

    Without an answer it is the prompt alone, ready for generation.
    An answer that does not fit into `max_length` is cut and has no EOS, which would teach to stop there, and no turn
    comes after it; a prompt that does not fit is an error, but that of a later turn, where the sample ends before it.
    prompt: with IMAGE_PLACE wherever an image goes, or the texts around the images. special_tokens: whether a text that
    spells one of the tokenizer's special tokens means it. earlier: the turns before; learns_earlier: whether their
    answers are learnt as well, but for those whose places are in unlearnt. joins_images: images with nothing between
    them, frames of a film, share one position.
    A label is the token at its own place. Published templates have no EOS behind an earlier answer, yet it ends there:
    what is to be predicted in the place of the first token of the next prompt is EOS. So the loss of all answers is the
    sum of what each costs as the last one behind the same tokens.
    Raises DataError if a text cannot be encoded.
    """
    sequence = _Sequence(tokenizer, image_length, max_length, special_tokens, joins_images)
    if answer is None:
        for earlier_prompt, earlier_answer in earlier:
            sequence.add_prompt(earlier_prompt, is_limited=False)
            sequence.add_tokens(text_tokens(tokenizer, earlier_answer, special_tokens, "answer"))
        sequence.add_prompt(prompt, is_limited=False)
        return sequence.sample(image)
    turns = [*earlier, (prompt, answer)]
    for number, (turn_prompt, turn_answer) in enumerate(turns):
        is_last = number == len(turns) - 1
        if number and not sequence.has_room(turn_prompt):
            sequence.leave_out(turns[number:])
            break
        sequence.add_prompt(turn_prompt)
        is_learnt = is_last or (learns_earlier and number not in unlearnt)
        if not sequence.add_answer(turn_answer, is_learnt, is_last):
            sequence.leave_out(turns[number + 1 :])
            break
    return sequence.sample(image)


class _Sequence:
    """The tokens of a sample while they are put together."""

    def __init__(self, tokenizer, image_length: int, max_length: int, special_tokens: bool, joins_images: bool):
        self.left_out = 0
        self._joins_images = joins_images
        self._tokenizer = tokenizer
        self._image_length = image_length
        self._max_length = max_length
        self._special_tokens = special_tokens
        self._ids = [tokenizer.bos_token_id]
        self._labels = [IGNORED]
        self._embed = [0]
        self._vision = [0]
        self._patches = [0]
        self._ends_answer = False

    def add_prompt(self, prompt: str | Sequence[str], is_limited: bool = True) -> None:
        """Add a prompt. Raises ConfigError if it is limited, and not even one token of answer and EOS fit behind it."""
        for number, part in enumerate(_parts(prompt)):
            if number:
                self._add_image()
            if not part:
                continue
            ids, more = first_tokens(self._tokenizer, part, self._max_length, self._special_tokens, "prompt")
            if more and (is_limited or len(part) > WHOLE):
                self._refuse(len(self._ids) + len(ids) + more)
            if more:
                ids = text_tokens(self._tokenizer, part, self._special_tokens, "prompt")
            self.add_tokens(ids)
        if is_limited and len(self._ids) + 2 > self._max_length:
            self._refuse(len(self._ids))

    def add_answer(self, answer: str, learns: bool, is_last: bool) -> bool:
        """Add an answer, and EOS if it is the last; return whether all of it fits."""
        room = self._max_length - len(self._ids)
        ids, more = first_tokens(self._tokenizer, answer, room, self._special_tokens, "answer")
        is_whole = not more
        tokens = [*ids, *[self._tokenizer.eos_token_id] * is_last]
        kept = tokens[:room]
        self.left_out += len(tokens) + more - len(kept)
        self.add_tokens(kept, learns)
        self._ends_answer = learns and is_whole and not is_last
        return is_whole

    def add_tokens(self, ids: Sequence[int], learns: bool = False) -> None:
        """Add tokens of text."""
        if not ids:
            return
        labels = [*ids] if learns else [IGNORED] * len(ids)
        if self._ends_answer:
            labels[0] = self._tokenizer.eos_token_id
            self._ends_answer = False
        self._ids += ids
        self._labels += labels
        for mask in (self._embed, self._vision, self._patches):
            mask += [0] * len(ids)

    def leave_out(self, turns: Sequence[Turn]) -> None:
        """Count the tokens of the turns that are left out, and end the answer before them, if there is room."""
        for prompt, answer in turns:
            ids, more = first_tokens(self._tokenizer, answer, self._max_length, self._special_tokens, "answer")
            self.left_out += self._length_of(prompt) + len(ids) + more
        self.left_out += bool(turns)  # EOS
        if self._ends_answer and len(self._ids) < self._max_length:
            self.add_tokens([self._tokenizer.eos_token_id])
            self.left_out -= 1

    def has_room(self, prompt: str | Sequence[str]) -> bool:
        """Return whether a prompt, one token of answer and EOS fit."""
        return len(self._ids) + self._length_of(prompt) + 2 <= self._max_length

    def _length_of(self, prompt: str | Sequence[str]) -> int:
        """Return how many tokens a prompt has, with its images."""
        return shortest_length(self._tokenizer, prompt, self._image_length, self._special_tokens) - 3

    def sample(self, image: torch.Tensor | None) -> Sample:
        """Return the sample of all that was added."""
        embed, vision, patches = (torch.tensor(mask) for mask in (self._embed, self._vision, self._patches))
        ids = torch.tensor(self._ids)
        labels = torch.tensor(self._labels)
        return Sample(ids, position_ids_for(patches), labels, embed, vision, image, self.left_out)

    def _add_image(self) -> None:
        length = self._image_length
        self._ids += [0] * (length + 2)
        self._labels += [IGNORED] * (length + 2)
        touches = self._joins_images and self._embed[-1] == 1
        if touches:
            self._patches[-1] = 1
        self._embed += [1] * (length + 2)
        self._vision += [1] * (length + 1) + [0]
        self._patches += [int(touches)] + [1] * length + [0]

    def _refuse(self, length: int) -> NoReturn:
        raise ConfigError(f"--max_length: {self._max_length} is too short, this prompt alone takes {length} tokens")


def _parts(prompt: str | Sequence[str]) -> Sequence[str]:
    return prompt.split(IMAGE_PLACE) if isinstance(prompt, str) else prompt


def position_ids_for(patches: torch.Tensor) -> torch.Tensor:
    """Return positions (seq,): one more at every token, but all neighbouring patches of an image share one."""
    before = patches.roll(1)
    before[0] = 0
    return torch.cumsum((patches == 0) | (before == 0), 0) - 1

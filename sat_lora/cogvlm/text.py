"""Prompts and token sequences, as the published CogVLM lays them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sat_lora.cogvlm.tokens import WHOLE, first_tokens, text_tokens
from sat_lora.errors import ConfigError

IGNORED = -100  # a label that takes no part in the loss
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
    """The prompt of a CogVLM `version` for a query and the (query, answer) turns before it, without its image, which
    comes first.
    """
    if version not in PROMPTS:
        raise ConfigError(f"--version: got {version!r}, wanted one of {', '.join(PROMPTS)}")
    return PROMPTS[version](query, history)


def prompt_for(version: str, query: str, history: tuple[tuple[str, str], ...] = ()) -> str:
    """`prompt_text` with IMAGE_PLACE in front, where the image's tokens go."""
    return IMAGE_PLACE + prompt_text(version, query, history)


def load_tokenizer(path: str | Path):
    """A `transformers` tokenizer from a local folder, or by a name that its cache holds; nothing is ever fetched."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # a broken file makes transformers raise KeyError, TypeError, AttributeError, ...
        if Path(path).is_dir():
            problem = f"does not hold a tokenizer that loads: {error}"
        else:
            problem = "is neither a folder nor a name in the local cache (nothing is fetched)"
        raise ConfigError(
            f"--local_tokenizer: {path} {problem}; give the folder that holds tokenizer.json or tokenizer.model"
        ) from error


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
    """Tokens that a sample with one token of answer takes: BOS, prompt, image, answer, EOS. Of `build_sample`'s
    arguments.
    """
    parts = _parts(prompt)
    words = sum(len(text_tokens(tokenizer, part, special_tokens)) for part in parts)
    return 1 + words + (len(parts) - 1) * (image_length + 2) + 1 + 1


def build_sample(
    tokenizer,
    prompt: str | Sequence[str],
    answer: str | None,
    image_length: int,
    max_length: int,
    image: torch.Tensor | None = None,
    special_tokens: bool = False,
) -> Sample:
    """BOS, prompt with its image, answer, EOS; without an answer, the prompt alone, ready for generation.

    An answer that does not fit into `max_length` is cut and has no EOS, which would teach to stop there; a prompt that
    does not fit is an error.
    prompt: with IMAGE_PLACE wherever an image goes, or the texts around the images. special_tokens: whether a text that
    spells one of the tokenizer's special tokens means it.
    DataError: a text cannot be encoded.
    """
    ids, embed, vision, patches = [tokenizer.bos_token_id], [0], [0], [0]
    for number, part in enumerate(_parts(prompt)):
        words, more = first_tokens(tokenizer, part, max_length, special_tokens, "prompt") if part else ([], 0)
        if number:
            ids += [0] * (image_length + 2)
            embed += [1] * (image_length + 2)
            vision += [1] * (image_length + 1) + [0]
            patches += [0] + [1] * image_length + [0]
        if more and (answer is not None or len(part) > WHOLE):
            taken = len(ids) + len(words) + more
            raise ConfigError(f"--max_length: {max_length} is too short, this prompt alone takes {taken} tokens")
        if more:
            words = text_tokens(tokenizer, part, special_tokens, "prompt")
        ids += words
        for mask in (embed, vision, patches):
            mask += [0] * len(words)
    start, left_out = len(ids), 0
    if answer is not None:
        if start + 2 > max_length:
            raise ConfigError(f"--max_length: {max_length} is too short, this prompt alone takes {start} tokens")
        words, more = first_tokens(tokenizer, answer, max_length - start, special_tokens, "answer")
        words.append(tokenizer.eos_token_id)
        ids += words[: max_length - start]
        left_out = start + len(words) + more - len(ids)
    embed, vision, patches = (torch.tensor(mask + [0] * (len(ids) - start)) for mask in (embed, vision, patches))
    input_ids = torch.tensor(ids)
    labels = input_ids.clone()
    labels[:start] = IGNORED
    return Sample(input_ids, position_ids_for(patches), labels, embed, vision, image, left_out)


def _parts(prompt: str | Sequence[str]) -> Sequence[str]:
    return prompt.split(IMAGE_PLACE) if isinstance(prompt, str) else prompt


def position_ids_for(patches: torch.Tensor) -> torch.Tensor:
    """(seq,) positions: one more at every token, but all neighbouring patches of an image share one."""
    before = patches.roll(1)
    before[0] = 0
    return torch.cumsum((patches == 0) | (before == 0), 0) - 1

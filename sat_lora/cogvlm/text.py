"""Prompts and token sequences, as the published CogVLM lays them out."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sat_lora.cogvlm.prompts import IMAGE_PLACE, PROMPTS, prompt_for
from sat_lora.errors import ConfigError

__all__ = [
    "IGNORED",
    "IMAGE_PLACE",
    "PROMPTS",
    "Sample",
    "build_sample",
    "load_tokenizer",
    "position_ids_for",
    "prompt_for",
    "shortest_length",
]

IGNORED = -100  # a label that takes no part in the loss


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
    left_out: int = 0  # tokens of the answer that did not fit


def shortest_length(tokenizer, prompt: str, image_length: int) -> int:
    """Tokens that a sample with one token of answer takes: BOS, prompt, image, answer, EOS."""
    words = sum(len(tokenizer.encode(part, add_special_tokens=False)) for part in prompt.split(IMAGE_PLACE))
    return 1 + words + prompt.count(IMAGE_PLACE) * (image_length + 2) + 1 + 1


def build_sample(
    tokenizer, prompt: str, answer: str | None, image_length: int, max_length: int, image: torch.Tensor | None = None
) -> Sample:
    """BOS, prompt with its image, answer, EOS; without an answer, the prompt alone, ready for generation.

    An answer that does not fit into `max_length` is cut; a prompt that does not is an error.
    """
    ids, embed, vision, patches = [tokenizer.bos_token_id], [0], [0], [0]
    for number, part in enumerate(prompt.split(IMAGE_PLACE)):
        words = tokenizer.encode(part, add_special_tokens=False) if part else []
        if number:
            ids += [0] * (image_length + 2)
            embed += [1] * (image_length + 2)
            vision += [1] * (image_length + 1) + [0]
            patches += [0] + [1] * image_length + [0]
        ids += words
        for mask in (embed, vision, patches):
            mask += [0] * len(words)
    start, left_out = len(ids), 0
    if answer is not None:
        if start + 2 > max_length:
            raise ConfigError(f"--max_length: {max_length} is too short, this prompt alone takes {start} tokens")
        words = tokenizer.encode(answer, add_special_tokens=False)
        ids += words[: max_length - start - 1]
        left_out = start + len(words) - len(ids)
        ids.append(tokenizer.eos_token_id)
    embed, vision, patches = (torch.tensor(mask + [0] * (len(ids) - start)) for mask in (embed, vision, patches))
    input_ids = torch.tensor(ids)
    labels = input_ids.clone()
    labels[:start] = IGNORED
    return Sample(input_ids, position_ids_for(patches), labels, embed, vision, image, left_out)


def position_ids_for(patches: torch.Tensor) -> torch.Tensor:
    """(seq,) positions: one more at every token, but all neighbouring patches of an image share one."""
    before = patches.roll(1)
    before[0] = 0
    return torch.cumsum((patches == 0) | (before == 0), 0) - 1

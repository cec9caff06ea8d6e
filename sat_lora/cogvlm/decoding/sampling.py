"""Which token follows: the likeliest, or one drawn from the model's distribution."""

from dataclasses import dataclass

import torch

from sat_lora._sat import mpu
from sat_lora.errors import ConfigError
from sat_lora.parallel.sharding import model_parallel_layout

SMALLEST = 1e-6  # factors of logits that leave them finite in float32, one upon the other
LARGEST = 1e6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Raises one ConfigError with every setting that is wrong."""

    temperature: float = 0.0
    """Divides the logits; 1 is the model's own distribution, and 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draws from the fewest likeliest tokens that have this probability together."""
    top_k: int = 0
    """Draws from so many likeliest tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that prompt or answer hold, and multiplies the negative ones (CTRL)."""
    seed: int | None = None
    """Row i draws what row 0 would draw with seed + i, whatever else is in the batch; None is another each time."""

    def __post_init__(self):
        problems = []
        if not self.temperature >= 0 or self.temperature == float("inf"):
            problems.append(f"temperature: got {self.temperature}, wanted a number of at least 0")
        elif self.temperature and not SMALLEST <= self.temperature <= LARGEST:
            problems.append(f"temperature: got {self.temperature}, wanted 0, or {SMALLEST:g} to {LARGEST:g}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: got {self.top_p}, wanted a number above 0 and at most 1")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            problems.append(f"top_k: got {self.top_k!r}, wanted a whole number, 0 for all tokens")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(f"repetition_penalty: got {self.repetition_penalty}, wanted a number above 0")
        elif not SMALLEST <= self.repetition_penalty <= LARGEST:
            problems.append(f"repetition_penalty: got {self.repetition_penalty}, wanted {SMALLEST:g} to {LARGEST:g}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            problems.append("seed: wanted a whole number of 64 bits")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            problems.append("top_p and top_k: temperature 0 draws nothing; give a temperature, 1 for the model's own")
        if problems:
            raise ConfigError("\n".join(problems))


GREEDY = Sampling()


class TokenChooser:
    """Chooses the next token of every row, on the device and without waiting for it."""

    def __init__(self, sampling: Sampling, prompts: torch.Tensor, is_word: torch.Tensor, max_new_tokens: int):
        """Draw all random numbers at once, and remember which tokens each prompt has.

        prompts: (rows, seq) int64. is_word: (rows, seq) bool, False at padding and at the places of images.
        """
        self._step = 0
        self._processors = None
        self._draws = None
        if sampling == GREEDY:
            return
        self._processors = _processors(sampling)
        # What is no word stands for the row's first token: the penalty is for being there, however often.
        first = prompts[:, :1]
        self._seen = torch.cat([prompts.where(is_word, first), first.expand(-1, max_new_tokens)], dim=1)
        self._prompt_length = prompts.shape[1]
        if sampling.temperature > 0:
            self._draws = _uniform_draws(sampling.seed, len(prompts), max_new_tokens).to(prompts.device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the tokens (rows,) int64 for logits (rows, vocabulary); to be called once per step, in order."""
        if self._processors is None:
            return logits.argmax(-1)
        scores = self._processors(self._seen, logits.float())
        if self._draws is None:
            tokens = scores.argmax(-1)
        else:
            shares = scores.softmax(-1).double().cumsum(-1)
            draw = self._draws[self._step, :, None] * shares[:, -1:]
            # Where logits are no numbers, any token rather than none: on CUDA an index too high ends the process.
            tokens = torch.searchsorted(shares, draw, right=True)[:, 0].clamp(max=shares.shape[-1] - 1)
        self._seen[:, self._prompt_length + self._step] = tokens
        self._step += 1
        return tokens


def _processors(sampling: Sampling):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    return processors


def _uniform_draws(seed: int | None, rows: int, steps: int) -> torch.Tensor:
    """Return (steps, rows) float64 in [0, 1), the same on ranks that share a sample and on every device.

    Of 24 random bits, so that a draw times a sum of probabilities stays below the sum.
    """
    seed = _common_seed() if seed is None else seed
    generators = (torch.Generator().manual_seed(seed + row) for row in range(rows))
    return torch.stack([torch.rand(steps, generator=generator) for generator in generators], dim=1).double()


def _common_seed() -> int:
    seeds = [int(torch.randint(2**62, ()))]
    if model_parallel_layout()[1] > 1:
        source = mpu.get_model_parallel_src_rank()
        torch.distributed.broadcast_object_list(seeds, src=source, group=mpu.get_model_parallel_group())
    return seeds[0]

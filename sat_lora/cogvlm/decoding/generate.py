"""Decoding: the prompts in one pass, then a token of every row at a time, with a static cache of keys and values."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import torch

from sat_lora.cogvlm.decoding.answer import Answer
from sat_lora.cogvlm.decoding.captured_step import CapturedStep, can_be_captured
from sat_lora.cogvlm.decoding.sampling import GREEDY, Sampling, TokenChooser
from sat_lora.cogvlm.network.key_value_cache import KeyValueCache
from sat_lora.cogvlm.network.model import CogVLMModel
from sat_lora.errors import ConfigError, DataError

WORTH_CAPTURING = 16  # tokens; before the graph is there, three steps have run in Python and memory was tidied up


def generate(
    model: CogVLMModel,
    batch: dict,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    tokenizer=None,
) -> list[list[int]]:
    """Return the tokens that the model puts after each prompt of a batch, up to the EOS or stop string.

    batch: input_ids, position_ids, image_embed_mask, vision_expert_mask (batch, seq), images, and `lengths` (batch,)
    where rows are padded on the right, as `collate` gives them. A row's answer does not depend on the others.
    stop: strings that end an answer, found in its text as `tokenizer` decodes it; the token with which one begins is
    left out. Raises ConfigError if a setting is wrong; DataError if the lengths do not fit the batch.
    All ranks of a model-parallel group have to call it with one batch. Where ZeRO-3 has partitioned the weights, all
    ranks have to call it, and make as many steps as each other: an EOS that only some of them see leaves these waiting.
    """
    answers = _new_answers(batch, eos_token_id, stop, tokenizer if stop else None)
    if stop and tokenizer is None:
        raise ConfigError("stop: strings are looked for in text; give the tokenizer too")
    with closing(_steps(model, batch, max_new_tokens, sampling)) as steps:
        for tokens in steps:
            for answer, token in zip(answers, tokens):
                answer.take(token)
            if all(answer.is_finished for answer in answers):
                break
    return [answer.tokens for answer in answers]


def stream(
    model: CogVLMModel,
    batch: dict,
    *,
    tokenizer,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> Generator[list[str], None, None]:
    """Yield the text of `generate`'s answers as it comes: each row's new piece, "" where nothing is sure yet.

    No piece ends within a character of several bytes. The model is in evaluation mode until the iterator is used up or
    closed. Arguments and errors are those of `generate`, errors at the first piece.
    """
    answers = _new_answers(batch, eos_token_id, stop, tokenizer)
    yield from stream_answers(model, batch, answers, max_new_tokens=max_new_tokens, sampling=sampling)


def stream_answers(
    model: CogVLMModel,
    batch: dict,
    answers: Sequence[Answer],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Generator[list[str], None, None]:
    """Yield what `stream` does for answers that each have ends of their own. One that is marked as finished meanwhile
    takes nothing more.
    """
    with closing(_steps(model, batch, max_new_tokens, sampling)) as steps:
        for tokens in steps:
            yield [answer.take(token) for answer, token in zip(answers, tokens)]
            if all(answer.is_finished for answer in answers):
                return
    yield [answer.finish() for answer in answers]


def _new_answers(batch: dict, eos_token_id: int | Sequence[int], stop: Sequence[str], tokenizer) -> list[Answer]:
    ends = [eos_token_id] if isinstance(eos_token_id, int) else [*eos_token_id]
    if not ends or not all(isinstance(token, int) for token in ends):
        raise ConfigError(f"eos_token_id: got {eos_token_id!r}, wanted a token id or several")
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"stop: got {stop!r}, wanted a list of strings that are not empty")
    return [Answer(frozenset(ends), tuple(stop), tokenizer) for _ in batch["input_ids"]]


@torch.no_grad()
def _steps(model: CogVLMModel, batch: dict, max_new_tokens: int, sampling: Sampling) -> Iterator[list[int]]:
    """Yield the next token of every row, `max_new_tokens` times, whatever the tokens are."""
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens: got {max_new_tokens}, wanted at least 0")
    if max_new_tokens == 0:
        return
    with inference(model):
        decoder = Decoder(model, batch, max_new_tokens)
        choose = TokenChooser(sampling, batch["input_ids"], decoder.is_word, max_new_tokens)
        tokens = choose(decoder.read_prompts())
        # On CUDA the next step is under way before a token is looked at; the one after the last was for nothing.
        runs_ahead = tokens.is_cuda
        for steps_left in reversed(range(max_new_tokens)):
            host_copy = _HostCopy(tokens)
            if runs_ahead and steps_left:
                tokens = choose(decoder.step(tokens))
            yield host_copy.tolist()
            if steps_left and not runs_ahead:
                tokens = choose(decoder.step(tokens))


class _HostCopy:
    """A tensor on its way to the host; only `tolist` waits for it, and for nothing that was queued after it."""

    def __init__(self, tensor: torch.Tensor):
        self._copy = tensor
        self._arrived = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


@contextmanager
def inference(model: CogVLMModel) -> Iterator[None]:
    """Run inside with the model in evaluation mode; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Decoder:
    """A batch of prompts and the tokens after them. Everything a step touches stays where it is.

    is_word: (batch, seq) bool, False at padding and at the places of images.
    """

    def __init__(self, model: CogVLMModel, batch: dict, max_new_tokens: int):
        ids = batch["input_ids"]
        positions = batch["position_ids"]
        rows, length = ids.shape
        lengths = batch.get("lengths")
        if lengths is None:
            lengths = torch.full((rows,), length)
        lengths = lengths.to(ids.device)
        if lengths.shape != (rows,) or not bool(((lengths > 0) & (lengths <= length)).all()):
            raise DataError(f"lengths {lengths.tolist()} do not fit a batch of {rows} rows of {length} tokens")
        self._model = model
        self._batch = batch
        self.is_word = torch.arange(length, device=ids.device) < lengths[:, None]
        self.is_word &= batch["image_embed_mask"].to(ids.device) == 0
        capture = max_new_tokens >= WORTH_CAPTURING and can_be_captured(model, ids.device)
        dtype = model.mixins["eva"].boi.dtype
        self.cache = KeyValueCache(model, lengths, length + max_new_tokens, dtype, fixed_shapes=capture)
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=ids.device)
        self._positions = positions.gather(1, lengths[:, None] - 1)
        self.captured_step = CapturedStep(self._forward, capture=capture)

    def read_prompts(self) -> torch.Tensor:
        """Return the logits (batch, vocabulary) of the token after each prompt."""
        keys = ("images", "cross_images", "image_embed_mask", "vision_expert_mask")
        vision = {key: self._batch[key] for key in keys if key in self._batch}
        logits = self._model(self._batch["input_ids"], self._batch["position_ids"], -1, cache=self.cache, **vision)[0]
        self.cache.holds_prompts = True
        return logits[:, -1]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, vocabulary) of the token after `tokens` (batch,), which come after those before."""
        self._tokens.copy_(tokens[:, None])
        self._positions += 1
        logits = self.captured_step()
        self.cache.advance()
        return logits

    def _forward(self) -> torch.Tensor:
        self.cache.open_next_place()
        return self._model(self._tokens, self._positions, None, cache=self.cache)[0][:, -1]

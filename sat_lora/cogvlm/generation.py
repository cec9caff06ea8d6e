"""Greedy decoding with SAT's cache of keys and values."""

from contextlib import contextmanager

import torch

from sat_lora._sat import CachedAutoregressiveMixin, update_mems
from sat_lora.cogvlm.model import CogVLMModel
from sat_lora.errors import DataError

_CACHE = "auto-regressive"


@contextmanager
def cached_decoding(model: CogVLMModel):
    """SAT's cached autoregressive mixin on the model, removed again at the end: it must not stay for training."""
    training = model.training
    model.eval()
    model.add_mixin(_CACHE, CachedAutoregressiveMixin())
    try:
        yield
    finally:
        model.del_mixin(_CACHE)
        model.train(training)


@torch.no_grad()
def generate(model: CogVLMModel, batch: dict, *, max_new_tokens: int, eos_token_id: int) -> list[list[int]]:
    """The tokens that greedy decoding puts after each prompt of a batch, up to and without EOS.

    batch: input_ids, position_ids, image_embed_mask, vision_expert_mask (batch, seq), images, as `collate` gives them;
    all prompts of one length, since SAT's cache knows no padding. DataError: `lengths` of the batch says otherwise.
    """
    lengths = set(batch["lengths"].tolist()) if "lengths" in batch else set()
    if len(lengths) > 1:
        raise DataError(f"generate: all prompts of a batch have to be of one length, got {sorted(lengths)}")
    ids, positions = batch["input_ids"], batch["position_ids"]
    rows = len(ids)
    finished = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    answers: list[list[int]] = [[] for _ in range(rows)]
    vision = {key: batch[key] for key in ("images", "image_embed_mask", "vision_expert_mask")}
    with cached_decoding(model):
        logits, *layers = model(ids, positions, -1, **vision)
        mems, place = None, positions[:, -1:]
        for step in range(max_new_tokens):
            mems = update_mems([layer["mem_kv"] for layer in layers], mems, max_memory_length=2**31)
            token = logits[:, -1].argmax(-1)
            finished |= token == eos_token_id
            for row, (value, done) in enumerate(zip(token.tolist(), finished.tolist())):
                if not done:
                    answers[row].append(value)
            if bool(finished.all()) or step + 1 == max_new_tokens:
                break
            place = place + 1
            logits, *layers = model(token[:, None], place, None, mems=mems)
    return answers

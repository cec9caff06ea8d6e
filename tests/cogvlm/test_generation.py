"""Greedy decoding with the cache, against computing the whole sequence again for every token."""

import pytest
import torch

from sat_lora import DataError, add_lora
from sat_lora.cogvlm.generation import cached_decoding, generate
from tests.tiny import PATCHES, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
ROWS = {"mixed": (True, False, True), "images": (True, True), "text": (False, False)}
NEVER = -1  # an end of sequence that no model says


def adapted_model(dtype=torch.float32):
    model = tiny_model(dtype).eval()
    add_lora(model, r=4)
    fill_adapters(model)
    return model


@torch.no_grad()
def without_cache(model, batch, count):
    """The same tokens, each from a forward pass over everything before it. New tokens are language."""
    batch = dict(batch)
    for _ in range(count):
        token = logits_of(model, batch)[:, -1:].argmax(-1)
        zeros = torch.zeros_like(token)
        grown = {
            "input_ids": token,
            "position_ids": batch["position_ids"][:, -1:] + 1,
            "image_embed_mask": zeros,
            "vision_expert_mask": zeros,
        }
        batch |= {key: torch.cat([batch[key], value], 1) for key, value in grown.items()}
    return batch["input_ids"][:, -count:].tolist()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_decoding_with_the_cache_equals_full_recomputation(rows, adapter):
    model = adapted_model() if adapter else tiny_model().eval()
    batch = tiny_batch(ROWS[rows])
    tokens = generate(model, batch, max_new_tokens=12, eos_token_id=NEVER)
    assert tokens == without_cache(model, batch, 12)
    assert len({tuple(row) for row in tokens}) == len(tokens) and all(len(set(row)) > 2 for row in tokens)


def test_the_adapter_takes_part_in_every_step():
    """Switched off after the prompt, or for it, the answers are others."""
    model, batch = adapted_model(), tiny_batch(ROWS["mixed"])
    whole = generate(model, batch, max_new_tokens=12, eos_token_id=NEVER)
    for on_prompt in (True, False):

        def switch(module, args, kwargs, on_prompt=on_prompt):
            for mixin in (module.mixins["lora"], module.mixins["eva"].vit_model.mixins["lora"]):
                mixin.enabled = (kwargs.get("mems") is None) == on_prompt

        handle = model.register_forward_pre_hook(switch, with_kwargs=True)
        assert generate(model, batch, max_new_tokens=12, eos_token_id=NEVER) != whole
        handle.remove()


def test_a_prompt_may_end_with_its_image():
    model, batch = tiny_model().eval(), tiny_batch((True,), length=PATCHES + 3)
    assert generate(model, batch, max_new_tokens=6, eos_token_id=NEVER) == without_cache(model, batch, 6)


def test_an_answer_ends_before_its_eos_and_the_others_go_on():
    model, batch = tiny_model().eval(), tiny_batch(ROWS["mixed"])
    free = without_cache(model, batch, 12)
    eos = free[0][4]
    expected = [row[: row.index(eos)] if eos in row else row for row in free]
    assert len(expected[0]) <= 4 and max(map(len, expected)) > len(expected[0])
    assert generate(model, batch, max_new_tokens=12, eos_token_id=eos) == expected


def test_decoding_stops_when_every_answer_has_ended(monkeypatch):
    model, batch = tiny_model().eval(), tiny_batch((True,))
    first, second, third = without_cache(model, batch, 3)[0]
    steps = []
    model.register_forward_pre_hook(lambda module, args: steps.append(args[0].shape[1]))
    assert generate(model, batch, max_new_tokens=50, eos_token_id=third) == [[first, second]]
    assert steps == [batch["input_ids"].shape[1], 1, 1]


@pytest.mark.parametrize("count", [0, 1])
def test_no_more_tokens_than_asked_for(count):
    model, batch = tiny_model().eval(), tiny_batch((True, False))
    assert generate(model, batch, max_new_tokens=count, eos_token_id=NEVER) == [
        row[:count] for row in without_cache(model, batch, 1)
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_afterwards_as_it_was_before(training):
    model, batch = adapted_model().train(training), tiny_batch()
    mixins, before = list(model.mixins), logits_of(model, batch)
    first = generate(model, batch, max_new_tokens=3, eos_token_id=NEVER)
    assert list(model.mixins) == mixins and {m.training for m in model.modules()} == {training}
    after = logits_of(model, batch)
    assert torch.equal(before, after) and after.requires_grad
    assert generate(model, batch, max_new_tokens=3, eos_token_id=NEVER) == first


def test_the_cache_is_removed_after_an_exception_too():
    model = adapted_model().train()
    mixins = list(model.mixins)
    with pytest.raises(KeyboardInterrupt), cached_decoding(model):
        assert len(model.mixins) == len(mixins) + 1 and not model.training
        raise KeyboardInterrupt
    assert list(model.mixins) == mixins and model.training


def test_prompts_of_several_lengths_are_refused():
    batch = {**tiny_batch(), "lengths": torch.tensor([20, 17])}
    with pytest.raises(DataError, match=r"prompts of a batch have to be of one length, got \[17, 20\]"):
        generate(tiny_model(), batch, max_new_tokens=3, eos_token_id=NEVER)

"""Decoding with the cache in every family: fewer heads of keys, and a second encoder that runs once."""

import pytest
import torch

from sat_lora.cogvlm.decoding.generate import generate
from sat_lora.cogvlm.inputs.text import end_tokens
from tests.support.tiny import logits_of
from tests.support.tiny_families import CONFIGS, family_batch, family_model

pytestmark = pytest.mark.usefixtures("single_process_group")
NEVER = -1


@torch.no_grad()
def without_cache(model, batch, count):
    """The same tokens, each from a forward pass over everything before it."""
    batch = dict(batch)
    for _ in range(count):
        token = logits_of(model, batch)[:, -1:].argmax(-1)
        zeros = torch.zeros_like(token)
        grown = {"input_ids": token, "position_ids": batch["position_ids"][:, -1:] + 1}
        grown |= {"image_embed_mask": zeros, "vision_expert_mask": zeros}
        batch |= {key: torch.cat([batch[key], value], 1) for key, value in grown.items()}
    return batch["input_ids"][:, -count:].tolist()


def joined(batches):
    """One batch of several with other lengths, padded on the right."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    keys = ("input_ids", "position_ids", "image_embed_mask", "vision_expert_mask")
    batch = {
        key: torch.cat([torch.nn.functional.pad(b[key], (0, longest - b[key].shape[1])) for b in batches])
        for key in keys
    }
    pictures = {key: torch.cat([b[key] for b in batches]) for key in ("images", "cross_images") if key in batches[0]}
    return {**batch, **pictures, "lengths": torch.tensor([b["input_ids"].shape[1] for b in batches])}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_several_lengths_are_answered_as_each_alone_without_a_cache(name):
    model = family_model(name).eval()
    prompts = [
        family_batch(name, (True,), seed=1, length=20),
        family_batch(name, (False,), seed=2, length=5),
        family_batch(name, (True,), seed=3, length=26),
    ]
    runs = []
    if name == "cogagent":
        model.mixins["encoder"].vit.register_forward_hook(lambda *_: runs.append(1))
    answers = generate(model, joined(prompts), max_new_tokens=6, eos_token_id=NEVER)
    assert len(runs) == (name == "cogagent")  # once for all rows and tokens
    assert answers == [without_cache(model, prompt, 6)[0] for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) == 3
    assert generate(model, prompts[1], max_new_tokens=6, eos_token_id=NEVER)[0] == answers[1]


class Tokenizer:
    eos_token_id = 2


@pytest.mark.parametrize(
    ("own", "ends"), [([7, 9], (2, 7, 9)), ([2, 9], (2, 9)), (9, (2,)), (None, (2,)), (["9", True], (2,))]
)
def test_what_the_config_lists_ends_an_answer_too(own, ends):
    assert end_tokens(Tokenizer, {"eos_token_id": own}) == ends

"""Greedy answers of the demo's model on a device, against the logits of the whole sequence anew for each token."""

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.checkpoints.load import load_cogvlm
from sat_lora.cogvlm.decoding.generate import generate
from sat_lora.cogvlm.inputs.text import build_sample, load_tokenizer, prompt_for
from sat_lora.data.samples import collate
from sat_lora.lora.mixin import lora_mixins
from sat_lora.training.steps.step import to_device
from tests.support.paths import TINY_BASE
from tests.support.tiny import fill_adapters, logits_of

PATCHES, SIDE, TOKENS, NO_END = 36, 42, 6, -1


def adapted_model(device: torch.device):
    """The demo's base in float32 with a delta that changes what it says."""
    model, _ = load_cogvlm(TINY_BASE)
    add_lora(model, LoraConfig(r=4))
    fill_adapters(model, std=0.05)
    return model.to(device).eval()


def prompts(question: str, rows: int, seed: int) -> dict:
    """A collated batch of noise images with that question."""
    tokenizer = load_tokenizer(TINY_BASE)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, SIDE, SIDE, generator=generator)
    text = prompt_for("base", question)
    samples = [build_sample(tokenizer, text, None, PATCHES, 64, image) for image in images]
    return collate(samples, image_size=(SIDE, SIDE))


@torch.no_grad()
def recomputed(model, batch: dict) -> list[list[int]]:
    """Greedy answers without a cache. AssertionError: two tokens are so close that rounding could choose."""
    answers = []
    for row in range(len(batch["input_ids"])):
        own = {key: batch[key][row : row + 1] for key in ("input_ids", "position_ids", "images")}
        own |= {key: batch[key][row : row + 1] for key in ("image_embed_mask", "vision_expert_mask")}
        answer = []
        for _ in range(TOKENS):
            best, second = logits_of(model, own)[0, -1].topk(2).values
            assert best - second > 1e-3
            token = logits_of(model, own)[:, -1:].argmax(-1)
            answer.append(int(token))
            own["input_ids"] = torch.cat([own["input_ids"], token], 1)
            own["position_ids"] = torch.cat([own["position_ids"], own["position_ids"][:, -1:] + 1], 1)
            for key in ("image_embed_mask", "vision_expert_mask"):
                own[key] = torch.cat([own[key], torch.zeros_like(token)], 1)
        answers.append(answer)
    return answers


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_answers_equal_recomputation_on_the_cpu(device, rows, single_process_group):
    """Several batches, lengths and states of the adapters one after the other: nothing of an earlier one stays."""
    model, reference = adapted_model(device), adapted_model(torch.device("cpu"))
    said = set()
    for number, (question, enabled) in enumerate(
        [("CAPTCHA:", True), ("CAPTCHA:", False), ("CAPTCHA:", True), ("What is this?", True)]
    ):
        batch = prompts(question, rows, seed=number)
        for each in (model, reference):
            for mixin in lora_mixins(each).values():
                mixin.enabled = enabled
        answers = generate(model, to_device(batch, device), max_new_tokens=TOKENS, eos_token_id=NO_END)
        assert answers == recomputed(reference, batch)
        said.add(str(answers))
    assert len(said) > 1

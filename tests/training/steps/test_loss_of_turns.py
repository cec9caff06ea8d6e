"""The loss on all answers of a conversation is the sum of what each costs as the last one, in float64; and so is the
project's own, whose head runs on the answers alone.
"""

from unittest import mock

import numpy
import pytest
import torch
from torch.nn import functional as F

from sat_lora.cogvlm.inputs.text import IGNORED, build_sample, load_tokenizer, turn_texts
from sat_lora.data.samples import collate
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.loss import answer_loss_sum, sum_over_data_parallel
from tests.support.ranks import run_ranks
from tests.support.tiny import PATCHES, tiny_model

TURNS = [("How many digits?", "4"), ("The first one?", "7"), ("Backwards?", "2qK7")]


def sample_of(tokenizer, number: int, *, has_image: bool, learns_earlier: bool):
    """The first `number` turns as a sample."""
    texts = turn_texts("chat", [query for query, _ in TURNS[:number]])
    prompts = [("", text) if has_image and not place else (text,) for place, text in enumerate(texts)]
    *earlier, (prompt, answer) = [(prompt, answer) for prompt, (_, answer) in zip(prompts, TURNS)]
    image = torch.rand(3, 21, 21, generator=torch.Generator().manual_seed(5)) if has_image else None
    return build_sample(tokenizer, prompt, answer, PATCHES, 200, image, earlier=earlier, learns_earlier=learns_earlier)


def loss_and_gradients(model, samples) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a batch, and its gradients, one after the other."""
    batch = collate(samples, image_size=(21, 21))
    inputs = {name: batch[name] for name in ("image_embed_mask", "vision_expert_mask")}
    images = batch["images"].double()
    logits = model(batch["input_ids"], batch["position_ids"], -1, images=images, **inputs)[0]
    labels = batch["labels"][:, 1:].reshape(-1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum", ignore_index=IGNORED)
    return loss.detach(), gradients_of(model, loss)


def own_loss_and_gradients(model, samples) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the loss that training takes, which it sums in float32, here in float64."""
    batch = collate(samples, image_size=(21, 21))
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        loss = answer_loss_sum(model, {**batch, "images": batch["images"].double()})
        return loss.detach(), gradients_of(model, loss)


def gradients_of(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    parameters = sorted((name, p) for name, p in model.named_parameters() if p.grad is not None)
    return torch.cat([p.grad.flatten() for _, p in parameters if p.grad is not None])


def compared(tokenizer, has_image: bool, **settings) -> tuple[float, float, float]:
    """(loss on all answers, the sum of the losses on each, the largest difference of gradients).

    AssertionError: the loss of training, or its gradient, is another for any of them.
    """
    model = tiny_model(torch.float64, **settings)
    whole = sample_of(tokenizer, 3, has_image=has_image, learns_earlier=True)
    parts = [sample_of(tokenizer, n, has_image=has_image, learns_earlier=False) for n in (1, 2, 3)]
    loss, gradients = loss_and_gradients(model, [whole])
    each = [loss_and_gradients(model, [part]) for part in parts]
    difference = gradients - sum(part for _, part in each)
    for sample, (expected, its_gradients) in zip([whole, *parts], [(loss, gradients), *each]):
        own, own_gradients = own_loss_and_gradients(model, [sample])
        assert own.dtype == torch.float64 and torch.isclose(own, expected, rtol=1e-12, atol=0)
        assert torch.allclose(own_gradients, its_gradients, rtol=0, atol=1e-10)
    return float(loss), sum(float(part) for part, _ in each), float(difference.abs().max())


@pytest.mark.parametrize("has_image", [True, False])
def test_the_loss_of_a_conversation_is_the_sum_of_those_of_its_turns(single_process_group, tokenizer, has_image):
    loss, total, difference = compared(tokenizer, has_image)
    assert loss > 10 and abs(loss - total) < 1e-10 * loss and difference < 1e-10


def ranks_compared(folder: str, model_parallel: int) -> list:
    """The same on a rank; of two data-parallel ones the second has text alone. With it the sum over ranks."""
    world = init_model_parallel(init_distributed(), model_parallel)
    has_image = world.data_parallel_rank == 0
    loss, total, difference = compared(load_tokenizer(folder), has_image, model_parallel_size=model_parallel)
    return [loss, total, difference, *sum_over_data_parallel(loss, total, device=world.device)]


@pytest.mark.matrix
def test_so_it_is_at_model_parallel_2_and_with_one_rank_of_text_alone(base_folder):
    alone = run_ranks(ranks_compared, 1, str(base_folder), 1)[0]
    cut = run_ranks(ranks_compared, 2, str(base_folder), 2)
    mixed = run_ranks(ranks_compared, 2, str(base_folder), 1)
    for loss, total, difference, *sums in [alone, *cut, *mixed]:
        assert abs(loss - total) < 1e-10 * loss and difference < 1e-10
        assert numpy.isclose(*sums, rtol=1e-10, atol=0)
    assert numpy.allclose([loss for loss, *_ in cut], alone[0], rtol=1e-10, atol=0)
    assert mixed[0][0] == pytest.approx(alone[0], rel=1e-12) and mixed[1][0] != pytest.approx(alone[0], rel=1e-3)

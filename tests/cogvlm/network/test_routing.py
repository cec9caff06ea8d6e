"""Routing tokens to their expert, against a loop over the tokens."""

import pytest
import torch

from sat_lora.cogvlm.network.routing import TokenRouting, route

MASKS = {
    "mixed": [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]],
    "text": [[0, 0, 0, 0, 0]],
    "image": [[1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("mask", MASKS)
def test_every_token_goes_through_its_expert_and_back_to_its_place(mask):
    torch.manual_seed(0)
    mask = torch.tensor(MASKS[mask])
    x, vision, language = torch.randn(*mask.shape, 4), torch.nn.Linear(4, 6), torch.nn.Linear(4, 6)
    got = TokenRouting.from_mask(mask).apply(vision, language, x)
    assert got.shape == (*mask.shape, 6)
    for row, column in torch.cartesian_prod(*map(torch.arange, mask.shape)):
        expert = vision if mask[row, column] else language
        torch.testing.assert_close(got[row, column], expert(x[row, column]))


@pytest.mark.parametrize("mask", MASKS)
def test_both_experts_run_whatever_the_batch_holds_vision_first(mask):
    calls = []

    def expert(name):
        return lambda x: calls.append((name, len(x))) or x

    mask = torch.tensor(MASKS[mask])
    TokenRouting.from_mask(mask).apply(expert("vision"), expert("language"), torch.randn(*mask.shape, 4))
    assert calls == [("vision", int(mask.sum())), ("language", int((1 - mask).sum()))]


@pytest.mark.parametrize("mask", ["text", "image"])
def test_an_expert_without_tokens_gets_a_gradient_of_zero(mask):
    mask = torch.tensor(MASKS[mask])
    experts = {"vision": torch.nn.Linear(4, 4), "language": torch.nn.Linear(4, 4)}
    TokenRouting.from_mask(mask).apply(*experts.values(), torch.randn(*mask.shape, 4)).sum().backward()
    idle = experts["language" if mask.all() else "vision"]
    assert all(p.grad is not None and not p.grad.any() for p in idle.parameters())


def test_a_mask_of_any_number_type_routes_alike():
    mask = torch.tensor(MASKS["mixed"])
    expected = TokenRouting.from_mask(mask)
    assert expected.vision.tolist() == [1, 2, 10, 12, 14]
    for dtype in (torch.bool, torch.float32, torch.int8):
        assert torch.equal(TokenRouting.from_mask(mask.to(dtype)).vision, expected.vision)


def test_a_cached_step_has_no_routing_and_is_language():
    x = torch.randn(2, 1, 4)
    assert torch.equal(route(None, lambda x: x * 0, lambda x: x + 1, x), x + 1)


@pytest.mark.parametrize("mask", MASKS)
def test_the_gradient_is_that_of_a_loop_over_the_tokens(mask):
    torch.manual_seed(0)
    mask = torch.tensor(MASKS[mask])
    x = torch.randn(*mask.shape, 3, dtype=torch.float64, requires_grad=True)
    experts = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = torch.randn(*mask.shape, 2, dtype=torch.float64)
    routing = TokenRouting.from_mask(mask)
    got = (routing.apply(lambda rows: rows @ experts[0], lambda rows: rows @ experts[1], x) * weights).sum()
    plain = sum(
        (x[place] @ experts[0 if mask[place] else 1]) @ weights[place]
        for place in map(tuple, torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist())
    )
    gradients = [torch.autograd.grad(loss, [x, *experts], allow_unused=True) for loss in (got, plain)]
    for ours, exact in zip(*gradients):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if exact is None else exact, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_added_into_zeros():
    """index_select's own backward is an atomic addition."""
    x = torch.randn(3, 5, 4, requires_grad=True)
    routing = TokenRouting.from_mask(torch.tensor(MASKS["mixed"]))
    nodes, waiting = set(), [routing.apply(lambda rows: rows * 2, lambda rows: rows * 3, x).grad_fn]
    while waiting:
        node = waiting.pop()
        nodes.add(type(node).__name__)
        waiting += [following for following, _ in node.next_functions if following is not None]
    assert "_PermuteBackward" in nodes and not any("Index" in name or "Slice" in name for name in nodes)

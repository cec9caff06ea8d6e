"""The drop-in for SAT's lora2 on two model-parallel ranks: what it is on one. SAT's own is not."""

import pytest
import torch

from sat_lora.adapters.save_load import whole_tensors
from sat_lora.lora.apply import sat_models
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from tests.support.ranks import run_ranks
from tests.support.sat_oracle import fill_ours, our_adapters, with_ours, with_sats
from tests.support.sat_subjects import SUBJECTS, loss_of, relative_error, sums_of_sat

NAMES = ["plain", "chatglm2", "encoder-decoder"]


def output_of_sats(name, model_parallel):
    init_model_parallel(init_distributed(), model_parallel)
    return SUBJECTS[name].run(with_sats(SUBJECTS[name], 4, 6).eval()).detach().numpy()


def what_ours_computes(name, model_parallel):
    """(output, the same with merged weights, whole gradients of A and B by name), in float64, as numpy arrays."""
    init_model_parallel(init_distributed(), model_parallel)
    subject = SUBJECTS[name]
    model = with_ours(subject, 4, 6).eval()
    fill_ours(model)
    output = subject.run(model)
    loss_of(output).backward()
    gradients = whole_gradients(model)
    fill_ours(model)
    for inner in sat_models(model).values():
        inner.get_mixin("lora").merge_lora()
    return output.detach().numpy(), subject.run(model).detach().numpy(), gradients


@torch.no_grad()
def whole_gradients(model):
    """A gradient takes the place of its parameter, so that it is gathered as the parameter would be for a file."""
    gradients = {}
    for name, adapter in our_adapters(model).items():
        for factor in (adapter.A, adapter.B):
            factor.copy_(factor.grad)
        gradients |= {leaf: tensor.numpy() for leaf, tensor in whole_tensors(name, adapter).items()}
    return gradients


@pytest.fixture(scope="module", params=NAMES)
def one_and_two_ranks(request):
    name = request.param
    return name, run_ranks(what_ours_computes, 1, name, 1)[0], run_ranks(what_ours_computes, 2, name, 2)


def test_the_output_on_two_ranks_is_that_of_one_process(one_and_two_ranks):
    _, (expected, expected_merged, _), ranks = one_and_two_ranks
    assert relative_error(expected_merged, expected) < 1e-6
    for output, merged, _ in ranks:
        assert relative_error(output, expected) < 1e-6
        assert relative_error(merged, expected) < 1e-6


def test_the_gradients_on_two_ranks_are_those_of_one_process(one_and_two_ranks):
    name, (*_, expected), ranks = one_and_two_ranks
    for *_, gradients in ranks:
        assert gradients.keys() == expected.keys()
        for tensor, value in expected.items():
            assert relative_error(gradients[tensor] / sums_of_sat(name, tensor), value) < 1e-5, tensor


@pytest.mark.parametrize("name", NAMES)
def test_sats_own_is_the_same_on_one_rank_and_another_on_two(name):
    """Why there is a drop-in: each rank of SAT's adds its own part of the delta of `dense`, and nobody sums them."""
    expected = run_ranks(what_ours_computes, 1, name, 1)[0][0]
    assert relative_error(run_ranks(output_of_sats, 1, name, 1)[0], expected) < 1e-6
    assert all(relative_error(output, expected) > 0.02 for output in run_ranks(output_of_sats, 2, name, 2))

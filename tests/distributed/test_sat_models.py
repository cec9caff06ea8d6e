"""LoRA on SAT's own models, cut over two model-parallel ranks, is LoRA on the whole model."""

import pytest
import torch

from sat_lora.adapters.save_load import whole_tensors
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from tests.support.ranks import run_ranks
from tests.support.sat_subjects import GEGLU_IN_TWO_BLOCKS, SUBJECTS, adapt, loss_of, relative_error, sums_of_sat
from tests.support.tiny import fill_adapters

# Not GLM-130B's own MLP: every rank halves its own rows into gate and value, so the whole weight depends on the cut.
# Not T5: each rank draws relative position weights for its own heads.
NAMES = ["llama", "llama, both", "chatglm2", "mixtral", "plain", "gpt2", "vit", "encoder-decoder"]
MODELS = {**{name: SUBJECTS[name] for name in NAMES}, "geglu in two blocks": GEGLU_IN_TWO_BLOCKS}


def output_and_gradients(name, model_parallel):
    """(output, whole gradient of every adapter tensor by name), in float64, as numpy arrays.

    A gradient takes the place of its parameter, so that it is gathered as the parameter would be for a file.
    """
    init_model_parallel(init_distributed(), model_parallel)
    subject = MODELS[name]
    model = subject.build(model_parallel_size=model_parallel).train()
    adapt(model)
    fill_adapters(model)
    output = subject.run(model)
    loss_of(output).backward()
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            for parameter in (adapter.A, adapter.B):
                parameter.copy_(parameter.grad)
    gradients = {k: t.numpy() for n, a in adapters_of(model).items() for k, t in whole_tensors(n, a).items()}
    return output.detach().numpy(), gradients


@pytest.fixture(scope="module", params=MODELS)
def one_and_two_ranks(request):
    name = request.param
    return run_ranks(output_and_gradients, 1, name, 1)[0], run_ranks(output_and_gradients, 2, name, 2)


def test_the_output_on_two_ranks_is_that_of_one_process(one_and_two_ranks):
    (expected, _), ranks = one_and_two_ranks
    assert [relative_error(output, expected) < 1e-6 for output, _ in ranks] == [True, True]


def test_the_gradients_on_two_ranks_are_those_of_one_process(request, one_and_two_ranks):
    (_, expected), ranks = one_and_two_ranks
    model = request.node.callspec.params["one_and_two_ranks"]
    for _, gradients in ranks:
        assert gradients.keys() == expected.keys()
        wrong = [
            name
            for name, value in expected.items()
            if not relative_error(gradients[name] / sums_of_sat(model, name), value) < 1e-5
        ]
        factors = {round(float((gradients[n] * expected[n]).sum() / (expected[n] ** 2).sum()), 3) for n in wrong}
        assert not wrong, f"{len(wrong)} of {len(expected)} gradients are wrong, by the factors {factors}"

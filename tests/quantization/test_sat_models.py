"""Every SAT model on quantised weights, against itself on the decoded ones: bit for bit."""

import pytest
import torch

from sat_lora import quantize_model
from tests.support.quantized_layers import decoded_copy
from tests.support.sat_subjects import SUBJECTS, adapt, loss_of
from tests.support.tiny import fill_adapters

pytestmark = pytest.mark.usefixtures("single_process_group")


def results(subject, model) -> dict[str, torch.Tensor | None]:
    """The output and the gradient of each parameter of the adapters, by name."""
    adapt(model)
    fill_adapters(model)
    torch.manual_seed(5)  # of dropout
    output = subject.run(model.train())
    loss_of(output).backward()
    return {"output": output, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("name", SUBJECTS)
def test_output_and_gradients_are_those_of_the_decoded_weights(name):
    subject = SUBJECTS[name]
    model = subject.build(torch.float32)
    layers = quantize_model(model, scheme="int8")
    assert len(layers) >= 6 and not set(layers) & set(subject.heads) and set(layers) <= subject.linears.keys()
    # SAT's gelu is a script, which torch compiles after a pass and then rounds otherwise: the first is not compared.
    _, theirs, ours = (results(subject, side) for side in (decoded_copy(model), decoded_copy(model), model))
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n] is not None and not torch.equal(ours[n], theirs[n])] == []

"""A loss or gradient that is not finite on any rank: no rank's optimizer moves, and the cause is named."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.loss import count_answer_tokens, sum_over_data_parallel
from sat_lora.training.steps.nonfinite import nonfinite_gradients
from sat_lora.training.steps.optimizer_state import create_moments, optimizer_tensors, steps_taken
from sat_lora.training.steps.step import train_step
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config, image_batch, mixed_batch

PLANTED = "transformer.layers.1.mlp"


class Run:
    """An engine with a watch; `step` takes one step, with a NaN planted on the last rank if `plant` names one."""

    def __init__(self, stage, model_parallel=1, accumulate=1, bf16=False, checkpoint=False, offload=False):
        self.world, self.accumulate = init_model_parallel(init_distributed(), model_parallel), accumulate
        model = tiny_model(
            torch.bfloat16 if bf16 else torch.float32,
            model_parallel_size=model_parallel,
            checkpoint_activations=checkpoint,
        )
        add_lora(model, LoraConfig(r=4, lora_dropout=0.1))
        model.train()
        config = engine_config(stage, 2, accumulate, 1.0, bf16)
        if offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        self.engine = start_engine(model, adapter_optimizer(model, lr=1e-2), config)
        create_moments(self.engine)
        torch.manual_seed(self.world.data_parallel_rank)

    def step(self, number, plant=None):
        rank = self.world.data_parallel_rank
        batches = [mixed_batch(rank, self.accumulate * number + one) for one in range(self.accumulate)]
        hooks = []
        if plant is not None and self.world.rank == self.world.size - 1:
            if plant in ("batch", "first batch"):
                number = -1 if plant == "batch" else 0
                batches[number] = image_batch(rank, self.accumulate)
                batches[number]["images"] *= float("nan")
            else:
                module = self.engine.module.get_submodule(PLANTED)
                spoil = {"forward": spoil_output, "backward": spoil_gradient, "first backward": spoil_first_gradient()}
                hooks.append(module.register_forward_hook(spoil[plant]))
        tokens = sum_over_data_parallel(sum(count_answer_tokens(b["labels"]) for b in batches), device="cpu")
        result = train_step(self.engine, batches, self.world, *tokens)
        for hook in hooks:
            hook.remove()
        return result

    def state(self):
        values = {name: tensor.float().numpy().tobytes() for name, tensor in optimizer_tensors(self.engine)}
        return values, steps_taken(self.engine), torch.get_rng_state().numpy().tobytes()


def spoil_output(module, args, output):
    return output.masked_fill(torch.ones_like(output, dtype=torch.bool), float("inf"))


def spoil_gradient(module, args, output):
    if args[0].requires_grad:
        args[0].register_hook(lambda gradient: gradient * float("nan"))


def spoil_first_gradient():
    """The same, in the first micro-batch of every pass over the step's two alone."""
    passes = itertools.count()

    def spoil(module, args, output):
        if next(passes) % 2 == 0:
            spoil_gradient(module, args, output)

    return spoil


def skip_among_steps(stage, plant, first, **layout):
    """Three good steps and a bad one before, between or after them, against the three alone."""
    spoiled, clean = Run(stage, **layout), Run(stage, **layout)
    result, differences = None, []
    for number in range(3):
        if number == first:
            before, random = spoiled.state()[:2], torch.get_rng_state()
            result = spoiled.step(10, plant)
            if spoiled.state()[:2] != before:
                differences.append("the bad step moved something")
            torch.set_rng_state(random)  # the bad step drew dropout as well
        random = torch.get_rng_state()
        loss = spoiled.step(number).loss
        torch.set_rng_state(random)
        if clean.step(number).loss != loss:
            differences.append(f"loss of step {number}")
    if spoiled.state() != clean.state():
        differences.append("state")
    return result.nonfinite, differences


FORWARD = f"the loss is not finite, first in the output of {PLANTED} (MLP) in the forward pass on rank 1"
BATCH = "the loss is not finite, first in the batch itself on rank 1"
BACKWARD = (
    f"the gradient is not finite, first in the gradient at the input of {PLANTED} (MLP) in the backward pass on rank 1"
)


@pytest.mark.parametrize(
    "stage, plant, layout, words",
    [
        pytest.param(0, "backward", {}, BACKWARD, marks=pytest.mark.matrix),
        pytest.param(0, "first backward", dict(accumulate=2), BACKWARD, marks=pytest.mark.matrix),
        pytest.param(1, "first backward", dict(accumulate=2), BACKWARD, marks=pytest.mark.matrix),
        (2, "first backward", dict(accumulate=2, bf16=True), BACKWARD),
        pytest.param(3, "first backward", dict(accumulate=2), BACKWARD, marks=pytest.mark.matrix),
        pytest.param(2, "first batch", dict(accumulate=2), BATCH, marks=pytest.mark.matrix),
        pytest.param(1, "batch", dict(bf16=True), BATCH, marks=pytest.mark.matrix),
        pytest.param(2, "forward", dict(accumulate=2), FORWARD, marks=pytest.mark.matrix),
        pytest.param(3, "backward", dict(checkpoint=True), BACKWARD, marks=pytest.mark.matrix),
        pytest.param(2, "backward", dict(model_parallel=2), BACKWARD, marks=pytest.mark.matrix),
        pytest.param(2, "backward", dict(offload=True), BACKWARD, marks=pytest.mark.matrix),
        pytest.param(3, "backward", dict(offload=True, accumulate=2), BACKWARD, marks=pytest.mark.matrix),
    ],
)
def test_a_bad_step_on_one_rank_moves_nothing_on_any_and_is_named(stage, plant, layout, words):
    for first in (0, 2) if stage == 2 else (1,):
        (nonfinite, differences), (other, more) = run_ranks(skip_among_steps, 2, stage, plant, first, **layout)
        assert nonfinite == other == words
        assert differences == more == []


def name_a_spoiled_adapter():
    run = Run(0)
    name, adapter = list(adapters_of(run.engine.module).items())[3]
    with torch.no_grad():
        adapter.B[0, 0] = float("nan")
    return name, run.step(0).nonfinite


def test_the_layer_of_a_spoiled_adapter_is_named():
    ((name, nonfinite),) = run_ranks(name_a_spoiled_adapter, 1)
    assert nonfinite.startswith(f"the loss is not finite, first in the output of {name} (")


LARGEST = {kind: torch.finfo(kind).max for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def engine_with(*gradients):
    """As far as `nonfinite_gradients` looks at one, with two groups of parameters."""
    optimizer = SimpleNamespace(averaged_gradients={0: list(gradients[:1]), 1: list(gradients[1:]), 2: None})
    return SimpleNamespace(optimizer=optimizer, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", LARGEST, ids=str)
def test_finite_is_told_from_not_finite_exactly_and_nothing_is_changed(kind):
    """The sum of squares of such values is infinite in every dtype, and so is the sum of any two."""
    smallest, largest = torch.finfo(kind).smallest_normal, LARGEST[kind]
    finite = torch.tensor([largest, -largest, smallest, -smallest, 0.0, -0.0] * 50, dtype=kind)
    others = torch.ones(3, 4, dtype=torch.float32), torch.zeros(0, 4), torch.full((2, 3), 1e38).t()
    before = finite.clone()
    assert nonfinite_gradients(engine_with(finite, *others)).item() == 0.0
    assert torch.equal(finite.view(torch.uint8), before.view(torch.uint8))
    assert nonfinite_gradients(engine_with()).item() == 0.0
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 150, 299):
            spoiled = finite.clone()
            spoiled[place] = value
            assert nonfinite_gradients(engine_with(*others, spoiled)).item() == 1.0
    bad = torch.full((2,), float("nan"))
    assert nonfinite_gradients(engine_with(bad, bad.double(), finite, bad)).item() == 1.0

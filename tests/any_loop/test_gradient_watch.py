"""GradientWatch between backward and step of plain loops: what it says of planted gradients, at every ZeRO stage."""

import pytest
import torch

from sat_lora import ConfigError, GradientWatch, TrainingError, add_lora
from tests.support.plain_loops import LORA, adapted, batch_of, loss_of, plain_engine, steps
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model

STAGES = [0, 2, *(pytest.param(stage, marks=pytest.mark.matrix) for stage in (1, 3))]
DETACHED = "mlp/gate_proj/1"


def planted(model, world, fault):
    """The fault, from its first pass on: with what the watch has to say of it, as (code, ranks, part of a name)."""
    layer = model.transformer.layers[1].mlp
    if fault == "NaN":
        if world.rank == world.size - 1:
            layer.register_forward_hook(lambda module, args, output: output * float("nan"))
        return ("not-finite", (world.size - 1,), "")
    if fault == "missing":
        layer.register_forward_hook(lambda module, args, output: output.detach())
        return ("unreachable", (), DETACHED)
    if fault == "missing on one":
        if world.rank == 1:
            layer.register_forward_hook(lambda module, args, output: output.detach())
        return ("gradient-missing", (1,), DETACHED)
    return None


def looks(stage, fault, *, before=True):
    """What the watch finds in two steps: a healthy one, and one with the fault. before: made before the engine."""
    model, world = adapted()
    watch = GradientWatch(model) if before else None
    engine = plain_engine(model, stage)
    watch = watch or GradientWatch(engine)
    found = []
    steps(engine, world.rank, 1, after_backward=lambda step: found.append(watch.findings()))
    expected = planted(model, world, fault)
    engine.backward(loss_of(engine, batch_of(2, world.rank)))
    found.append(watch.findings())
    return [[(f.code, f.ranks, f.parameter) for f in findings] for findings in found], expected


def closed(stage):
    model, _ = adapted()
    engine = plain_engine(model, stage)
    engine.destroy()
    try:
        GradientWatch(engine)
    except ConfigError as error:
        return str(error)


def looks_at_faults(stage):
    """What is found of each fault, and what a watch on a closed engine is told."""
    outcomes = {fault: looks(stage, fault, before=fault != "missing") for fault in ("NaN", "missing")}
    if stage == 0:  # at others ranks that differ wait for each other in backward
        outcomes["missing on one"] = looks(stage, "missing on one")
    return outcomes, closed(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_planted_faults_are_named_with_their_ranks_and_a_healthy_step_gives_nothing(stage):
    for outcomes, of_closed in run_ranks(looks_at_faults, 2, stage):
        for fault, (found, (code, ranks, part)) in outcomes.items():
            healthy, (finding,) = found
            assert healthy == [] and finding[0] == code, fault
            if fault != "missing":
                assert finding[1] == ranks, fault
            if fault != "missing on one":
                assert part in finding[2] and finding[2].endswith((".A", ".B")), fault
        if stage > 0:  # a closed engine at stage 0 goes on working
            assert of_closed.startswith("GradientWatch: the engine has been closed (engine.destroy())")


@pytest.fixture
def model(single_process_group):
    model = tiny_model().train()
    add_lora(model, LORA)
    return model


def test_a_plain_loop_is_checked_step_by_step(model):
    watch = GradientWatch(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        loss_of(model, batch_of(step)).backward()
        loss_of(model, batch_of(step + 5)).backward()  # accumulated
        watch.check()
        optimizer.step()
        optimizer.zero_grad()
    (loss_of(model, batch_of(3)) * float("inf")).backward()
    with pytest.raises(TrainingError, match="error: not-finite\n.*the gradient of .* holds a NaN or infinity"):
        watch.check()


def test_gradients_whose_sum_alone_is_not_finite_are_found(model):
    engine = plain_engine(model, 0)
    watch = GradientWatch(engine)
    largest = torch.finfo(torch.float32).max
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def overflow(parameter):
        parameter.grad.fill_(largest).mul_(4)

    parameter.register_post_accumulate_grad_hook(overflow)
    engine.backward(loss_of(engine, batch_of(1)))
    (finding,) = watch.findings()
    assert finding.code == "not-finite" and "their sum over micro-batches and ranks is not" in finding.seen


def test_the_hooks_are_gone_after_the_block(model):
    before = [len(p._backward_hooks or ()) for p in model.parameters()]
    with GradientWatch(model) as watch, GradientWatch(model):
        assert [len(p._backward_hooks or ()) for p in model.parameters()] != before
    watch.close()
    assert [len(p._backward_hooks or ()) for p in model.parameters()] == before
    with pytest.raises(ConfigError, match="it is closed; make another"):
        watch.check()


def test_a_look_without_a_backward_pass_and_a_second_one_are_mistakes(model):
    watch = GradientWatch(model)
    with pytest.raises(ConfigError, match="no gradient has come since the last look; call it once after backward"):
        watch.findings()
    loss_of(model, batch_of(1)).backward()
    assert watch.findings() == []
    with pytest.raises(ConfigError, match="no gradient has come"):
        watch.check()


def test_made_before_add_lora_it_says_where_it_belongs(single_process_group):
    model = tiny_model().train()
    watch = GradientWatch(model)
    add_lora(model, LORA)
    loss_of(model, batch_of(1)).backward()
    with pytest.raises(ConfigError, match="other parameters train now .* make it after add_lora"):
        watch.check()


@pytest.mark.parametrize("thing", [None, "model", {}, (torch.nn.Linear(1, 1), None), 3, torch.nn.Linear])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(ConfigError, match="GradientWatch: got a .* for the model; give the model itself"):
        GradientWatch(thing)


def test_a_model_of_which_nothing_trains_is_refused():
    with pytest.raises(ConfigError, match="nothing of the Linear trains; call add_lora"):
        GradientWatch(torch.nn.Linear(2, 2).requires_grad_(False))

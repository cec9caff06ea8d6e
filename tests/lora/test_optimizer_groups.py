"""LoRA+: the groups of an optimizer, and that B moves at its own rate under every ZeRO stage."""

import importlib
import pkgutil

import pytest
import torch

import sat_lora
from sat_lora import ConfigError, LoraConfig, LoraMixin, add_lora, parameter_groups
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.optimizer_groups import set_learning_rate
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from tests.support.ranks import run_ranks
from tests.support.tiny import fill_adapters, logits_of, tiny_model
from tests.support.training_runs import (
    adapter_values,
    engine_config,
    joined,
    mixed_batch,
    step_together,
    worst_error,
)

pytestmark = pytest.mark.usefixtures("single_process_group")

STAGES = [*(pytest.param(stage, marks=pytest.mark.matrix) for stage in (0, 1)), 2, 3]


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_ratio_of_one_is_one_group_in_the_order_of_the_model():
    model = tiny_model()
    add_lora(model, LoraConfig(r=4))
    (group,) = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert names_of(model, group) == trainable(model)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)


def test_b_of_every_adapter_has_the_ratio_and_everything_else_the_rate():
    model = tiny_model()
    add_lora(model, LoraConfig(r=4, lr_ratio=16.0))
    model.transformer.word_embeddings.weight.requires_grad_(True)
    slow, fast = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert (slow["lr"], fast["lr"]) == (1e-3, pytest.approx(1.6e-2))
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    b = {id(adapter.B) for adapter in adapters_of(model).values()}
    assert {id(parameter) for parameter in fast["params"]} == b
    assert names_of(model, fast) == [n for n in trainable(model) if n.endswith(".B")]
    assert names_of(model, slow) == [n for n in trainable(model) if not n.endswith(".B")]
    assert "transformer.word_embeddings.weight" in names_of(model, slow)


def test_each_mixin_has_its_own_ratio():
    model = tiny_model()
    vit = model.mixins["eva"].vit_model
    vit.add_mixin("lora", LoraMixin(vit, LoraConfig(r=4, lr_ratio=2.0)))
    model.add_mixin("lora", LoraMixin(model, LoraConfig(r=4, lr_ratio=8.0)))
    groups = parameter_groups(model, lr=1.0)
    assert sorted(group["lr"] for group in groups) == [1.0, 2.0, 8.0]
    for group in groups:
        in_vit = {".vit_model." in name for name in names_of(model, group)}
        assert in_vit == {1.0: {True, False}, 2.0: {True}, 8.0: {False}}[group["lr"]]


def test_no_group_is_empty():
    model = tiny_model()
    add_lora(model, LoraConfig(r=4, lr_ratio=4.0))
    for adapter in adapters_of(model).values():
        adapter.A.requires_grad_(False)
    (group,) = parameter_groups(model, lr=1.0)
    assert group["lr"] == 4.0 and all(name.endswith(".B") for name in names_of(model, group))
    for adapter in adapters_of(model).values():
        adapter.B.requires_grad_(False)
    with pytest.raises(ConfigError, match="parameter_groups: nothing of the CogVLMModel trains"):
        parameter_groups(model, lr=1.0)


def test_a_model_without_adapters_has_no_groups():
    with pytest.raises(ConfigError, match="has no LoRA mixin, and \\d+ parameters of its base train; call add_lora"):
        parameter_groups(tiny_model(), lr=1.0)


def test_schedules_keep_the_ratio():
    model = tiny_model()
    add_lora(model, LoraConfig(r=4, lr_ratio=16.0))
    optimizer = adapter_optimizer(model, lr=1e-3)
    set_learning_rate(optimizer.param_groups, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0]
    optimizer = adapter_optimizer(model, lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 8e-3])


def test_a_public_name_stays_itself_whatever_has_been_imported():
    """Importing a module `sat_lora.x` would put it in the place of a public name `x`."""
    for module in pkgutil.iter_modules(sat_lora.__path__):
        importlib.import_module(f"sat_lora.{module.name}")
    assert callable(sat_lora.parameter_groups)
    assert not {module.name for module in pkgutil.iter_modules(sat_lora.__path__)} & set(sat_lora.__all__)


RATES = (1e-3, 2e-3, 5e-4)  # as a schedule would have them


def adapted_model(ratio, dtype=torch.float32):
    model = tiny_model(dtype)
    add_lora(model, LoraConfig(r=4, lora_alpha=8, lr_ratio=ratio))
    fill_adapters(model, std=0.1)
    model.train()
    return model


def sgd_steps_on_a_rank(stage):
    """What one plain SGD step takes from A and B, at the ratios 1 and 8."""
    world, steps = init_model_parallel(init_distributed()), []
    for ratio in (1.0, 8.0):
        model = adapted_model(ratio)
        before = adapter_values(model)
        optimizer = torch.optim.SGD(parameter_groups(model, lr=1.0))
        engine = start_engine(model, optimizer, engine_config(stage, 2))
        step_together(engine, [mixed_batch(world.rank)], world)
        steps.append({name: value - before[name] for name, value in adapter_values(engine.module).items()})
    return steps


def test_a_rate_is_set_times_the_ratio_of_each_group():
    groups = [{"lr_ratio": 16.0}, {"lr_ratio": 1.0}, {"lr": 5.0}]
    set_learning_rate(groups, 0.5)
    assert [group["lr"] for group in groups] == [8.0, 0.5, 0.5]


def test_groups_come_with_the_rate_first_and_none_is_empty():
    model = tiny_model()
    add_lora(model, LoraConfig(r=4, lr_ratio=2.0, freeze_a=True))
    (fast,) = parameter_groups(model, lr=1e-3)
    assert (fast["lr"], fast["lr_ratio"], fast["weight_decay"]) == (2e-3, 2.0, 0.0)
    model.mixins["lm"].lm_head.weight.requires_grad_(True)
    assert [group["lr_ratio"] for group in parameter_groups(model, lr=1e-3)] == [1.0, 2.0]


@pytest.mark.parametrize("stage", STAGES)
def test_b_moves_ratio_times_as_far_and_a_as_before(stage):
    (plain, fast), (_, other) = run_ranks(sgd_steps_on_a_rank, 2, stage)
    for leaf in ("lora_A", "lora_B"):  # but not all: no answer depends on the last layer's vision experts
        assert max(abs(step).max() for name, step in plain.items() if name.endswith(leaf)) > 1e-3
    expected = {name: step * (8 if name.endswith("lora_B") else 1) for name, step in plain.items()}
    # Values are near 0.1: in float32 their differences are not known better than this.
    assert all(abs(fast[name] - expected[name]).max() < 1e-6 for name in expected)
    assert worst_error(other, fast) == 0


def adam_on_a_rank(stage, clip):
    world = init_model_parallel(init_distributed())
    model = adapted_model(8.0)
    engine = start_engine(model, adapter_optimizer(model, lr=1.0), engine_config(stage, 2, clip=clip))
    for step, rate in enumerate(RATES):
        set_learning_rate(engine.optimizer.param_groups, rate)
        step_together(engine, [mixed_batch(world.rank, step)], world)
    return adapter_values(engine.module)


def adam_alone(clip):
    """The same in one process on the joined batch, in plain PyTorch."""
    init_model_parallel(init_distributed())
    model = adapted_model(8.0)
    pairs = adapters_of(model).values()
    slow, fast = [a.A for a in pairs], [a.B for a in pairs]
    optimizer = torch.optim.AdamW([{"params": slow}, {"params": fast}], lr=1.0, weight_decay=0.0)
    for step, rate in enumerate(RATES):
        for group, ratio in zip(optimizer.param_groups, (1, 8)):
            group["lr"] = rate * ratio
        batch = joined([mixed_batch(rank, step) for rank in range(2)])
        logits = logits_of(model, batch)[:, :-1].flatten(0, 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_([*slow, *fast], clip)
        optimizer.step()
    return adapter_values(model)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_plain_adamw_with_the_same_groups_rates_and_clipping(stage):
    values, other = run_ranks(adam_on_a_rank, 2, stage, 0.5)
    (expected,) = run_ranks(adam_alone, 1, 0.5)
    assert worst_error(values, expected) < 1e-3
    assert worst_error(other, values) == 0


def bfloat16_steps(stage):
    """How far Adam's first step, of one rate per parameter, takes most values of A and of B."""
    world = init_model_parallel(init_distributed())
    model = adapted_model(8.0, torch.bfloat16)
    before = adapter_values(model)
    engine = start_engine(model, adapter_optimizer(model, lr=1.0), engine_config(stage, 2, bf16=True))
    set_learning_rate(engine.optimizer.param_groups, 0.01)
    step_together(engine, [mixed_batch(world.rank)], world)
    steps = {name: torch.from_numpy(abs(value - before[name])) for name, value in adapter_values(engine.module).items()}
    return [float(torch.cat([s.flatten() for n, s in steps.items() if n.endswith(leaf)]).median()) for leaf in "AB"]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.matrix), 3])
def test_bfloat16_training_keeps_the_ratio(stage):
    for a, b in run_ranks(bfloat16_steps, 2, stage):
        assert 0.005 < a < 0.011 and b == pytest.approx(8 * a, rel=0.05)

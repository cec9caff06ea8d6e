"""`examine`, `save_adapter`, `load_adapter`, `parameter_groups` and `estimate` under a plain `deepspeed.initialize`."""

import json

import pytest
import torch

from sat_lora import (
    AdapterError,
    ConfigError,
    add_lora,
    estimate,
    examine,
    load_adapter,
    parameter_groups,
    save_adapter,
)
from sat_lora.adapters.read import read_adapter
from sat_lora.lora.apply import adapters_of
from tests.support.plain_loops import LORA, adapted, batch_of, loss_of, plain_engine, steps
from tests.support.ranks import run_ranks
from tests.support.tiny import fill_adapters, tiny_batch, tiny_model


def stages(*quick):
    return [stage if stage in quick else pytest.param(stage, marks=pytest.mark.matrix) for stage in range(4)]


# examine


def examined(stage, fault):
    """What `examine` finds on an engine, and whether the engine trains afterwards as if nobody had looked."""
    model, world = adapted()
    engine = plain_engine(model, stage)
    batches = {"images": batch_of(1, world.rank), "text": tiny_batch((False, False), seed=world.rank)}
    if fault == "NaN":
        model.transformer.layers[1].mlp.register_forward_hook(lambda module, args, output: output * float("nan"))
    if fault == "missing":
        model.transformer.layers[1].mlp.register_forward_hook(lambda module, args, output: output.detach())
    findings = examine(engine, batches, loss_of)
    counts = engine.global_steps, engine.micro_steps
    losses = steps(engine, world.rank) if fault is None else None
    return [(finding.code, finding.parameter or finding.module) for finding in findings], counts, losses


def trained(stage):
    model, world = adapted()
    return steps(plain_engine(model, stage), world.rank)


def trained_and_examined(stage):
    return trained(stage), examined(stage, None)


@pytest.mark.parametrize("stage", stages(2))
def test_a_healthy_engine_gives_no_finding_and_trains_as_if_nobody_had_looked(stage):
    for alone, (findings, counts, losses) in run_ranks(trained_and_examined, 2, stage):
        assert (findings, counts) == ([], (0, 0))
        assert losses == pytest.approx(alone, rel=1e-6)


FAULTS = {"NaN": "not-finite", "missing": "unreachable"}


def faults_examined(stage):
    return {fault: examined(stage, fault)[0] for fault in FAULTS}


@pytest.mark.parametrize("stage", stages(0))
def test_a_planted_fault_is_found_in_an_engine(stage):
    for outcomes in run_ranks(faults_examined, 2, stage):
        for fault, code in FAULTS.items():
            assert code in {found for found, _ in outcomes[fault]}, fault


def test_a_wrong_placement_is_found_before_there_is_an_engine(model):
    next(iter(adapters_of(model).values())).bfloat16()  # a part that was converted alone
    findings = examine(model, [batch_of(1)], loss_of)
    assert "dtype-or-device" in {finding.code for finding in findings}
    assert "torch.bfloat16" in next(str(finding) for finding in findings if finding.code == "dtype-or-device")


def refusal_of(attempt):
    try:
        attempt()
    except ConfigError as error:
        return str(error)


def mistakes():
    """What `examine` says on each of two ranks to batches that differ, and what is said to an engine's model."""
    model, world = adapted()
    empty = refusal_of(lambda: examine(model, {"images": batch_of(1)} if world.rank else {}, loss_of))
    kinds = refusal_of(lambda: examine(model, {f"kind {world.rank}": batch_of(1)}, loss_of))
    engine = plain_engine(model, 1, accumulate=2)
    return [
        empty,
        kinds,
        refusal_of(lambda: examine(model, [batch_of(1)], loss_of)),
        refusal_of(lambda: examine(engine, [batch_of(1)], loss_of)),
        refusal_of(lambda: add_lora(engine, LORA, name="second")),
        refusal_of(lambda: parameter_groups(model, lr=1e-3)),
    ]


def test_mistakes_of_any_rank_are_told_on_all():
    first, second = run_ranks(mistakes, 2)
    assert first == second
    empty, kinds, of_engine, accumulating, adding, groups = first
    assert empty == "examine: there are no batches; give at least one of each kind that a run may meet"
    assert kinds.endswith("every rank needs the same kinds of batches, and rank 0 has kind 0; rank 1 has kind 1")
    assert "the model is in DeepSpeed's engine" in of_engine and "give the engine in place of the model" in of_engine
    assert "accumulates 2 micro-batches" in accumulating and "before deepspeed.initialize" in accumulating
    assert "before deepspeed.initialize" in adding
    assert groups.startswith("parameter_groups: the model is in DeepSpeed's engine already")


@pytest.fixture
def model(single_process_group):
    model = tiny_model().train()
    add_lora(model, LORA)
    return model


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "there are no batches"),
        ({}, "there are no batches"),
        (None, "got a NoneType for the batches"),
        (iter([1]), "got a list_iterator for the batches; give them by kind"),
        (torch.zeros(2), "got a Tensor for the batches"),
        (tiny_batch((True, False)), "the batches are one batch, with input_ids, .* give it by its kind"),
    ],
)
def test_what_are_no_batches_is_refused(model, batches, message):
    with pytest.raises(ConfigError, match=f"^examine: {message}"):
        examine(model, batches, loss_of)


@pytest.mark.parametrize("loss", [None, 1.0, torch.zeros(3), [torch.zeros(())]])
def test_what_is_no_loss_is_refused(model, loss):
    with pytest.raises(ConfigError, match="loss_of returned a .*; wanted the loss, a tensor with one number"):
        examine(model, [batch_of(1)], lambda model, batch: loss)


def test_batches_may_come_in_a_list_and_be_of_any_type(model):
    assert examine(model, [batch_of(1), batch_of(2)], loss_of) == []
    assert examine(model, {"seed": torch.tensor(1)}, lambda model, seed: loss_of(model, batch_of(int(seed)))) == []


@pytest.mark.parametrize("tool", [lambda m: examine(m, [1], loss_of), estimate, lambda m: parameter_groups(m, lr=1.0)])
def test_a_model_of_which_nothing_trains_is_refused(tool):
    with pytest.raises(ConfigError, match="nothing of the Linear trains; call add_lora"):
        tool(torch.nn.Linear(2, 2).requires_grad_(False))


# save_adapter and load_adapter


def saved_and_loaded(stage, bf16, folder):
    """The adapter's tensors of an engine that has loaded a file and made no step, and after a step without a rate."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    model, world = adapted(dtype)
    fill_adapters(model)
    engine = plain_engine(model, stage, bf16=bf16)
    steps(engine, world.rank, 2)
    save_adapter(engine, f"{folder}/trained")
    other, _ = adapted(dtype)
    engine = plain_engine(other, stage, bf16=bf16)
    steps(engine, world.rank, 2)
    load_adapter(engine, f"{folder}/trained")
    save_adapter(engine, f"{folder}/loaded")
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    steps(engine, world.rank, 1)  # the optimizer writes its own copy into the model
    save_adapter(engine, f"{folder}/stepped")
    try:
        load_adapter(other, f"{folder}/trained")
    except ConfigError as error:
        return str(error)


def saved_and_loaded_in_both(stage, folder):
    return [saved_and_loaded(stage, bf16, f"{folder}/{bf16}") for bf16 in (False, True)]


@pytest.mark.parametrize("stage", stages(2))
def test_an_engine_saves_and_loads_its_adapter_and_keeps_it_in_the_next_step(stage, tmp_path):
    for refusals in run_ranks(saved_and_loaded_in_both, 2, stage, str(tmp_path)):
        for refusal in refusals:
            assert refusal.startswith("load_adapter: the model is in DeepSpeed's engine"), refusal
            assert "give the engine" in refusal
    for bf16 in (False, True):
        files = {name: read_adapter(tmp_path / str(bf16) / name).tensors for name in ("trained", "loaded", "stepped")}
        assert {tensor.dtype for tensor in files["trained"].values()} == {torch.bfloat16 if bf16 else torch.float32}
        for name, tensor in files["trained"].items():
            assert torch.equal(files["loaded"][name], tensor), (bf16, name)
            assert torch.equal(files["stepped"][name], tensor), (bf16, name)


def test_an_engine_without_adapters_takes_none(model, tmp_path):
    save_adapter(model, tmp_path / "adapter")
    plain = tiny_model().train()
    engine = plain_engine(plain, 0, groups=[*plain.parameters()])
    with pytest.raises(ConfigError, match="add the adapters before deepspeed.initialize"):
        load_adapter(engine, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="no LoRA mixin called 'lora'; add_lora"):
        save_adapter(plain, tmp_path / "none")
    with pytest.raises(AdapterError, match="no LoRA mixin called 'second'; it has 'lora': give name="):
        save_adapter(model, tmp_path / "none", name="second")
    with pytest.raises(ConfigError, match="save_adapter: got a str for the model"):
        save_adapter("model", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# estimate


def test_the_estimate_of_a_model_at_hand_is_what_its_parts_take(model):
    frozen = sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    trained_bytes = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    memory = estimate(model, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}, data_parallel_size=4)
    assert (memory.weights, memory.adapters) == (frozen + buffers, trained_bytes)
    assert (memory.gradients, memory.optimizer) == (trained_bytes / 4, 3 * trained_bytes / 4)
    assert estimate(model).optimizer == 2 * trained_bytes  # a plain loop with AdamW
    before = {name: p.grad for name, p in model.named_parameters()}
    measured = estimate(model, step=lambda: loss_of(model, batch_of(1)).backward())
    assert measured.activations > 100_000 and all(p.grad is before[n] for n, p in model.named_parameters())
    table = str(measured).split("\n")
    assert table[0] == "memory in MiB at the peak of a step" and table[1].split()[-2:] == ["in", "all"]


def test_an_estimate_needs_no_weights():
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, device="meta"))
    assert estimate(model, {"zero_optimization": {"stage": 3}}, data_parallel_size=2).gradients > 0
    with pytest.raises(ConfigError, match="a model on meta cannot take a step; leave step out"):
        estimate(model, step=lambda: None)


def test_the_config_of_deepspeed_may_be_a_file(model, tmp_path):
    content = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    (tmp_path / "zero.json").write_text(json.dumps(content))
    assert estimate(model, tmp_path / "zero.json") == estimate(model, content)


@pytest.mark.parametrize(
    "engine, message",
    [
        ("no/such.json", "no/such.json cannot be read as DeepSpeed's config"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; wanted 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto'"),
        ({"zero_optimization": 2}, "zero_optimization is 2; wanted an object"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto"'),
        ([1], "DeepSpeed's config is a list; wanted an object or its file"),
    ],
)
def test_what_is_no_config_is_refused(model, engine, message):
    with pytest.raises(ConfigError, match=f"^estimate: .*{message}"):
        estimate(model, engine)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "2"])
def test_a_number_of_ranks_that_is_none_is_refused(model, size):
    with pytest.raises(ConfigError, match="data_parallel_size is .*; wanted a whole number above 0"):
        estimate(model, data_parallel_size=size)

"""A run that goes on from a checkpoint is the run that was never cut, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sat_lora import LoraConfig, add_lora
from sat_lora.errors import CheckpointError
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.checkpoint import STATE, TENSORS, RunState, load_checkpoint
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.optimizer_state import create_moments, optimizer_tensors
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config, mixed_batch, save_now, step_together

STEPS, CUTS = 6, (1, 2, 3, 4, 5)


def fresh_engine(world, model_parallel, stage, bf16, accumulate=1):
    """Dropout, a trained base parameter and two learning rates, on every kind of adapter."""
    model = tiny_model(torch.bfloat16 if bf16 else torch.float32, model_parallel_size=model_parallel)
    add_lora(model, LoraConfig(r=4, lora_dropout=0.2, lr_ratio=4, modules_to_save=["boi"], use_dora=True))
    model.train()
    engine = start_engine(model, adapter_optimizer(model, lr=1e-2), engine_config(stage, 2, accumulate, 1.0, bf16))
    create_moments(engine)
    torch.manual_seed(world.data_parallel_rank)
    return engine


def losses_from(engine, world, first, accumulate, then=lambda step: None):
    losses = []
    for step in range(first, STEPS):
        rank = world.data_parallel_rank
        batches = [mixed_batch(rank, accumulate * step + number) for number in range(accumulate)]
        losses.append(step_together(engine, batches, world))
        then(step + 1)
    return losses


def state_of(engine):
    """Masters and moments, and the parameters themselves, as bytes."""
    return {name: tensor.float().cpu().numpy().tobytes() for name, tensor in optimizer_tensors(engine)}


def cut_everywhere(folder, model_parallel, stage, bf16, accumulate, cuts):
    """Differences between a run of STEPS steps and its continuations from the checkpoint after each of `cuts`."""
    world = init_model_parallel(init_distributed(), model_parallel)
    whole, differences = fresh_engine(world, model_parallel, stage, bf16, accumulate), []

    def save(step):
        save_now(whole, Path(folder) / str(step), RunState(step=step, best_loss=1 / 3), world, samples=4)

    losses = losses_from(whole, world, 0, accumulate, save)
    expected, random = state_of(whole), torch.get_rng_state()
    for cut in cuts:
        engine = fresh_engine(world, model_parallel, stage, bf16, accumulate)
        state = load_checkpoint(engine, Path(folder) / str(cut), world)
        if state != RunState(step=cut, best_loss=1 / 3):
            differences.append(f"cut {cut}: {state}")
        if losses_from(engine, world, cut, accumulate) != losses[cut:]:
            differences.append(f"cut {cut}: losses")
        differences += [f"cut {cut}: {name}" for name, value in state_of(engine).items() if value != expected[name]]
        if not torch.equal(torch.get_rng_state(), random):
            differences.append(f"cut {cut}: random state")
    return len(expected), losses[0] != losses[-1], differences


QUICK = [((2, 1, 1, True, 1), (1, 4)), ((2, 2, 3, False, 1), (4,))]
ALL = [
    (ranks, model_parallel, stage, bf16, accumulate)
    for ranks, model_parallel in ((1, 1), (2, 1), (2, 2))
    for stage in range(4)
    for bf16 in (False, True)
    for accumulate in (1, 2)
]


def check_cuts(folder, case, cuts):
    ranks, *layout = case
    for tensors, moved, differences in run_ranks(cut_everywhere, ranks, str(folder), *layout, cuts):
        assert tensors > 30 and moved
        assert differences == []


@pytest.mark.parametrize("case, cuts", QUICK)
def test_a_cut_run_continues_bit_for_bit(case, cuts, tmp_path):
    check_cuts(tmp_path, case, cuts)


@pytest.mark.matrix
@pytest.mark.parametrize("case", ALL)
def test_a_run_cut_anywhere_continues_bit_for_bit_in_every_layout(case, tmp_path):
    check_cuts(tmp_path, case, CUTS)


def save_after_steps(folder, model_parallel, stage, bf16):
    world = init_model_parallel(init_distributed(), model_parallel)
    engine = fresh_engine(world, model_parallel, stage, bf16)
    losses_from(engine, world, STEPS - 2, 1)
    save_now(engine, Path(folder), RunState(step=2), world, samples=4)


def state_read_by(folder, model_parallel, stage, bf16):
    world = init_model_parallel(init_distributed(), model_parallel)
    engine = fresh_engine(world, model_parallel, stage, bf16)
    before = torch.get_rng_state()
    load_checkpoint(engine, Path(folder), world)
    return state_of(engine), torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_loads_in_every_other_layout(tmp_path):
    run_ranks(save_after_steps, 2, str(tmp_path), 1, 3, False)
    stored = {name: t.numpy().tobytes() for name, t in load_file(tmp_path / "2" / TENSORS).items()}
    for ranks, model_parallel, stage in ((1, 1, 0), (2, 2, 1), (2, 1, 2)):
        for values, seeds_kept in run_ranks(state_read_by, ranks, str(tmp_path), model_parallel, stage, False):
            assert values == stored
            assert seeds_kept == (model_parallel == 2 or ranks == 1)


def refusals(folder):
    """Messages for a missing, a torn and an unfit checkpoint; and whether the model stayed as it was."""
    world = init_model_parallel(init_distributed())
    engine, messages = fresh_engine(world, 1, 2, False), []
    before = state_of(engine)

    def refuse(path):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(engine, path, world)
        messages.append(str(error.value))

    refuse(Path(folder) / "nowhere")
    save_now(engine, Path(folder), RunState(step=3), world, samples=2)
    other = tiny_model()
    add_lora(other, LoraConfig(r=2))
    unfit = start_engine(other.train(), adapter_optimizer(other, lr=1e-2), engine_config(2, 2))
    create_moments(unfit)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(unfit, Path(folder), world)
    (Path(folder) / "3" / TENSORS).write_bytes(b"torn")
    refuse(Path(folder))
    (Path(folder) / "3" / STATE).write_text("{")
    refuse(Path(folder))
    return messages, state_of(engine) == before


def test_what_cannot_be_read_is_named_and_changes_nothing(tmp_path):
    (((missing, torn, unreadable), unchanged),) = run_ranks(refusals, 1, str(tmp_path))
    assert "nowhere holds no checkpoint" in missing
    assert f"{TENSORS}: cannot be read" in torn
    assert f"{STATE}: cannot be read" in unreadable
    assert unchanged


def save_once(folder):
    world = init_model_parallel(init_distributed())
    save_now(fresh_engine(world, 1, 0, False), Path(folder), RunState(step=2), world, samples=2)


def test_no_pickle_is_in_it(tmp_path):
    run_ranks(save_once, 1, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "latest"]
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == [TENSORS, STATE]
    assert json.loads((tmp_path / "2" / STATE).read_text())["samples_per_step"] == 2

"""Weights that ZeRO-3 partitions as they load: every rank its own part, and training as if they had come whole."""

import pytest

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, map_weights, save_weights, shardings_of
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.sharding import model_parallel_layout
from sat_lora.training.steps.engine import adapter_optimizer, set_up_deepspeed, start_engine
from tests.support.ranks import run_ranks
from tests.support.tiny import CONFIG, fill_adapters, tiny_model
from tests.support.training_runs import adapter_values, engine_config, mixed_batch, step_together, worst_error

WEIGHTS = "release/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, single_process_group):
    folder = tmp_path_factory.mktemp("base")
    save_weights(folder, CONFIG, tiny_model().state_dict())
    return str(folder)


def partitioned(folder, model_parallel, threshold=0):
    world = init_model_parallel(init_distributed(), model_parallel)
    set_up_deepspeed()
    config = engine_config(3, 2)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    model, _ = load_cogvlm(folder, model_parallel_size=model_parallel, zero_config=config)
    return model, config, world


def partitions_of(folder, model_parallel):
    """The worst that a partition differs from the same piece of the file, and the elements held against all."""
    model, _, world = partitioned(folder, model_parallel)
    state, shardings, layout = map_weights(f"{folder}/{WEIGHTS}"), shardings_of(model), model_parallel_layout()
    worst, held, whole = 0.0, 0, 0
    for name, parameter in model.named_parameters():
        local = shardings[name].shard(state[name], *layout).flatten()
        piece = local.chunk(world.data_parallel_size)  # of equal length but for the last
        length = len(parameter.ds_tensor)
        own = local[length * world.data_parallel_rank : length * (world.data_parallel_rank + 1)]
        assert parameter.numel() == 0 and parameter.ds_shape == shardings[name].shard(state[name], *layout).shape
        assert len(piece[0]) == length
        worst = max(worst, (parameter.ds_tensor[: len(own)] - own).abs().max().item())
        held, whole = held + length, whole + local.numel()
    return worst, held / whole


@pytest.mark.parametrize("model_parallel, share", [(1, 1 / 2), (2, 1)])
def test_a_rank_holds_its_partition_of_the_file_and_nothing_else(folder, model_parallel, share):
    for worst, held in run_ranks(partitions_of, 2, folder, model_parallel):
        assert worst == 0
        assert held == pytest.approx(share, rel=1e-3)


def train(folder, model_parallel, partition, config=None, threshold=0):
    if partition:
        model, engine_settings, world = partitioned(folder, model_parallel, threshold)
    else:
        world = init_model_parallel(init_distributed(), model_parallel)
        model, _ = load_cogvlm(folder, model_parallel_size=model_parallel)
        engine_settings = engine_config(3, 2)
    add_lora(model, config or LoraConfig(r=4, lora_alpha=8))
    if config is None:
        fill_adapters(model, std=0.1)
    model.train()
    engine = start_engine(model, adapter_optimizer(model, lr=1e-2), engine_settings)
    losses = [step_together(engine, [mixed_batch(world.data_parallel_rank, step)], world) for step in range(3)]
    return losses, adapter_values(engine.module)


@pytest.mark.parametrize(
    "model_parallel, threshold",
    [(2, 0), *(pytest.param(1, threshold, marks=pytest.mark.matrix) for threshold in (0, 100_000))],
)
def test_training_is_that_of_weights_that_came_whole(folder, model_parallel, threshold):
    (losses, values), _ = run_ranks(train, 2, folder, model_parallel, True, threshold=threshold)
    (expected_losses, expected), _ = run_ranks(train, 2, folder, model_parallel, False)
    assert losses == expected_losses
    assert worst_error(values, expected) == 0


@pytest.mark.matrix
def test_an_initialisation_that_reads_the_weight_reads_it_whole(folder):
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", use_dora=True)
    (losses, values), _ = run_ranks(train, 2, folder, 1, True, config=config)
    (expected_losses, expected), _ = run_ranks(train, 2, folder, 1, False, config=config)
    assert losses == expected_losses
    assert worst_error(values, expected) == 0

"""The base of ranks that share it: known whole from their parts, and found out where one rank has another."""

import shutil

import pytest
import torch

from sat_lora import add_lora
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights
from sat_lora.errors import CheckpointError
from sat_lora.lora.live_base import identity_of_model
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.same_base import base_of_run
from sat_lora.training.steps.engine import adapter_optimizer, set_up_deepspeed, start_engine
from tests.support.configs import config_of
from tests.support.ranks import run_ranks
from tests.support.tiny import CONFIG, tiny_model
from tests.support.training_runs import engine_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory, single_process_group):
    root = tmp_path_factory.mktemp("bases")
    save_weights(root / "0", CONFIG, tiny_model().state_dict())
    shutil.copytree(root / "0", root / "1")
    shutil.copytree(root / "0", root / "same")
    state = tiny_model().state_dict()
    state["transformer.layers.1.attention.dense.weight"] += 1e-4
    save_weights(root / "1", CONFIG, state)
    return str(root)


def bases_of_a_rank(root, zero_stage, model_parallel, loads_in_parts=True):
    """(the live model's values against the file's, after a change of what trains; the error on unequal bases)."""
    world = init_model_parallel(init_distributed(), model_parallel)
    config = engine_config(zero_stage, 2)
    loads_in_parts = loads_in_parts and zero_stage == 3
    if loads_in_parts:
        set_up_deepspeed()
    model, _ = load_cogvlm(
        f"{root}/0", model_parallel_size=model_parallel, zero_config=config if loads_in_parts else None
    )
    (mixin, *_) = add_lora(model, r=2, target_modules=["attention.dense"], modules_to_save=["linear_proj", "boi"])
    engine = start_engine(model, adapter_optimizer(model, lr=1e-2), config)
    with torch.no_grad():
        for tensor in mixin.trained.tensors.values():
            getattr(tensor, "ds_tensor", tensor).add_(1)
    live, file = identity_of_model(engine.module), BaseWeights(f"{root}/0").identity
    options = config_of(from_pretrained=f"{root}/same")
    base_of_run(options)
    options = options.replaced(from_pretrained=f"{root}/{world.rank}")
    try:
        base_of_run(options)
        error = None
    except CheckpointError as unequal:
        error = str(unequal)
    return torch.equal(live.values, file.values), live.shapes == file.shapes, error


@pytest.mark.parametrize("zero_stage, model_parallel", [(1, 2), (3, 1), pytest.param(3, 2, marks=pytest.mark.matrix)])
def test_ranks_know_the_whole_base_and_the_rank_that_has_another(folders, zero_stage, model_parallel):
    for values, shapes, error in run_ranks(bases_of_a_rank, 2, folders, zero_stage, model_parallel):
        assert values and shapes
        assert "not the same base on every rank: on rank 1 other than on rank 0" in error
        assert "transformer.layers.1.attention.dense.weight" in error


@pytest.mark.matrix
def test_originals_that_were_kept_before_zero_3_cut_the_model_are_taken_whole(folders):
    for values, shapes, _ in run_ranks(bases_of_a_rank, 2, folders, 3, 1, loads_in_parts=False):
        assert values and shapes

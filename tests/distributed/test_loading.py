"""Loading on several ranks: each its own slices, whatever the checkpoint was saved at, and one error for all."""

import os
import shutil

import pytest
import torch

from benchmarks.bench_loading import load_on_a_rank, peak_growth
from benchmarks.model_folders import config_of, state_of, write_hugging_face
from sat_lora.cogvlm import build_cogvlm
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights, shardings_of, weight_files
from sat_lora.errors import SatLoraError
from sat_lora.parallel.distributed import init_distributed, init_model_parallel, run_on_all_ranks
from sat_lora.parallel.sharding import model_parallel_layout
from tests.support.ranks import run_ranks
from tests.support.sat_files import FILE, cut_by_sat, write_step
from tests.support.tiny import CONFIG, logits_of, tiny_batch, tiny_model

MB = 10**6


@pytest.fixture(scope="module")
def saved(tmp_path_factory, single_process_group):
    """The same weights saved at model-parallel size 1, 2 and 4, and as Hugging Face shards."""
    home, model = tmp_path_factory.mktemp("saved"), tiny_model()
    for size in (1, 2, 4):
        save_weights(home / f"sat_{size}", CONFIG, {})
        write_step(home / f"sat_{size}", *({"module": shard} for shard in cut_by_sat(model, size)))
    write_hugging_face(home / "hf", CONFIG, model.state_dict())
    return home


def load_each(home, model_parallel):
    """For each folder: the largest difference from the whole tensors, cut, and the logits."""
    init_model_parallel(init_distributed(), model_parallel)
    whole, found = torch.load(home / "sat_1" / "3000" / FILE.format(0))["module"], {}
    for folder in sorted(home.iterdir()):
        model, _ = load_cogvlm(folder, model_parallel_size=model_parallel)
        shardings = shardings_of(model)
        worst = max(
            (tensor - shardings[name].shard(whole[name], *model_parallel_layout())).abs().max().item()
            for name, tensor in model.state_dict().items()
        )
        with torch.no_grad():
            found[folder.name] = worst, logits_of(model.eval(), tiny_batch()).double().numpy()
    return found


@pytest.mark.parametrize("model_parallel", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_whatever_it_was_saved_at_a_checkpoint_loads_at_any_size(saved, model_parallel):
    expected = logits_of(tiny_model().eval(), tiny_batch()).detach().double().numpy()
    for found in run_ranks(load_each, model_parallel, saved, model_parallel):
        assert found.keys() == {"hf", "sat_1", "sat_2", "sat_4"}
        for worst, logits in found.values():
            assert worst == 0
            assert abs(logits - expected).max() < 1e-5 * abs(expected).max()


def error_of(home):
    """The error of loading what this rank sees: a folder of its own, as on two machines."""
    rank = int(os.environ["RANK"])
    init_model_parallel(init_distributed(), 2)
    try:
        run_on_all_ranks(load_cogvlm, home / str(rank), model_parallel_size=2)
    except SatLoraError as error:
        return type(error).__name__, str(error)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("kind", ["sat_1", "sat_2", "hf"])
def test_a_file_that_is_damaged_for_one_rank_alone_is_the_same_error_on_both(saved, tmp_path, kind):
    for rank in (0, 1):
        shutil.copytree(saved / kind, tmp_path / str(rank))
    damaged = weight_files(tmp_path / "1")[-1]
    truncate(damaged)
    first, second = run_ranks(error_of, 2, tmp_path, timeout=30)
    assert first == second
    assert first[0] == "CheckpointError" and str(damaged) in first[1]


def test_a_shape_that_does_not_fit_for_one_rank_alone_is_the_same_error_on_both(saved, tmp_path, single_process_group):
    shards = cut_by_sat(tiny_model(), 2)
    shards[1]["mixins.lm.lm_head.weight"] = torch.zeros(5, 64)
    for rank in (0, 1):
        save_weights(tmp_path / str(rank), CONFIG, {})
        write_step(tmp_path / str(rank), *({"module": shard} for shard in shards))
    first, second = run_ranks(error_of, 2, tmp_path, timeout=30)
    assert first == second
    assert "mixins.lm.lm_head.weight: shape (5, 64), the model has (512, 64) in mp_rank_01" in first[1]


ODD_HEADS = {"hidden_size": 65, "num_attention_heads": 5}


def refusals():
    init_model_parallel(init_distributed(), 2)
    found = []
    for parts, change in ((2, {"vocab_size": 1023}), (2, ODD_HEADS), (3, {}), (1, {})):
        try:
            build_cogvlm({**CONFIG, **change}, model_parallel_size=parts, device="meta")
        except SatLoraError as error:
            found.append(str(error))
    return found


def test_a_model_parallel_size_that_does_not_fit_names_the_sizes():
    for vocabulary, heads, ranks, groups in run_ranks(refusals, 2):
        assert vocabulary == (
            "model_parallel_size 2: 2 does not divide the base's vocab_size 1023; choose one that divides them all"
        )
        assert "2 does not divide the base's num_attention_heads 5" in heads
        assert "model_parallel_size 3: 2 ranks do not divide into groups of 3" in ranks
        assert "the model-parallel groups of this process are of 2; give that size" in groups


@pytest.fixture
def gigabyte(tmp_path, single_process_group):
    """Folders of at least 1 GB in bfloat16, as a SAT file and as Hugging Face shards; removed afterwards."""
    config = config_of(1)
    state = state_of(config)
    save_weights(tmp_path / "sat", config, state)
    write_hugging_face(tmp_path / "hf", config, state)
    del state
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc/self is Linux's")
def test_a_rank_holds_its_share_of_a_gigabyte_and_little_more(gigabyte):
    for kind, *layout in (("sat", 2), ("hf", 2), ("sat", 1, "ZeRO-3")):
        assert sum(file.stat().st_size for file in weight_files(gigabyte / kind)) >= 1000 * MB
        for found in run_ranks(load_on_a_rank, 2, str(gigabyte / kind), *layout):
            assert found["own"] < 700 * MB
            assert found["peak"] <= found["own"] + 300 * MB


@pytest.mark.matrix
@pytest.mark.parametrize(("scheme", "most"), [("nf4", 550 * MB), ("int8", 800 * MB)])
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc/self is Linux's")
def test_a_gigabyte_that_is_quantised_is_never_there_whole(gigabyte, scheme, most):
    largest = 2 * 2048 * 3 * 2048  # bytes of a query_key_value in bfloat16; the experts' MLPs have less
    (found,) = run_ranks(load_on_a_rank, 1, str(gigabyte / "sat"), 1, False, scheme, timeout=300)
    assert found["own"] < most
    assert found["peak"] <= found["own"] + largest + 100 * MB


def growth_of_a_moment():
    return peak_growth(lambda: [torch.ones(100 * MB // 4)].clear())[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc/self is Linux's")
def test_the_sampling_sees_memory_that_is_held_for_a_moment():
    assert run_ranks(growth_of_a_moment, 1)[0] > 80 * MB

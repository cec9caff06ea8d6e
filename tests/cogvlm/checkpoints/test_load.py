"""A model folder in SAT's layout: what loads, and what is refused with which words."""

import os
import random
import shutil
import zipfile

import numpy
import pytest
import torch

from sat_lora import CheckpointError
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, map_weights, read_config, save_weights, weight_files
from tests.support.sat_files import FILE, cut_by_sat, write_step
from tests.support.tiny import CONFIG, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def state(single_process_group):
    return tiny_model().state_dict()


@pytest.fixture
def folder(tmp_path, state):
    save_weights(tmp_path / "base", CONFIG, state)
    return tmp_path / "base"


def assert_holds(model, state):
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


def test_what_was_saved_is_what_loads(folder, state):
    model, config = load_cogvlm(folder)
    assert_holds(model, state)
    assert config == {**CONFIG, "model_parallel_size": 1}
    batch = tiny_batch()
    assert torch.equal(logits_of(model.eval(), batch), logits_of(tiny_model().eval(), batch))


def test_the_weights_are_cast_to_the_dtype_asked_for(folder, state):
    model, _ = load_cogvlm(folder, dtype=torch.bfloat16)
    assert_holds(model, {name: tensor.bfloat16() for name, tensor in state.items()})


def as_numpy_1_wrote_it(file):
    """The same checkpoint with the name under which numpy 1 pickled an array."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("/data.pkl"))
    assert b"cnumpy._core.multiarray\n_reconstruct\n" in records[pickled]
    records[pickled] = records[pickled].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("numpy_1", [False, True], ids=["numpy 2", "numpy 1"])
def test_what_sat_stores_beside_the_weights_does_not_disturb(folder, state, numpy_1):
    """`sat.training.model_io.save_ds_checkpoint` and DeepSpeed put these beside `module`."""
    content = {
        "module": state,
        "iteration": 3000,
        "client_lr_scheduler": {"warmup_iter": 20.0, "start_lr": 1e-5, "decay_style": "cosine", "num_iters": 3},
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "global_steps": 3000,
        "ds_version": "0.9.3",
        "param_shapes": [{"a": torch.Size([3, 4])}],
        "sparse_tensor_module_names": set(),
    }
    write_step(folder, content)
    if numpy_1:
        as_numpy_1_wrote_it(folder / "3000" / FILE.format(0))
    assert_holds(load_cogvlm(folder)[0], state)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["beside the weights", "in the state dict"])
def test_a_pickle_that_wants_to_run_something_is_refused_and_runs_nothing(folder, state, tmp_path, place):
    bomb = Bomb(tmp_path / "went off")
    content = {"module": state, "extra": bomb} if place == "beside the weights" else {"module": {**state, "x": bomb}}
    write_step(folder, content)
    with pytest.raises(CheckpointError, match=r"it asks for \w+\.mkdir, only tensors and random"):
        load_cogvlm(folder)
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize("cut", [2, 4])
def test_a_checkpoint_cut_for_several_ranks_loads_at_one(folder, state, cut):
    shards = cut_by_sat(tiny_model(), cut)
    write_step(folder, *({"module": shard} for shard in shards))
    qkv = "transformer.layers.0.attention.query_key_value.weight"
    assert shards[0][qkv].shape == (192 // cut, 64)
    assert_holds(load_cogvlm(folder)[0], state)


def test_the_file_itself_is_refused_with_the_folder_to_give(folder):
    with pytest.raises(CheckpointError, match=f"is a file; give the model folder .*, perhaps {folder}$"):
        load_cogvlm(folder / "release" / FILE.format(0))


@pytest.mark.parametrize("name", ["latest", "model_config.json"])
def test_a_folder_without_one_of_its_parts_says_what_was_looked_for_and_found(folder, name):
    (folder / name).unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=f"looked for latest, model_config.json.*; missing {name}; found") as e:
        load_cogvlm(folder)
    assert "pytorch_model.bin, release" in str(e.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a SAT model folder.*found: no such folder"):
        load_cogvlm(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="missing latest, model_config.json; found: nothing"):
        load_cogvlm(tmp_path / "empty")


@pytest.mark.parametrize("spoil", ["no step folder", "other file", "gap", "empty latest"])
def test_a_step_without_its_files_says_what_was_found(folder, spoil):
    file = folder / "release" / FILE.format(0)
    if spoil == "no step folder":
        shutil.rmtree(folder / "release")
    elif spoil == "empty latest":
        (folder / "latest").write_text("\n")
    else:
        file.rename(file.with_name("model.pt" if spoil == "other file" else FILE.format(1)))
    found = {"no step folder": "nothing", "other file": "model.pt", "gap": "'mp_rank_01", "empty latest": ""}
    with pytest.raises(CheckpointError, match=rf"`latest` says '(release)?', so .*; found .*{found[spoil]}"):
        weight_files(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_config_that_is_no_object_is_named(folder, text):
    (folder / "model_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="model_config.json: "):
        read_config(folder)


def test_a_config_of_another_model_names_what_it_lacks(folder):
    (folder / "model_config.json").write_text('{"num_layers": 2, "hidden_size": 4}')
    with pytest.raises(CheckpointError, match="lacks eva_args, image_length, inner_hidden_size, num_attention"):
        load_cogvlm(folder)


def test_every_name_and_shape_that_does_not_fit_is_listed(folder, state):
    state = dict(state)
    del state["mixins.eva.boi"]
    state["mixins.lora.extra"] = torch.zeros(1)
    state["transformer.final_layernorm.weight"] = torch.zeros(63)
    state["mixins.eva.eoi"] = "text"
    write_step(folder, {"module": state})
    with pytest.raises(
        CheckpointError, match="base: the weights do not fit the model of its config, 4 problems"
    ) as error:
        load_cogvlm(folder)
    for line in (
        "missing mixins.eva.boi",
        "unexpected mixins.lora.extra",
        "mixins.eva.eoi: not a tensor",
        "transformer.final_layernorm.weight: shape (63,), the model has (64,)",
    ):
        assert f"\n  {line}" in str(error.value)


def test_rank_files_that_do_not_belong_together_are_named(folder, state):
    first, second = cut_by_sat(tiny_model(), 2)
    del second["mixins.eva.boi"]
    second["mixins.lm.lm_head.weight"] = torch.zeros(5, 7)
    write_step(folder, {"module": first}, {"module": second})
    with pytest.raises(CheckpointError, match="2 problems") as error:
        load_cogvlm(folder)
    assert "missing mixins.eva.boi in mp_rank_01_model_states.pt" in str(error.value)
    wrong = "mixins.lm.lm_head.weight: shape (5, 7), the model has (512, 64) in mp_rank_01_model_states.pt"
    assert wrong in str(error.value)


def test_a_number_of_saved_ranks_that_cannot_be_is_named(folder, state):
    write_step(folder, *[{"module": state}] * 7)
    with pytest.raises(CheckpointError, match=r"34 sizes do not divide by 7, the number of files: mixins.eva"):
        load_cogvlm(folder)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None, {"state_dict": {}}, [1, 2]])
def test_a_file_that_is_no_checkpoint_is_named(folder, content):
    file = folder / "release" / FILE.format(0)
    if content is None:
        file.write_bytes(file.read_bytes()[:-1000])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    wanted = "expected a state dict under the key `module`; found" if isinstance(content, dict | list) else "cannot be"
    with pytest.raises(CheckpointError, match=f"{FILE.format(0)}: {wanted}"):
        load_cogvlm(folder)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="/proc/self is Linux's")
def test_weights_are_mapped_and_read_as_they_are_used(tmp_path):
    """200 MB in 20 tensors; the process may hold one of them, not the file."""
    tensor = torch.ones(10 * 2**20 // 4)
    write_step(tmp_path, {"module": {f"t{i}": tensor * i for i in range(20)}})

    def kilobytes(key):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(key))

    anonymous, mapped = kilobytes("RssAnon"), kilobytes("RssFile")
    state = map_weights(tmp_path / "3000" / FILE.format(0))
    assert state["t7"].sum().item() == 7 * tensor.numel()
    assert kilobytes("RssAnon") - anonymous < 5 * 1024
    assert kilobytes("RssFile") - mapped < 60 * 1024

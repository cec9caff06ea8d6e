"""What `--load` of SAT's trainer may name inside of `adapter_checkpoints`: it is loaded, or is one error."""

import shutil
import sys
from argparse import Namespace
from types import ModuleType
from unittest import mock

import pytest
import torch

from sat_lora import AdapterError, adapter_checkpoints, add_lora, load_adapter, save_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.errors import SatLoraError
from sat_lora.lora.apply import adapters_of
from tests.support.sat_files import cut_by_sat, write_step
from tests.support.tiny import fill_adapters, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


def adapted(seed=0, **fields):
    model = tiny_model(seed=seed)
    add_lora(model, **{"r": 4, **fields})
    return model


@pytest.fixture(scope="module")
def saves(single_process_group, tmp_path_factory):
    """What two saves of a run leave, and a third that SAT has made of the whole model."""
    from sat.training import model_io

    folder = tmp_path_factory.mktemp("saves")
    model = adapted()
    fill_adapters(model)
    with adapter_checkpoints():
        for iteration in (2, 4):
            model_io.save_checkpoint(iteration, model, None, None, Namespace(save=str(folder / "run")))
    write_step(folder / "whole", {"module": model.state_dict()}, step="7")
    return folder


@pytest.fixture(scope="module")
def refusing(single_process_group):
    """A model into which nothing is ever loaded, and its values."""
    model = adapted()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def run(saves, tmp_path):
    """A copy of the run's folder, to be spoiled."""
    return shutil.copytree(saves / "run", tmp_path / "run")


def load(model, folder, mode="pretrain"):
    """What SAT's trainer goes on from, having loaded."""
    from sat.training import deepspeed_training

    arguments = Namespace(load=str(folder), mode=mode, force_train=False, no_load_rng=True)
    with adapter_checkpoints():
        return deepspeed_training.load_checkpoint(model, arguments)


def text_in_latest(text):
    return lambda run: (run / "latest").write_bytes(text)


def without(*names):
    def remove(run):
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def cut(run):
    path = run / "4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def latest_is_a_folder(run):
    (run / "latest").unlink()
    (run / "latest").mkdir()


def parts_of_zero_3(run):
    shutil.rmtree(run / "4")
    (run / "4").mkdir()
    torch.save({}, run / "4" / "z3_rank_00_model_states.pt")


def a_part_of_another_rank(run):
    shutil.rmtree(run / "4")
    (run / "4").mkdir()
    torch.save({"module": {}}, run / "4" / "mp_rank_01_model_states.pt")


def parts_of_two_ranks(run):
    shutil.rmtree(run / "4")
    write_step(run, *cut_by_sat(tiny_model(), 2), step="4")


NEWEST = r"no `latest` names a step that is there: give .*run/4, the newest"
SPOILED = {
    "no latest": (without("latest"), NEWEST),
    "a step that is not there": (text_in_latest(b"500"), NEWEST),
    "an absolute path": (text_in_latest(b"/etc"), NEWEST),
    "a path upwards": (text_in_latest(b"../run/4"), NEWEST),
    "nothing in latest": (text_in_latest(b""), NEWEST),
    "a number below 1": (text_in_latest(b"-4"), NEWEST),
    "bytes": (text_in_latest(b"\xff\xfe4\x00"), NEWEST),
    "a pointer of git LFS": (text_in_latest(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d"), NEWEST),
    "digits of another script": (text_in_latest("４".encode()), NEWEST),
    "latest is a folder": (latest_is_a_folder, NEWEST),
    "release, which is not there": (text_in_latest(b"release"), NEWEST),
    "no folder at all": (lambda run: shutil.rmtree(run), "no such folder"),
    "nothing in it": (without("latest", "2", "4", "model_config.json"), "found: nothing"),
    "the newest without weights": (without("4/adapter_model.safetensors"), "4 is not an adapter folder: adapter_model"),
    "the newest is cut": (cut, "4/adapter_model.safetensors: cannot be read as safetensors"),
    "parts of ZeRO-3": (parts_of_zero_3, "it is a part of a model as ZeRO-3 cuts it, .* inside adapter_checkpoints"),
    "a part of another rank": (
        a_part_of_another_rank,
        "4 has the parts of model-parallel ranks 1, and here --model-parallel-size is 1: give the one",
    ),
    "the parts of two ranks": (
        parts_of_two_ranks,
        "4 has the parts of model-parallel ranks 0, 1, and here --model-parallel-size is 1: give the one",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_loaded_is_one_error_and_the_model_stays(case, run, refusing):
    spoil, message = SPOILED[case]
    model, before = refusing
    spoil(run)
    with pytest.raises(AdapterError, match=message) as error:
        load(model, run)
    assert str(run) in str(error.value) and len(str(error.value).splitlines()) == 1
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


READ = {
    "line feed of Windows": text_in_latest(b"4\r\n"),
    "spaces": text_in_latest(b"  4 \n\n"),
    "zeros before": text_in_latest(b"0004"),
    "other files beside it": lambda run: (run / "events.out.tfevents.1").write_bytes(b""),
}


@pytest.mark.parametrize("case", READ)
def test_what_sat_reads_is_read(case, run):
    READ[case](run)
    model = adapted()
    assert load(model, run) == 4
    assert load(model, run, mode="finetune") == 0
    expected = tiny_model()
    load_adapter(expected, run / "4")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_an_older_step_is_given_by_its_own_folder(run):
    model = adapted()
    assert load(model, run / "2") == 2


OTHERS = {
    "another r": (dict(r=8), "run", "its rank is 4, the model's 8: add LoRA with r=4, lora_alpha=32"),
    "another alpha": (dict(lora_alpha=8), "run", r"\(rank, scale, slots\)"),
    "other layers": (dict(target_modules=["language-attention"]), "run", "None by the model's adapter"),
    "DoRA": (dict(use_dora=True), "run", "use_dora is False in the file, True in the model"),
    "another base": (dict(seed=3), "run", "the base model has other values in 63 of 64 tensors"),
    "another r, whole": (dict(r=8), "whole", "do not fit those of the model, .* first: shape"),
    "fewer layers, whole": (
        dict(target_modules=["language-attention"]),
        "whole",
        "other layers than the model's: 40 of it are not in the model",
    ),
    "more layers, whole": (dict(modules_to_save=(), target_modules=["all-linear", "lm-head"]), "whole", "not in it"),
    "DoRA, whole": (dict(use_dora=True), "whole", "tensors of the model are not in it, .*magnitude first"),
    "PiSSA, whole": (dict(init_lora_weights="pissa"), "whole", "tensors of the model are not in it, .*origin_"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_does_not_fit_is_told_and_an_adapter_changes_nothing(case, saves):
    fields, folder, message = OTHERS[case]
    model = adapted(**fields)
    before = [parameter.clone() for adapter in adapters_of(model).values() for parameter in adapter.parameters()]
    with pytest.raises(AdapterError, match=message):
        load(model, saves / folder, mode="finetune")
    after = [parameter for adapter in adapters_of(model).values() for parameter in adapter.parameters()]
    assert folder == "whole" or all(torch.equal(*pair) for pair in zip(before, after))


def test_a_whole_model_and_an_adapter_that_fit_are_loaded(saves):
    models = [adapted(), adapted()]
    assert load(models[0], saves / "whole") == 7 and load(models[1], saves / "run") == 4
    left, right = (model.state_dict() for model in models)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_steps_of_our_own_run_are_named(tmp_path):
    save_adapter(adapted(), tmp_path / "run" / "adapter" / "400")
    (tmp_path / "run" / "adapter" / "latest").write_text("400\n")
    with pytest.raises(AdapterError, match="give .*run/adapter, where the adapters of a run are"):
        load(adapted(), tmp_path / "run")
    assert load(adapted(), tmp_path / "run" / "adapter") == 400


def save(model, folder, **more):
    from sat.training import model_io

    with adapter_checkpoints():
        model_io.save_checkpoint(6, model, None, None, Namespace(save=str(folder), **more))


def test_a_save_whose_pointer_cannot_be_written_is_an_error_and_the_adapter_is_there(run):
    latest_is_a_folder(run)
    with pytest.raises(SatLoraError, match="latest.*: Is a directory"):
        save(adapted(), run)
    assert read_adapter(run / "6").layers


def test_what_is_called_otherwise_is_saved_whole_with_a_word(tmp_path, caplog):
    save(adapted(name="mine"), tmp_path, mode="inference", model_parallel_size=1)
    assert "saves 'lora' alone, and the model has mixins.eva.vit_model.mixins.mine, mixins.mine: the w" in caplog.text
    state = torch.load(tmp_path / "6" / "mp_rank_00_model_states.pt")["module"]
    assert any(".mine.adapters." in name for name in state) and "mixins.lm.lm_head.weight" in state


def test_a_script_that_has_imported_them_by_name_saves_and_loads_adapters_too(tmp_path):
    from sat.training import model_io

    script = ModuleType("script")
    script.save_checkpoint, script.load = model_io.save_checkpoint, model_io.load_checkpoint
    before = {**vars(script)}
    model = adapted()
    fill_adapters(model)
    with mock.patch.dict(sys.modules, script=script), adapter_checkpoints():
        script.save_checkpoint(3, model, None, None, Namespace(save=str(tmp_path), mode="inference"))
        other = adapted()
        assert script.load(other, Namespace(load=str(tmp_path), mode="pretrain")) == 3
    assert {path.name for path in (tmp_path / "3").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not [*tmp_path.rglob("*.pt")]
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert vars(script) == before

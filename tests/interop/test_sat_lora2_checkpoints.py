"""Checkpoints in SAT's layout and merge_lora, with the drop-in for SAT's lora2."""

import copy
import json
from argparse import Namespace

import pytest
import torch
from sat.training.model_io import load_checkpoint, save_checkpoint

from sat_lora import AdapterError, adapter_checkpoints, load_adapter, save_adapter
from sat_lora.interop.sat_lora2 import LoraMixin
from sat_lora.lora.apply import sat_models
from tests.support.sat_models import SIZES, BaseModel, run_language, settings
from tests.support.sat_oracle import (
    MODELS,
    PLAIN,
    assert_close,
    both,
    copy_factors,
    filled,
    our_adapters,
    some_models,
    with_ours,
    with_sats,
)
from tests.support.sat_subjects import remove
from tests.support.tiny import fill_adapters

pytestmark = pytest.mark.usefixtures("single_process_group")


def written_by_sat(model, folder):
    save_checkpoint(1, model, None, None, settings(mode="inference", save=str(folder)))
    return folder


def read_by_sat(model, folder, mode="finetune"):
    load_checkpoint(model, Namespace(mode=mode, force_train=False, load=str(folder)))
    return model


@torch.no_grad()
def with_other_weights(model):
    for parameter in model.parameters():
        parameter.mul_(0.5)
    return model


@pytest.mark.parametrize("order", ["added before loading", "added after loading"])
@pytest.mark.parametrize("name", ["plain", "chatglm2", "encoder-decoder", "cogvlm"])
def test_a_checkpoint_of_the_plain_model_loads(name, order, tmp_path):
    subject = MODELS[name]
    base = subject.build().eval()
    written_by_sat(base, tmp_path)
    model = with_other_weights(subject.build().eval())
    assert not torch.equal(subject.run(model), subject.run(base))
    steps = [
        lambda: [inner.add_mixin("lora", LoraMixin(2, 4, 6), reinit=True) for inner in sat_models(model).values()],
        lambda: read_by_sat(model, tmp_path),
    ]
    for step in steps if order == "added before loading" else reversed(steps):
        step()
    reference = with_ours(subject, 4, 6).eval()
    assert torch.equal(subject.run(model), subject.run(base))
    theirs = with_sats(subject, 4, 6)
    for one in (model, reference):
        copy_factors(theirs, one)
    assert torch.equal(subject.run(model), subject.run(reference))


@pytest.mark.parametrize("mode", ["finetune", "inference"])
@pytest.mark.parametrize("name", ["plain", "chatglm2", "encoder-decoder", "cogvlm"])
def test_a_checkpoint_with_sats_own_adapters_loads(name, mode, tmp_path):
    subject = MODELS[name]
    theirs = with_sats(subject, 4, 6).eval()
    ours = with_other_weights(with_ours(subject, 4, 6).eval())
    read_by_sat(ours, written_by_sat(theirs, tmp_path), mode)
    reference = with_ours(subject, 4, 6).eval()
    copy_factors(theirs, reference)
    assert torch.equal(subject.run(ours), subject.run(reference))


def test_sats_own_adapters_on_other_layers_or_of_another_rank_are_one_error(tmp_path):
    written_by_sat(with_sats(PLAIN, 4, 6), tmp_path)
    with pytest.raises(AdapterError, match=r"lora2 on layers that .* leaves out, transformer.layers.1.attention.dense"):
        read_by_sat(with_ours(PLAIN, 4, 6, layer_range=[0]), tmp_path)
    with pytest.raises(AdapterError, match="do not fit those of the model, 8 tensors, .* add LoRA with the rank"):
        read_by_sat(with_ours(PLAIN, 8, 6), tmp_path)


def test_inside_of_adapter_checkpoints_a_merged_model_is_saved_whole(tmp_path):
    """As the published script does after training."""
    model = filled(PLAIN, 4)
    model.get_mixin("lora").merge_lora()
    with adapter_checkpoints():
        from sat.training.model_io import save_checkpoint as replaced

        replaced(1, model, None, None, settings(mode="inference", save=str(tmp_path)))
    plain = read_by_sat(PLAIN.build(), tmp_path)
    assert all(torch.equal(plain.state_dict()[name], t) for name, t in model.state_dict().items() if "lora" not in name)


def test_loading_sets_trained_adapters_back_where_the_checkpoint_has_none(tmp_path):
    model = filled(PLAIN, 4)
    read_by_sat(model, written_by_sat(PLAIN.build(), tmp_path))
    assert not any(adapter.B.any() for adapter in our_adapters(model).values())


def test_a_checkpoint_with_adapters_brings_them_back(tmp_path):
    model = filled(PLAIN, 4).eval()
    written_by_sat(model, tmp_path)
    again = read_by_sat(with_ours(PLAIN, 4).eval(), tmp_path, mode="inference")
    assert torch.equal(PLAIN.run(again), PLAIN.run(model))


class Published(BaseModel):
    """As scripts have it whose class adds the mixin."""

    def __init__(self, args, **kw_args):
        super().__init__(args, **kw_args)
        self.add_mixin("lora", LoraMixin(2, r=4), reinit=True)


@pytest.mark.parametrize("source", [BaseModel, Published])
def test_sats_from_pretrained_begins_with_a_base_and_goes_on_with_a_run(source, tmp_path):
    saved = source(settings(**SIZES)).eval()
    fill_adapters(saved)
    written_by_sat(saved, tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps({**SIZES, "model_class": "Published"}))
    model, _ = Published.from_pretrained(str(tmp_path), settings(mode="finetune", force_train=False))
    assert len(our_adapters(model)) == 4
    assert torch.equal(run_language(model.eval()), run_language(saved))


def test_an_adapter_file_is_that_of_any_lora_mixin(tmp_path):
    model, other = filled(PLAIN, 24, 6, layer_range=[1]).eval(), PLAIN.build().eval()
    save_adapter(model, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(PLAIN.run(other), PLAIN.run(model))


# merge_lora


@some_models
def test_merged_weights_compute_what_the_adapters_did_in_the_layers_that_were_there(name):
    subject = MODELS[name]
    model = filled(subject, 4, 6).eval()
    adapted, layers = subject.run(model), {name: id(module) for name, module in subject_modules(model)}
    for inner in sat_models(model).values():
        inner.get_mixin("lora").merge_lora()
    assert_close(subject.run(model), adapted, subject.tolerance)
    assert {name: id(module) for name, module in subject_modules(model)} == layers
    assert list(model.state_dict()) == list(subject.build().state_dict())
    remove(model)
    assert_close(subject.run(model), adapted, subject.tolerance)


def subject_modules(model):
    return [(name, module) for name, module in model.named_modules() if "mixins.lora" not in name]


def test_merged_weights_are_those_of_sat():
    theirs, ours = both(PLAIN, 4, 6)
    names = list(our_adapters(ours))
    for model in (theirs, ours):
        # SAT adds to a float64 weight what it has computed in float32.
        model.get_mixin("lora").merge_lora()
    for name in names:
        assert_close(ours.get_submodule(name).weight, theirs.get_submodule(name).weight, 1e-7, name)


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path):
    model = filled(PLAIN, 4).eval()
    adapted = PLAIN.run(model)
    model.get_mixin("lora").merge_lora()
    plain = read_by_sat(PLAIN.build().eval(), written_by_sat(model, tmp_path), mode="inference")
    assert_close(PLAIN.run(plain), adapted, 1e-9)


def test_reinit_after_merging_starts_over_on_the_merged_weights():
    model = filled(PLAIN, 4).eval()
    model.get_mixin("lora").merge_lora()
    merged = PLAIN.run(model)
    model.reinit()
    assert torch.equal(PLAIN.run(model), merged)
    copy_factors(with_sats(PLAIN, 4), model)
    assert not torch.allclose(PLAIN.run(model), merged, atol=1e-3)


def test_unmerging_brings_base_and_adapters_back():
    model, base = filled(PLAIN, 4).eval(), PLAIN.build().eval()
    adapted, mixin = PLAIN.run(model), model.get_mixin("lora")
    mixin.merge_lora()
    mixin.unmerge()
    assert_close(PLAIN.run(model), adapted, 1e-9)
    with mixin.disable():
        assert_close(PLAIN.run(model), PLAIN.run(base), 1e-9)


def test_a_copy_of_the_model_has_adapters_of_its_own():
    model = filled(PLAIN, 4).eval()
    twin, adapted = copy.deepcopy(model), PLAIN.run(model)
    twin.get_mixin("lora").merge_lora()
    assert torch.equal(PLAIN.run(model), adapted)
    assert_close(PLAIN.run(twin), adapted, 1e-9)

"""Mixins on a model and on the SAT models inside it."""

import pytest
from torch import nn

from sat_lora import ConfigError, LoraMixin, add_lora
from sat_lora.lora.apply import (
    adapters_of,
    find_all_parameters,
    find_all_sites,
    mixins_called,
    sat_models,
    whole_name,
)
from tests.support.tiny import tiny_model

pytestmark = [
    pytest.mark.usefixtures("single_process_group"),
    pytest.mark.filterwarnings("ignore:LoRA rank"),
]
VIT = "mixins.eva.vit_model"


def test_sat_models_are_found_by_name_and_other_modules_are_none():
    model = tiny_model()
    assert {name: module for name, module in sat_models(model).items()} == {
        "": model,
        VIT: model.mixins["eva"].vit_model,
    }
    assert sat_models(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(
    "owner, name, expected",
    [
        ("", "a.b", "a.b"),
        ("eva.vit", "eva.vit.a", "eva.vit.a"),
        ("eva.vit", "a", "eva.vit.a"),
        ("eva", "evaluation", "eva.evaluation"),
    ],
)
def test_a_name_is_made_whole_once(owner, name, expected):
    assert whole_name(owner, name) == expected


class DeepSpeedEngine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        module.register_forward_pre_hook(self.begin)

    def begin(self, module, args):
        """As the engine's own hooks, which its model is known by."""


def test_a_model_in_an_engine_gets_none():
    model = tiny_model()
    engine = DeepSpeedEngine(model)
    with pytest.raises(ConfigError, match="the model is DeepSpeed's engine already.*before deepspeed.initialize"):
        add_lora(engine, r=2)
    with pytest.raises(ConfigError, match="the model is in DeepSpeed's engine already"):
        add_lora(model, r=2)
    assert mixins_called(model) == {}


def test_a_mixin_that_was_made_before_the_engine_is_not_added_after_it():
    """Its adapters would get gradients, and no optimizer would know them."""
    model = tiny_model()
    mixin = LoraMixin(model, r=2)
    DeepSpeedEngine(model)
    with pytest.raises(ConfigError, match="the model is in DeepSpeed's engine already"):
        model.add_mixin("late", mixin)
    assert mixins_called(model) == {}


def test_each_model_gets_a_mixin_of_its_own_layers():
    model = tiny_model()
    mixins = add_lora(model, r=2, target_modules=["attention.dense"])
    called = mixins_called(model)
    assert called == {"": mixins[0], VIT: mixins[1]}
    assert mixins_called(model, "other") == {} == adapters_of(model, "other")
    names = {name for name in find_all_sites(model) if name.endswith("attention.dense")}
    assert adapters_of(model).keys() == names and {name.startswith(VIT) for name in names} == {True, False}
    assert all(not name.startswith(VIT) for name in called[""].targets)
    assert all(name.startswith(VIT) for name in called[VIT].targets)


def test_a_model_of_which_nothing_is_selected_gets_none():
    model = tiny_model()
    (mixin,) = add_lora(model, r=2, target_modules=["vit-attention"])
    assert mixins_called(model) == {VIT: mixin}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{VIT}.mixins.lora.{name}" for name, _ in mixin.named_parameters()
    }
    model = tiny_model()
    (mixin,) = add_lora(model, r=2, target_modules=["lm-head"], modules_to_save=["boi"], name="x")
    assert mixins_called(model, "x") == {"": mixin} and [*mixin.trained.tensors] == ["mixins.eva.boi"]


def test_adapters_of_a_mixin_made_by_hand_have_whole_names():
    model = tiny_model()
    vit = model.mixins["eva"].vit_model
    vit.add_mixin("lora", LoraMixin(vit, r=2, target_modules=["attention.dense"]))
    assert [*adapters_of(model)] == [f"{VIT}.transformer.layers.{n}.attention.dense" for n in range(2)]


def test_parameters_are_found_once_by_their_names():
    model = tiny_model()
    found = find_all_parameters(model)
    assert {name: id(one.tensor) for name, one in found.items()} == {n: id(p) for n, p in model.named_parameters()}


def test_a_name_that_is_taken_is_told_with_every_place():
    model = tiny_model()
    add_lora(model, r=2, target_modules=["attention.dense"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    words = f"the model has a mixin mixins.lora and {VIT}.mixins.lora already; delete it or choose another name"
    with pytest.raises(ConfigError, match=f"^{words}$"):
        add_lora(model, r=4)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    add_lora(model, r=4, name="second", target_modules=["attention.dense"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if ".lora." in f".{name}" or ".second." in f".{name}"
    }


def test_a_model_that_is_none_of_sats_is_told_by_its_class():
    with pytest.raises(ConfigError, match="^Sequential is no SAT model and holds none; "):
        add_lora(nn.Sequential(nn.Linear(4, 4)), r=2, target_modules=["0"])

"""The drop-in for SAT's lora2 against SAT's own, on one rank."""

from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from sat.model.base_model import BaseMixin
from sat.model.finetune.lora2 import LoraMixin as SatMixin

from sat_lora import ConfigError, describe, freeze_base
from sat_lora.interop.sat_lora2 import LoraMixin
from tests.support.sat_oracle import (
    MODELS,
    PLAIN,
    assert_close,
    both,
    copy_factors,
    fill_ours,
    filled,
    our_adapters,
    our_gradients,
    sats_gradients,
    sats_layers,
    some_models,
    with_ours,
    with_sats,
)
from tests.support.sat_subjects import loss_of, remove

pytestmark = pytest.mark.usefixtures("single_process_group")
every_model = pytest.mark.parametrize("subject", MODELS.values(), ids=MODELS)


def base_names(model):
    return [name for name in model.state_dict() if "mixins.lora." not in name]


@every_model
def test_the_output_is_that_of_sat(subject):
    theirs, ours = (model.eval() for model in both(subject, 4, 6))
    expected, base = subject.run(theirs), subject.run(subject.build().eval())
    assert (expected - base).abs().max() > 0.01 * base.abs().max()
    assert_close(subject.run(ours), expected, subject.tolerance)


@some_models
def test_over_a_frozen_base_output_and_gradients_are_the_same(name):
    """A layer whose weight does not train takes another way, in which its delta is a part of one product."""
    subject = MODELS[name]
    free, frozen = (filled(subject, r=4, lora_alpha=6) for _ in range(2))
    freeze_base(frozen)
    outputs = []
    for model in (free, frozen):
        outputs.append(subject.run(model.train()))
        loss_of(outputs[-1]).backward()
    assert_close(outputs[1], outputs[0], subject.tolerance)
    assert all(parameter.requires_grad == ("matrix_" in name) for name, parameter in frozen.named_parameters())
    expected, got = our_gradients(free), our_gradients(frozen)
    for key in (f"{adapter}.{leaf}" for adapter in our_adapters(frozen) for leaf in "AB"):
        assert_close(got[key], expected[key], 10 * subject.tolerance, key)


@every_model
def test_every_gradient_is_that_of_sat(subject):
    """Those of the base too: with SAT everything trains that did so before."""
    theirs, ours = both(subject, 4, 6)
    for model in (theirs, ours):
        loss_of(subject.run(model.train())).backward()
    expected, got = sats_gradients(theirs), our_gradients(ours)
    assert got.keys() == expected.keys()
    assert all(expected[f"{name}.{leaf}"].any() for name in our_adapters(ours) for leaf in "AB")
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert_close(got[name], value, 10 * subject.tolerance, name)


def test_the_output_is_that_of_sat_in_float32():
    theirs, ours = (model.float().eval() for model in both(PLAIN, 4, 6))
    assert_close(PLAIN.run(ours), PLAIN.run(theirs), 1e-5)


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(layer_range=[1]), dict(layer_range=[0], cross_attention=False), dict(cross_attention=False)],
    ids=str,
)
@pytest.mark.parametrize("name", ["plain", "encoder-decoder"])
def test_the_same_layers_are_adapted(name, changes):
    subject = MODELS[name]
    theirs, ours = both(subject, 4, **changes)
    assert set(our_adapters(ours)) == set(sats_layers(theirs))
    assert_close(subject.run(ours.eval()), subject.run(theirs.eval()), subject.tolerance)


@pytest.mark.parametrize(
    "layer_range",
    [(1, 1), range(1, 2), iter([1]), {1}, numpy.array([1])],
    ids=["tuple", "range", "iterator", "set", "array"],
)
def test_any_iterable_of_layer_numbers_will_do(layer_range):
    layers = {name.split(".")[2] for name in our_adapters(with_ours(PLAIN, 4, layer_range=layer_range))}
    assert layers == {"1"}


def test_arguments_are_those_of_sat_by_position_too():
    arguments = (2, 4, 6, 0.25, [1], False, False)
    theirs, ours = SatMixin(*arguments), LoraMixin(*arguments)
    for name in ("r", "lora_alpha", "lora_dropout", "layer_range", "scaling", "qlora", "cross_attention"):
        assert getattr(ours, name) == getattr(theirs, name), name
    PLAIN.build().add_mixin("lora", ours, reinit=True)
    assert {adapter.dropout for adapter in ours.adapters.values()} == {0.25}
    defaults = [(one.lora_alpha, one.lora_dropout, one.layer_range) for one in (SatMixin(2, r=1), LoraMixin(2, r=1))]
    assert defaults[0] == defaults[1]


def test_a_rank_above_the_bound_is_kept(recwarn):
    """32 x 32 with r=24 costs more than the full matrix."""
    ours = with_ours(PLAIN, 24, 6)
    assert not [str(warning.message) for warning in recwarn if "LoRA rank" in str(warning.message)]
    assert {(adapter.rank, adapter.scale) for adapter in our_adapters(ours).values()} == {(24, 6 / 24)}


def test_initial_values_have_the_distribution_of_sat():
    """With so many values the extremes of a uniform distribution come within 1 % of its bounds."""
    theirs = SatMixin(2, 64)
    model = PLAIN.build()
    model.add_mixin("lora", theirs, reinit=True)
    ours = our_adapters(with_ours(PLAIN, 64))
    for name, layer in sats_layers(model).items():
        for values in (torch.cat([*layer.matrix_A]), ours[name].A):
            bound = 32**-0.5
            assert 0.99 * bound < values.abs().max() <= bound
            assert abs(values.mean()) < 0.05 * bound and abs(values.std() / bound - 3**-0.5) < 0.03
        assert not ours[name].B.any() and not any(b.any() for b in layer.matrix_B)


@pytest.mark.parametrize("name", ["encoder-decoder", "cogvlm"])
def test_activation_checkpointing_leaves_every_gradient_equal(name):
    subject, gradients = MODELS[name], []
    for changes in (dict(), dict(checkpoint_activations=True)):
        model = with_ours(replace(subject, make=partial(subject.make, **changes)), 4, 6, 0.3)
        fill_ours(model)
        torch.manual_seed(5)
        loss_of(subject.run(model.train())).backward()
        gradients.append(our_gradients(model))
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert_close(gradients[1][name], gradient, 1e-12, name)


class DenseAlone(BaseMixin):
    """A `layer_forward` hook that calls an adapted layer itself, outside of any other hook."""

    def layer_forward(self, hidden_states, mask, *args, **kw_args):
        return hidden_states + self.transformer.layers[kw_args["layer_id"]].attention.dense(hidden_states)


def test_layers_that_a_layer_hook_calls_by_itself_are_adapted():
    def make(**changes):
        model = PLAIN.make(**changes)
        model.add_mixin("alone", DenseAlone())
        return model

    theirs, ours = (model.eval() for model in both(replace(PLAIN, make=make), 4, 6))
    assert_close(PLAIN.run(ours), PLAIN.run(theirs), 1e-9)


# On the model


@some_models
def test_a_fresh_mixin_changes_nothing_and_renames_nothing(name):
    subject = MODELS[name]
    base = subject.build().eval()
    ours = with_ours(subject, 4).eval()
    assert torch.equal(subject.run(ours), subject.run(base))
    assert base_names(ours) == list(base.state_dict())


@some_models
def test_deleting_the_mixin_restores_the_base(name):
    subject = MODELS[name]
    base, ours = subject.build().eval(), filled(subject, 4).eval()
    assert not torch.equal(subject.run(ours), subject.run(base))
    remove(ours)
    assert torch.equal(subject.run(ours), subject.run(base))
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in ours.state_dict().items())


def test_reinit_twice_gives_the_initial_values_and_one_delta():
    ours, initial = filled(PLAIN, 4), our_adapters(with_ours(PLAIN, 4))
    ours.reinit(["lora"])
    ours.get_mixin("lora").reinit(ours)
    for name, adapter in our_adapters(ours).items():
        assert torch.equal(adapter.A, initial[name].A) and not adapter.B.any()
    theirs = with_sats(PLAIN, 4)
    copy_factors(theirs, ours)
    assert_close(PLAIN.run(ours.eval()), PLAIN.run(theirs.eval()), 1e-9)


def test_without_reinit_nothing_is_adapted_yet():
    model = PLAIN.build()
    model.add_mixin("lora", LoraMixin(2, 4))
    assert not our_adapters(model)
    model.reinit(["lora"])
    assert len(our_adapters(model)) == 4


def test_what_trains_is_left_to_the_script():
    model = PLAIN.build()
    model.transformer.layers[0].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_mixin("lora", LoraMixin(2, 4), reinit=True)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert all(after[name] for name in after.keys() - before)


@pytest.mark.parametrize("words", [("matrix_A", "matrix_B"), ("lora",)], ids=str)
def test_scripts_that_choose_by_name_find_the_adapters(words):
    """CogVLM's finetune_cogvlm_demo.py looks for "matrix_A" and "matrix_B"."""
    model = with_ours(PLAIN, 4)
    for name, parameter in model.named_parameters():
        if not any(word.lower() in name.lower() for word in words):
            parameter.requires_grad_(False)
    by_name = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(by_name) == 8 and all(name.startswith("mixins.lora.adapters.") for name in by_name)
    freeze_base(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == by_name
    assert describe(model)[-1]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


# Mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(), "r=0, which is SAT's default"),
        (dict(r=-1), "r has to be a whole number"),
        (dict(r=4, lora_dropout=1.5), "lora_dropout has to be"),
        (dict(r=4, layer_range=[]), "names no layer"),
        (dict(r=4, layer_range="0-1"), "list of layer numbers"),
        (dict(r=4, layer_range=[0.5]), "list of layer numbers"),
        (dict(r=4, layer_range=3), "list of layer numbers"),
        (dict(layer_num=None, r=4), "number of layers"),
        (dict(r=4, qlora=True), "no layer is replaced. Instead"),
        (dict(qlora=True), "r=0.*qlora"),
    ],
    ids=str,
)
def test_wrong_arguments_are_config_errors(arguments, words):
    with pytest.raises(ConfigError, match=words):
        LoraMixin(**{"layer_num": 2, **arguments})


@pytest.mark.parametrize("changes", [dict(layer_num=3), dict(layer_range=[0, 2]), dict(layer_range=[-1])], ids=str)
def test_layers_that_the_model_does_not_have_are_a_config_error(changes):
    model = PLAIN.build()
    with pytest.raises(ConfigError, match="the model has layers 0 to 1, not"):
        model.add_mixin("lora", LoraMixin(**{"layer_num": 2, "r": 4, **changes}), reinit=True)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_a_model_with_sats_own_lora_is_a_config_error():
    model = with_sats(PLAIN, 4)
    with pytest.raises(ConfigError, match="is a LoraLinear, which takes no adapter"):
        model.add_mixin("ours", LoraMixin(2, 4), reinit=True)


def test_merging_what_is_not_there_is_a_config_error():
    with pytest.raises(ConfigError, match="not on a model yet"):
        LoraMixin(2, 4).reinit()
    model = with_ours(PLAIN, 4)
    model.get_mixin("lora").merge_lora()
    for mixin in (LoraMixin(2, 4), model.get_mixin("lora")):
        with pytest.raises(ConfigError, match="there are no adapters"):
            mixin.merge_lora()

"""Parameters of the base that train whole: modules_to_save and bias."""

import copy
import re

import pytest
import torch

from sat_lora import AdapterError, ConfigError, LoraMixin, add_lora, describe, load_adapter, save_adapter
from sat_lora._sat import ColumnParallelLinear, RowParallelLinear
from sat_lora.adapters.read import read_adapter
from sat_lora.lora import base_parameters
from sat_lora.lora.apply import adapters_of, find_all_parameters, find_all_sites
from sat_lora.lora.base_parameters import METHOD, TrainedBase, has_part_of_gradient, keep_trained_set
from sat_lora.lora.targets import BaseParameter
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")

SOME = ["linear_proj", "boi", "eoi", "patch_embedding.proj"]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def change_what_trains(model):
    fill_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "mixins.lora." not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def saved_whole():
    model = tiny_model().eval()
    base = {name: p.clone() for name, p in model.named_parameters()}
    mixins = add_lora(model, r=4, modules_to_save=SOME)
    return model, mixins, base


def test_named_modules_and_parameters_train_whole_and_their_linears_get_no_delta(saved_whole):
    model, _, base = saved_whole
    whole = {name for name in trainable(model) if "mixins.lora." not in name}
    assert whole == {
        name
        for name in base
        if name.endswith((".boi", ".eoi")) or ".linear_proj." in name or "patch_embedding.proj" in name
    }
    assert len(whole) > 8
    assert not [name for name in adapters_of(model) if "linear_proj" in name]
    (row,) = [row for row in describe(model) if row["part"] == "trained whole"]
    assert row["trainable"] == sum(base[name].numel() for name in whole)
    assert describe(model)[-1]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_they_get_gradients(saved_whole):
    model, _, _ = saved_whole
    fill_adapters(model)
    logits_of(model.train(), tiny_batch()).pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n in trainable(model))


def test_disabling_brings_the_originals_and_enabling_the_trained_values(saved_whole):
    model, mixins, base = saved_whole
    batch = tiny_batch()
    change_what_trains(model)
    logits = logits_of(model, batch)
    with mixins[0].disable(), mixins[1].disable():
        assert torch.equal(logits_of(model, batch), logits_of(tiny_model().eval(), batch))
        assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert torch.equal(logits_of(model, batch), logits)


def test_deleting_the_mixin_gives_the_base_back_for_the_next_forward_pass(saved_whole):
    """Until then SAT's transformer holds the old hooks, and with them the mixin."""
    model, mixins, base = saved_whole
    change_what_trains(model)
    logits_of(model, tiny_batch())
    mixins.clear()
    model.del_mixin("lora")
    model.mixins["eva"].vit_model.del_mixin("lora")
    assert torch.equal(logits_of(model, tiny_batch()), logits_of(tiny_model().eval(), tiny_batch()))
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    assert not trainable(model)


def test_they_are_saved_whole_and_loaded_again(saved_whole, tmp_path):
    model, _, _ = saved_whole
    change_what_trains(model)
    save_adapter(model, tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter")
    assert set(saved.trained) == {name for name in trainable(model) if "mixins.lora." not in name}
    other, batch = tiny_model().eval(), tiny_batch()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    assert trainable(other) == trainable(model)


def test_a_disabled_adapter_is_not_saved_with_the_originals(saved_whole, tmp_path):
    model, mixins, _ = saved_whole
    with mixins[0].disable(), pytest.raises(AdapterError, match="disabled and its base parameters are the originals"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_as_asked(bias, tmp_path):
    model = tiny_model().eval()
    add_lora(model, r=4, bias=bias, target_modules=["vit-mlp", "language-mlp"])
    sites, parameters = find_all_sites(model), find_all_parameters(model)
    whole = {name for name in trainable(model) if "mixins.lora." not in name}
    if bias == "all":
        assert whole == {name for name in parameters if name.endswith(".bias")}
        assert any("layernorm" in name for name in whole)
    else:
        assert whole == {f"{n}.bias" for n, s in sites.items() if s.part == "vit-mlp"}
    change_what_trains(model)
    save_adapter(model, tmp_path / "adapter")
    other, batch = tiny_model().eval(), tiny_batch()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["linear_pro"]}, "modules_to_save: 'linear_pro' matches no .* nearest: .*linear_proj"),
        ({"bias": "lora_only", "target_modules": "language-mlp"}, "bias='lora_only': there is no bias to train"),
    ],
)
def test_what_matches_nothing_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        add_lora(tiny_model(), **fields)


def test_a_mixin_may_train_whole_parameters_alone():
    model = tiny_model()
    vit = model.mixins["eva"].vit_model
    add_lora(model, r=4, target_modules=["language-mlp"], modules_to_save=["patch_embedding"])
    assert not vit.get_mixin("lora").adapters and vit.get_mixin("lora").trained.tensors


def test_reinit_takes_the_present_base_for_the_original():
    """SAT calls it after a checkpoint has been loaded into the model."""
    model = tiny_model()
    model.add_mixin("lora", LoraMixin(model, r=4, modules_to_save=["boi"]))
    mixin, boi = model.get_mixin("lora"), model.mixins["eva"].boi
    with torch.no_grad():
        boi.fill_(3)
    mixin.reinit(model)
    with torch.no_grad():
        boi.fill_(4)
    with mixin.disable():
        assert (boi == 3).all()
    assert (boi == 4).all()


def test_what_a_script_lets_train_is_told_and_frozen_again(monkeypatch):
    said = []
    monkeypatch.setattr(base_parameters, "warn", said.append)
    model = tiny_model()
    boi, head = model.mixins["eva"].boi, model.mixins["lm"].lm_head.weight

    def own():
        boi.requires_grad_(True)
        head.requires_grad_(True)

    model.disable_untrainable_params = own  # of the script
    model.add_mixin("lora", LoraMixin(model, r=4, target_modules=["language-mlp"], modules_to_save=["boi"]))
    before = trainable(model)
    assert boi.requires_grad and not head.requires_grad and said == []
    keep_trained_set(model)  # once more
    model.disable_untrainable_params()
    assert trainable(model) == before
    (text,) = said
    assert text.startswith("CogVLMModel.disable_untrainable_params leaves 1 parameters trainable") and "lm_head" in text
    model.disable_untrainable_params = lambda: boi.requires_grad_(False)  # set once more, and LoRA's once more
    keep_trained_set(model)
    model.disable_untrainable_params()
    assert trainable(model) == before and len(said) == 1


@pytest.mark.parametrize("only_freezes", [True, False])
def test_what_a_script_keeps_by_freezing_the_rest_is_told_too(monkeypatch, only_freezes):
    """As the published class: the list of words is of what trains, and all else is frozen."""
    said = []
    monkeypatch.setattr(base_parameters, "warn", said.append)
    model = tiny_model()
    model.mixins["eva"].boi.requires_grad_(False)  # long before: not the script's doing

    def own():
        for name, parameter in model.named_parameters():
            if not any(word in name for word in ("matrix_A", "boi", "mlp.dense_4h_to_h", "lm_head")):
                parameter.requires_grad = False
            elif not only_freezes and "boi" not in name:
                parameter.requires_grad_(requires_grad=True)

    model.disable_untrainable_params = own
    add_lora(model, r=4, modules_to_save=["lm_head"])
    before = trainable(model)
    for _ in range(2):  # as the trainer may
        model.disable_untrainable_params()
    assert trainable(model) == before
    assert said[0] == said[1]
    names = [name for name in said[0].split(": ")[1].split(". They")[0].split(", ")]
    assert names and all("mlp.dense_4h_to_h" in name for name in names)
    kept = [name for name, _ in model.named_parameters() if "mlp.dense_4h_to_h" in name]
    assert f"leaves {len(kept)} parameters trainable" in said[0]
    assert all(any(re.fullmatch(re.escape(name).replace(r"\*", r"\d+"), one) for name in names) for one in kept)


def test_without_a_script_the_models_own_method_says_what_trains_and_a_mixin_has_the_last_word(monkeypatch):
    calls = []
    model = tiny_model()
    monkeypatch.setattr(type(model), METHOD, lambda self: calls.append(self), raising=False)
    add_lora(model, r=4, target_modules=["language-mlp"])
    stands = vars(model)[METHOD]
    keep_trained_set(model)
    assert vars(model)[METHOD] is stands
    before = trainable(model)
    model.disable_untrainable_params()
    assert calls == [model] and trainable(model) == before
    copied = copy.deepcopy(model)
    copied.disable_untrainable_params()
    assert calls == [model, copied]
    model.del_mixin("lora")
    model.disable_untrainable_params()
    assert calls == [model, copied, model]


def test_a_module_that_is_no_model_of_sat_keeps_what_it_has():
    linear = torch.nn.Linear(2, 2)
    keep_trained_set(linear)
    assert METHOD not in vars(linear)


def own(module, leaf="weight"):
    return BaseParameter(leaf, module, leaf)


def trained_base(value=1.0):
    """One weight of ones, and what holds it."""
    linear = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    torch.nn.init.constant_(linear.weight, value)
    trained = TrainedBase({"weight": own(linear)})
    trained.remember()
    return linear.weight, trained


def test_originals_are_told_while_the_trained_values_are_in_place():
    weight, trained = trained_base()
    with torch.no_grad():
        weight.fill_(2)
    ((parameter, original),) = trained.originals()
    assert parameter is weight and (original == 1).all() and not original.requires_grad
    trained.swap()
    assert (weight == 1).all() and [*trained.originals()] == []
    trained.swap()
    assert (weight == 2).all() and len([*trained.originals()]) == 1
    trained.swap()
    trained.remember()  # the base as it is now
    assert [(original == 1).all() for _, original in trained.originals()] == [True]


@pytest.mark.parametrize("is_disabled", [False, True])
def test_a_base_is_given_back_once(is_disabled):
    weight, trained = trained_base()
    with torch.no_grad():
        weight.fill_(2)
    if is_disabled:
        trained.swap()
    trained.give_back()
    assert (weight == 1).all() and not weight.requires_grad


def test_what_zero_3_has_partitioned_is_not_exchanged():
    weight, trained = trained_base()
    weight.ds_id, weight.ds_tensor = 0, torch.full((2,), 5.0)
    trained.remember()
    assert [original.tolist() for _, original in trained.originals()] == [[5.0, 5.0]]
    with pytest.raises(ConfigError, match="^weight is partitioned by ZeRO-3"):
        trained.swap()
    trained.give_back()
    assert (weight == 1).all() and not weight.requires_grad


@pytest.mark.parametrize(
    "make, leaf, expected",
    [
        (lambda: RowParallelLinear(4, 4, final_bias=False), "bias", True),
        (lambda: RowParallelLinear(4, 4, final_bias=False), "weight", False),
        (lambda: RowParallelLinear(4, 4, final_bias=True), "bias", False),
        (lambda: ColumnParallelLinear(4, 4), "bias", False),
        (lambda: torch.nn.Linear(4, 4), "bias", False),
    ],
)
def test_a_bias_that_each_rank_adds_a_part_of_gets_the_gradient_of_all(monkeypatch, make, leaf, expected):
    """As if there were three model-parallel ranks."""
    module = make().requires_grad_(False)
    assert has_part_of_gradient(own(module, leaf)) is expected
    trained = TrainedBase({leaf: own(module, leaf)})
    monkeypatch.setattr(base_parameters, "model_parallel_layout", lambda: (0, 3))
    parameter = getattr(module, leaf).requires_grad_()
    parameter.sum().backward()
    assert (parameter.grad == (3 if expected else 1)).all()
    parameter.grad = None
    trained.remember()
    trained.give_back()
    parameter.requires_grad_()
    parameter.sum().backward()
    assert (parameter.grad == 1).all()


def test_what_is_cut_says_so_to_deepspeed():
    module = ColumnParallelLinear(4, 4)
    TrainedBase({leaf: own(module, leaf) for leaf in ("weight", "bias")})
    assert module.weight.tensor_model_parallel and module.bias.tensor_model_parallel
    plain = torch.nn.Linear(4, 4)
    TrainedBase({"weight": own(plain)})
    assert not hasattr(plain.weight, "tensor_model_parallel")

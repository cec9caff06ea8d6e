"""LoraMixin on CogVLM and on SAT's own models."""

import argparse
import copy
import gc
import warnings
import weakref

import pytest
import torch
from sat.model import BaseModel

from sat_lora import ConfigError, LoraConfig, LoraMixin, add_lora, describe, describe_text
from sat_lora._sat import BaseMixin
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.mixin import lora_mixins
from tests.support.tiny import adapter_gradients, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


def remove_lora(model):
    model.del_mixin("lora")
    model.mixins["eva"].vit_model.del_mixin("lora")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_adapter_changes_nothing(dtype):
    model, batch = tiny_model(dtype).eval(), tiny_batch()
    base = logits_of(model, batch)
    add_lora(model)
    assert torch.equal(logits_of(model, batch), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deleting_the_mixin_restores_the_base_exactly(dtype):
    model, batch = tiny_model(dtype).eval(), tiny_batch()
    base, state = logits_of(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    add_lora(model)
    fill_adapters(model)
    assert not torch.equal(logits_of(model, batch), base)
    remove_lora(model)
    assert torch.equal(logits_of(model, batch), base)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_disabled_mixin_is_the_base():
    model, batch = tiny_model().eval(), tiny_batch()
    base = logits_of(model, batch)
    mixins = add_lora(model)
    fill_adapters(model)
    for mixin in mixins:
        mixin.enabled = False
    assert torch.equal(logits_of(model, batch), base)


def test_adapted_logits_equal_a_base_with_the_deltas_added_to_its_weights():
    batch = tiny_batch()
    batch["images"] = batch["images"].double()
    adapted, merged = tiny_model(torch.float64).eval(), tiny_model(torch.float64).eval()
    add_lora(adapted, r=4, lora_alpha=6, qkv_slots=("q", "v"))
    fill_adapters(adapted)
    weights = dict(merged.named_parameters())
    with torch.no_grad():
        for name, adapter in adapters_of(adapted).items():
            weight, row, rank = weights[name + ".weight"], 0, adapter.rank
            for number, (start, stop) in enumerate(adapter.target.rows):
                b = adapter.B[row : row + stop - start]
                weight[start:stop] += (6 / rank) * b @ adapter.A[number * rank : (number + 1) * rank]
                row += stop - start
    torch.testing.assert_close(logits_of(adapted, batch), logits_of(merged, batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [(True, False), (True, True), (False, False)], ids=["mixed", "images", "text"])
def test_activation_checkpointing_leaves_every_gradient_equal(rows):
    batch, gradients = tiny_batch(rows), []
    for checkpoint in (False, True):
        model = tiny_model(checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint)
        add_lora(model, r=4)
        fill_adapters(model)
        gradients.append(adapter_gradients(model, batch))
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        assert torch.equal(plain, gradients[1][name]), name


def test_checkpointing_with_dropout_recomputes_the_same_mask():
    batch, gradients = tiny_batch(), []
    for checkpoint in (False, True):
        model = tiny_model(checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint)
        add_lora(model, r=4, lora_dropout=0.3)
        fill_adapters(model)
        torch.manual_seed(5)
        gradients.append(adapter_gradients(model, batch))
    for name, plain in gradients[0].items():
        assert torch.equal(plain, gradients[1][name]), name


@pytest.mark.parametrize("checkpoint", [False, True])
def test_every_adapter_parameter_gets_a_gradient(checkpoint):
    model = tiny_model(checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint)
    add_lora(model, r=4)
    fill_adapters(model)
    gradients = adapter_gradients(model, tiny_batch())
    assert len(gradients) == 2 * 32
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_in_half_precision_are_those_of_float32_rounded(dtype, adapter_dtype, use_dora):
    gradients = []
    for own in (torch.float32, dtype):
        model = tiny_model(own)
        targets = ["language-attention", "language-mlp"]  # this tiny random ViT is ill-conditioned in bfloat16
        half = dict(adapter_dtype=adapter_dtype) if own is dtype else {}
        add_lora(model, r=4, use_dora=use_dora, target_modules=targets, **half)
        fill_adapters(model, std=0.1)
        gradients.append(adapter_gradients(model, tiny_batch((False, False))))
    for name, exact in gradients[0].items():
        got = gradients[1][name]
        assert got.dtype == (getattr(torch, adapter_dtype) if adapter_dtype else dtype)
        assert torch.nn.functional.cosine_similarity(got.float().flatten(), exact.flatten(), 0) > 0.97, name


def test_only_adapters_train():
    model = tiny_model()
    add_lora(model)
    adapters = {id(p) for mixin in lora_mixins(model).values() for p in mixin.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == adapters


def test_a_fixed_order_is_of_adapters_alone():
    model = tiny_model()
    fields = dict(r=4, target_modules=["language-mlp"])
    with pytest.raises(ConfigError, match="fixed_order: mixins.eva.boi would train whole"):
        LoraMixin(model, fixed_order=True, modules_to_save=["boi"], **fields)
    mixins = [LoraMixin(model, fixed_order=fixed, **fields) for fixed in (False, True)]
    assert [mixin._order is None for mixin in mixins] == [True, False]
    assert LoraMixin(model, modules_to_save=["boi"], **fields).trained.tensors.keys() == {"mixins.eva.boi"}


def test_a_mixin_knows_its_model_and_a_copy_the_copy():
    model = tiny_model()
    model.add_mixin("lora", LoraMixin(model, r=4, target_modules=["language-mlp"]))
    copied = copy.deepcopy(model)
    assert model.get_mixin("lora")._model() is model
    assert copied.get_mixin("lora")._model() is copied
    assert {key.count("/") > 0 and key.replace("/", ".") for key in copied.get_mixin("lora").adapters} == {
        *copied.get_mixin("lora").targets
    }


def test_a_mixin_without_a_model_adapts_nothing():
    mixin = LoraMixin(None, r=4)
    assert not mixin.adapters and not mixin.targets and not mixin.trained.tensors
    assert mixin._order is None and mixin._wraps_layers is False


def what_runs(model) -> list:
    """Of each module, its hooks and whether it has a forward of its own."""
    return [(len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()]


def test_a_deleted_mixin_is_freed_and_takes_its_hooks_along():
    model = tiny_model()
    before = what_runs(model)
    gone = [weakref.ref(mixin) for mixin in add_lora(model)]
    remove_lora(model)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert what_runs(model) == before


def test_initial_values_depend_on_the_name_alone():
    everything, few = tiny_model(), tiny_model()
    add_lora(everything, r=4)
    torch.manual_seed(99)
    add_lora(few, r=4, target_modules=["vit-mlp"])
    whole = adapters_of(everything)
    for name, adapter in adapters_of(few).items():
        assert torch.equal(adapter.A, whole[name].A) and not adapter.B.any()


def test_reinit_twice_gives_the_initial_values():
    model = tiny_model()
    (mixin, _) = add_lora(model)
    first = {k: v.clone() for k, v in mixin.state_dict().items()}
    fill_adapters(model)
    mixin.reinit(model)
    mixin.reinit(model)
    assert all(torch.equal(v, first[k]) for k, v in mixin.state_dict().items())


def test_a_rank_above_the_bound_is_halved_with_one_warning_per_shape():
    model = tiny_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        add_lora(model, r=64)
    messages = [str(w.message) for w in caught if "LoRA rank" in str(w.message)]
    assert len(messages) == len(set(messages)) > 0
    for name, adapter in adapters_of(model).items():
        smallest = min(stop - start for start, stop in adapter.target.rows)
        assert (
            adapter.rank * (adapter.target.site.in_features + smallest + 1)
            <= adapter.target.site.in_features * smallest
        ), name
    assert all(adapter.scale == pytest.approx(32 / adapter.rank) for adapter in adapters_of(model).values())


def test_q_and_v_alone_leave_k_untouched():
    model, batch = tiny_model().eval(), tiny_batch()
    add_lora(model, target_modules=["query_key_value"], qkv_slots=("q", "v"))
    fill_adapters(model)
    linear = model.transformer.layers[0].attention.query_key_value
    outputs = []
    handle = linear.register_forward_hook(lambda m, args, out: outputs.append((args[0], out)))
    logits_of(model, batch)
    handle.remove()
    x, y = outputs[0]
    plain = torch.nn.functional.linear(x, linear.weight)
    same = (y == plain).view(-1, 3, 64).all(0).all(1)
    assert same.tolist() == [False, True, False]


def test_dropout_is_unbiased_and_off_in_evaluation():
    model = tiny_model()
    add_lora(model, lora_dropout=0.5, target_modules=["lm-head"])
    fill_adapters(model)
    adapter, head = adapters_of(model)["mixins.lm.lm_head"], model.get_mixin("lm").lm_head
    x, y = torch.randn(1, 64), torch.zeros(1, 1024)
    assert torch.equal(adapter.eval()(y, x, head), adapter(y, x, head))
    expected = adapter(y, x, head)
    adapter.train()
    torch.manual_seed(0)
    mean = adapter(y.expand(20000, -1), x.expand(20000, -1), head).mean(0, keepdim=True)
    assert (mean - expected).norm() / expected.norm() < 0.03


def plain_sat_model(**settings):
    args = argparse.Namespace(
        num_layers=2,
        vocab_size=1024,
        hidden_size=64,
        num_attention_heads=4,
        max_sequence_length=64,
        layernorm_order="pre",
        model_parallel_size=1,
        skip_init=False,
        use_gpu_initialization=False,
        **settings,
    )
    return BaseModel(args)


def test_works_on_any_sat_model_in_two_lines():
    model = plain_sat_model().eval()
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    run = lambda: model(input_ids=ids, position_ids=positions, attention_mask=torch.ones(1, 1, 12, 12).tril())[0]  # noqa: E731
    base = run()
    model.add_mixin("lora", LoraMixin(model, r=8, lora_alpha=16))
    assert torch.equal(run(), base)
    fill_adapters(model)
    assert not torch.allclose(run(), base, atol=1e-3)
    model.del_mixin("lora")
    assert torch.equal(run(), base)


def test_the_table_counts_what_trains():
    model = tiny_model()
    add_lora(model, r=4)
    rows = {row["part"]: row for row in describe(model)}
    assert rows["total"]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rows["lm-head"]["adapted"] == 0 and rows["vit-mlp"]["adapted"] == rows["vit-mlp"]["layers"] == 4
    assert {
        "language-attention",
        "language-mlp",
        "vision-expert-attention",
        "vision-expert-mlp",
        "vit-attention",
        "projector",
    } <= rows.keys()
    assert "vision-expert-mlp" in describe_text(model)


def test_wrong_settings_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        LoraConfig(r=0, lora_alpha=float("nan"), lora_dropout=1.0, qkv_slots=("x",))
    for word in ("r has to be", "lora_alpha has to be", "lora_dropout has to be", "qkv_slots has to"):
        assert word in str(error.value)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match="'lora_alfa', did you mean 'lora_alpha'"):
        LoraConfig.from_dict({"lora_alfa": 3})


def test_the_hook_around_layers_is_there_where_another_mixin_has_it():
    """With it SAT calls no layer as a module any more; without it that is left to SAT."""

    class AroundLayers(BaseMixin):
        def layer_forward(self, hidden_states, mask, *args, **kw_args):
            return self.transformer.layers[kw_args["layer_id"]](hidden_states, mask, *args, **kw_args)

    plain, wrapped = plain_sat_model(), plain_sat_model()
    wrapped.add_mixin("around", AroundLayers())
    wrapped.collect_hooks_()
    assert not hasattr(LoraMixin(plain, r=2), "layer_forward")
    assert hasattr(LoraMixin(wrapped, r=2), "layer_forward")
    assert not hasattr(LoraMixin(None, r=2), "layer_forward")

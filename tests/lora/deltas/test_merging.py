"""enable, disable, scale, merge and unmerge on a live model."""

import copy
import gc

import pytest
import torch

from sat_lora import ConfigError, LoraMixin, MergeError, add_lora
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.deltas import merging
from sat_lora.lora.mixin import lora_mixins
from tests.support.sat_subjects import SUBJECTS
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")

EVERYTHING = ["all-linear", "lm-head", "patch-embedding"]
VARIANTS = {
    "lora": dict(),
    "dora": dict(use_dora=True),
    "pissa": dict(init_lora_weights="pissa"),
    "dora with olora": dict(use_dora=True, init_lora_weights="olora"),
    "rslora, q and v": dict(use_rslora=True, qkv_slots="qv"),
}


def adapted(dtype=torch.float32, **fields):
    """(model, its mixins, a batch, the base's logits); adapters have random values."""
    model, batch = tiny_model(dtype).eval(), tiny_batch()
    batch["images"] = batch["images"].to(dtype)
    base = logits_of(model, batch)
    mixins = add_lora(model, **{"r": 4, "lora_alpha": 6, "target_modules": EVERYTHING, **fields})
    fill_adapters(model)
    return model, mixins, batch, base


def base_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "mixins.lora." not in name}


def assert_same_state(model, state):
    now = base_state(model)
    assert now.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in now.items())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_merged_model_computes_what_the_adapted_one_did(fields):
    model, mixins, batch, base = adapted(torch.float64, **fields)
    logits, kinds = logits_of(model, batch), {name: type(module) for name, module in model.named_modules()}
    assert not torch.allclose(logits, base, atol=1e-3)
    for mixin in mixins:
        mixin.merge()
    torch.testing.assert_close(logits_of(model, batch), logits, rtol=1e-6, atol=1e-6)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    calls = []
    for adapter in adapters_of(model).values():
        adapter.register_forward_hook(lambda *_: calls.append(1))
    logits_of(model, batch)
    assert not calls, "a merged adapter costs nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_unmerging_restores_every_bit(dtype, fields):
    model, mixins, batch, _ = adapted(dtype, **fields)
    state, logits = base_state(model), logits_of(model, batch)
    for mixin in mixins:
        mixin.merge()
        mixin.merge()
    assert any(not torch.equal(value, state[name]) for name, value in base_state(model).items())
    for mixin in mixins:
        mixin.unmerge()
        mixin.unmerge()
    assert_same_state(model, state)
    assert torch.equal(logits_of(model, batch), logits)


def test_without_the_originals_the_delta_is_subtracted():
    model, mixins, _, _ = adapted()
    state = base_state(model)
    for mixin in mixins:
        mixin.merge(keep_original=False)
        mixin.unmerge()
    for name, value in base_state(model).items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-6)


def test_dora_without_the_originals_says_that_it_cannot_be_taken_out():
    _, (mixin, _), _, _ = adapted(use_dora=True)
    mixin.merge(keep_original=False)
    with pytest.raises(MergeError, match="DoRA cannot be subtracted; merge with keep_original=True"):
        mixin.unmerge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_half_precision_weights_are_the_exact_sum_rounded_once(dtype):
    model, mixins, _, _ = adapted(dtype)
    expected = {}
    for name, adapter in adapters_of(model).items():
        layer, exact = adapter.target.site.module, adapter.target.site.module.weight.detach().double().clone()
        matrix, row = exact.flatten(1), 0
        for number, (start, stop) in enumerate(adapter.target.rows):
            a, b = adapter.A[number * adapter.rank :][: adapter.rank].double(), adapter.B[row : row + stop - start]
            matrix[start:stop] += (adapter.scale * b.double() @ a).detach()
            row += stop - start
        expected[name] = (layer, exact)
    for mixin in mixins:
        mixin.merge()
    for layer, exact in expected.values():
        assert layer.weight.dtype == dtype
        limits = torch.finfo(dtype)
        torch.testing.assert_close(layer.weight.double(), exact, rtol=0.501 * limits.eps, atol=limits.tiny)


def test_a_sum_that_is_not_finite_changes_nothing_and_is_named():
    model, mixins, _, _ = adapted(torch.float16)
    adapter = adapters_of(model)["transformer.layers.1.mlp.dense_4h_to_h"]
    with torch.no_grad():
        adapter.B.fill_(30000)
        adapter.A.fill_(30000)
    state = base_state(model)
    with pytest.raises(MergeError, match=r"transformer.layers.1.mlp.dense_4h_to_h.weight: \d+ merged values are not"):
        mixins[0].merge()
    assert_same_state(model, state)
    assert not mixins[0].merged


def test_disabling_is_a_verb_and_a_context():
    model, mixins, batch, base = adapted()
    logits = logits_of(model, batch)
    for mixin in mixins:
        mixin.disable()
    assert torch.equal(logits_of(model, batch), base)
    for mixin in mixins:
        mixin.enable()
    assert torch.equal(logits_of(model, batch), logits)
    with mixins[0].disable(), mixins[1].disable():
        assert torch.equal(logits_of(model, batch), base)
    assert torch.equal(logits_of(model, batch), logits)
    with pytest.raises(KeyError), mixins[0].disable():
        raise KeyError
    assert torch.equal(logits_of(model, batch), logits)


def test_a_merged_mixin_cannot_be_disabled_before_it_is_unmerged():
    _, (mixin, _), _, _ = adapted()
    mixin.merge()
    with pytest.raises(ConfigError, match=r"unmerge\(\) before disable\(\)"):
        mixin.disable()


def test_a_disabled_mixin_cannot_be_merged_before_it_is_enabled():
    _, (mixin, _), _, _ = adapted()
    mixin.enabled = False
    with pytest.raises(ConfigError, match=r"enable\(\) before merge\(\)"):
        mixin.merge()


def test_after_reinit_the_weights_as_they_are_count_as_the_base():
    """SAT calls reinit after it has loaded a checkpoint, over merged weights too."""
    model, mixins, batch, base = adapted()
    for mixin in mixins:
        mixin.merge()
    model.load_state_dict(base_state(tiny_model()), strict=False)
    for mixin in mixins:
        mixin.reinit(model)
        assert not mixin.merged
    assert torch.equal(logits_of(model, batch), base)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_scale_multiplies_the_delta_at_run_time_and_in_the_merged_weight(use_dora):
    model, mixins, batch, base = adapted(torch.float64, use_dora=use_dora)
    for mixin in mixins:
        mixin.scale = 0.25
    quarter = logits_of(model, batch)
    for mixin in mixins:
        mixin.merge()
    torch.testing.assert_close(logits_of(model, batch), quarter, rtol=1e-6, atol=1e-6)
    for mixin in mixins:
        mixin.unmerge()
        mixin.scale = 1.0
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.B *= 0.25
    torch.testing.assert_close(logits_of(model, batch), quarter, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(quarter, base, atol=1e-3)


def test_a_scale_of_zero_is_the_base_without_dora():
    model, mixins, batch, base = adapted()
    for mixin in mixins:
        mixin.scale = 0.0
    torch.testing.assert_close(logits_of(model, batch), base, rtol=0, atol=0)


def test_two_merged_mixins_add_up():
    model, batch = tiny_model(torch.float64).eval(), tiny_batch()
    batch["images"] = batch["images"].double()
    add_lora(model, r=4)
    fill_adapters(model)
    add_lora(model, r=2, target_modules=["language-mlp", "vit-attention"], name="second")
    for adapter in adapters_of(model, "second").values():
        torch.nn.init.normal_(adapter.B, std=0.2)
    both, state = logits_of(model, batch), {n: p.clone() for n, p in model.named_parameters()}
    mixins = list(lora_mixins(model).values())
    for mixin in mixins:
        mixin.merge()
    torch.testing.assert_close(logits_of(model, batch), both, rtol=1e-6, atol=1e-6)
    for mixin in reversed(mixins):
        mixin.unmerge()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_a_tied_embedding_is_refused_where_merging_would_change_the_head():
    subject = SUBJECTS["plain"]
    model = subject.build().eval()
    base = subject.run(model)
    model.add_mixin("lora", LoraMixin(model, r=4, target_modules=["word_embeddings"]))
    fill_adapters(model)
    assert not torch.allclose(subject.run(model), base)
    with pytest.raises(MergeError, match="word_embeddings.weight is the output head's weight too"):
        model.get_mixin("lora").merge()


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_word_and_position_embeddings_take_a_delta(name):
    """The delta is what the same rows of a changed table would give; LLaMA's table is not the head's."""
    subject = SUBJECTS[name]
    model, changed = subject.build().eval(), subject.build().eval()
    targets = ["word_embeddings"] if name == "llama" else ["position_embeddings"]
    model.add_mixin("lora", LoraMixin(model, r=4, lora_alpha=8, target_modules=targets))
    fill_adapters(model)
    (adapter,) = adapters_of(model).values()
    with torch.no_grad():
        changed.transformer.get_submodule(targets[0]).weight += 2 * (adapter.B @ adapter.A).T
    out = subject.run(model)
    torch.testing.assert_close(out, subject.run(changed), rtol=1e-6, atol=1e-6)
    model.get_mixin("lora").merge()
    torch.testing.assert_close(subject.run(model), out, rtol=1e-6, atol=1e-6)


def test_a_copied_model_has_adapters_of_its_own():
    model, mixins, batch, base = adapted()
    logits = logits_of(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, batch), logits)
    with torch.no_grad():
        for adapter in adapters_of(twin).values():
            adapter.B.zero_()
    assert torch.equal(logits_of(twin, batch), base) and torch.equal(logits_of(model, batch), logits)
    mixins.clear()
    del model
    gc.collect()
    fill_adapters(twin)
    assert torch.equal(logits_of(twin, batch), logits)
    for mixin in lora_mixins(twin).values():
        mixin.merge()
    torch.testing.assert_close(logits_of(twin, batch), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_not_finite_is_counted_over_the_ranks(monkeypatch, size):
    """As if another rank had three such values."""
    monkeypatch.setattr(merging, "model_parallel_layout", lambda: (0, size))
    monkeypatch.setattr(merging.mpu, "get_model_parallel_group", lambda: "ranks")
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, group: tensor.add_(3 if group == "ranks" else 0)
    )
    whole = torch.ones(2, 2)
    if size == 1:
        assert merging.refuse_non_finite("a.weight", whole) is None
    else:
        with pytest.raises(MergeError, match="^a.weight: 3 merged values are not finite in torch.float32"):
            merging.refuse_non_finite("a.weight", whole)
    whole[0] = float("inf")
    with pytest.raises(MergeError, match=f"^a.weight: {2 + 3 * (size - 1)} merged values are not finite"):
        merging.refuse_non_finite("a.weight", whole)


def test_a_weight_that_serves_twice_is_not_merged():
    model = tiny_model()
    layers = model.transformer.layers
    layers[1].attention.dense.weight = layers[0].attention.dense.weight
    mixins = add_lora(model, r=4, target_modules=["attention.dense"])
    names = [f"transformer.layers.{number}.attention.dense" for number in range(2)]
    with pytest.raises(
        MergeError, match=f"{names[0]}.weight is shared by {names[0]} and {names[1]}; it cannot be merged"
    ):
        mixins[0].merge()
    assert not mixins[0].merged


def test_originals_are_told_where_they_were_kept():
    model = tiny_model()
    (mixin,) = add_lora(model, r=4, target_modules=["language-mlp"])
    fill_adapters(model)
    before = {id(target.site.module.weight): target.site.module.weight.clone() for target in mixin.targets.values()}
    mixin.merge()
    originals = mixin._state.merged.originals()
    assert [id(weight) for weight, _ in originals] == [*before]
    assert all(torch.equal(original, before[id(weight)]) for weight, original in originals)
    mixin.unmerge()
    mixin.merge(keep_original=False)
    assert mixin._state.merged.originals() is None

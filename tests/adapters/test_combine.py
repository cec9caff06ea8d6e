"""Adapters combined into one: against PEFT in float64, against the plain sum, and on a model."""

import math

import pytest
import torch
from safetensors.torch import load_file

from sat_lora import add_lora, combine_adapters, load_adapter
from sat_lora.adapters.combine_factors import svd, ties_sum
from sat_lora.adapters.format import LayerEntry
from sat_lora.adapters.read import read_adapter
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.mixin import lora_mixins
from sat_lora.lora.targets import bounded_rank
from tests.support.combining import (
    DENSE,
    QKV,
    adapter_maker,
    assert_same,
    deltas_by_peft,
    deltas_of,
    factors_of,
    summed,
)
from tests.support.tiny import logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def make(tmp_path_factory, single_process_group):
    return adapter_maker(tmp_path_factory.mktemp("adapters"))


# PEFT

RANKS = {"dense": 2, "dense_h_to_4h": 3}
CASES = {
    "the same shape": [{}, {}],
    "three, alphas differ": [{}, {"lora_alpha": 4}, {"alpha_pattern": {"dense": 36}}],
    "ranks differ by layer": [
        {"rank_pattern": RANKS, "alpha_pattern": {name: 4 * rank for name, rank in RANKS.items()}}
    ]
    * 2,
    "layers and slots differ": [
        {"target_modules": ["language-attention"], "qkv_slots": "qv"},
        {"target_modules": ["vit-mlp", DENSE], "lora_alpha": 4},
        {"target_modules": ["query_key_value"], "qkv_slots": "qk"},
    ],
}
METHODS = {
    "cat": ({}, {}),
    "linear": ({}, {}),
    "svd": ({"rank": 3}, {"svd_rank": 3}),
    "ties": ({"density": 0.3}, {"density": 0.3}),
    "ties by number": (
        {"density": 0.6, "majority_sign": "frequency"},
        {"density": 0.6, "majority_sign_method": "frequency"},
    ),
}
EXACT, ROUNDED = [1.0, 0.25, 2.25], [0.7, 0.3, 1.1]
"""Square roots of EXACT times a scale are exact in float32, to which PEFT rounds them."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1), (-1, 1, -1)], ids=["sum", "difference", "from minus"])
def test_deltas_are_those_of_peft(make, tmp_path, case, method, signs):
    folders = [make(seed, **fields) for seed, fields in enumerate(CASES[case])]
    ours, theirs = METHODS[method]
    method = method.split()[0]
    for weights, tolerance in ((EXACT, 1e-12), (ROUNDED, 3e-7)):
        weights = [sign * weight for sign, weight in zip(signs, weights)][: len(folders)]
        out = tmp_path / f"out {tolerance}"
        combine_adapters(folders, out, method=method, weights=weights, **ours)
        assert_same(deltas_of(out), deltas_by_peft(folders, weights, method, **theirs), tolerance)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_ranks_that_differ_between_adapters_are_as_in_peft(make, tmp_path, method):
    folders = [make(0, rank_pattern={"dense": 2}), make(1, r=3, lora_alpha=6, use_rslora=True)]
    combine_adapters(folders, tmp_path / "out", method=method, weights=[1.5, -0.5])
    expected = deltas_by_peft(folders, [1.5, -0.5], method)
    got = deltas_of(tmp_path / "out")
    if method == "svd":  # where PEFT's rank is larger than any adapter's, ours is given the layer's own largest
        assert len(factors_of(tmp_path / "out")[DENSE, ""][0]) == 3
        expected, got = ({k: v for k, v in d.items() if not k[0].endswith("dense")} for d in (expected, got))
    assert_same(got, expected, 1e-12)


# Claims


def test_cat_is_the_sum(make, tmp_path):
    folders = [make(0, use_rslora=True), make(1, r=2, qkv_slots="v"), make(2, target_modules="projector")]
    weights = [0.7, -1.3, 2.0]
    combine_adapters(folders, tmp_path / "out", method="cat", weights=weights)
    assert_same(deltas_of(tmp_path / "out"), summed(folders, weights), 1e-14)
    assert {len(a) for a, _, _ in factors_of(tmp_path / "out").values()} == {4, 6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cat_keeps_the_bits_of_half_precision_factors_of_equal_strength(make, tmp_path, dtype):
    folders = [make(0, dtype, lora_alpha=5), make(1, dtype, lora_alpha=10)]
    combine_adapters(folders, tmp_path / "out", method="cat", weights=[0.6, -0.3])
    one, two, out = (load_file(folder / WEIGHTS) for folder in (*folders, tmp_path / "out"))
    for key, tensor in out.items():
        dim = 0 if key.endswith("A") else 1
        second = -two[key] if key.endswith("A") else two[key]
        assert tensor.dtype == dtype and torch.equal(tensor, torch.cat([one[key], second], dim))
    assert factors_of(tmp_path / "out")[DENSE, ""][2] == pytest.approx(0.6 * 5 / 4, rel=1e-15)


ON_MODELS = {
    "layers and ranks differ": [{}, {"r": 2, "target_modules": ["language-mlp", "vit-mlp"]}],
    "convolution and embeddings": [
        {"target_modules": ".*", "exclude_modules": ".*vit.*word_embeddings"},  # which has a single id
        {"target_modules": "transformer.word_embeddings|.*proj.*", "r": 2},
    ],
    "a rank above the bound": [{"r": 20}, {"r": 20, "target_modules": ["language-attention", "vit-attention"]}],
    "a pair subtracted from the base": [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora", "r": 2}],
}


@pytest.mark.parametrize("case", ON_MODELS)
def test_two_adapters_on_a_model_and_their_cat_give_the_same_logits(make, tmp_path, case):
    folders, batch = [make(seed, **fields) for seed, fields in enumerate(ON_MODELS[case])], tiny_batch()
    batch["images"] = batch["images"].double()
    combine_adapters(folders, tmp_path / "out", method="cat")
    both, combined = tiny_model(torch.float64).eval(), tiny_model(torch.float64).eval()
    base = logits_of(both, batch)
    load_adapter(both, folders[0], name="one")
    load_adapter(both, folders[1], name="two")
    load_adapter(combined, tmp_path / "out")
    torch.testing.assert_close(logits_of(combined, batch), logits_of(both, batch), rtol=1e-9, atol=1e-9)
    assert (logits_of(both, batch) - base).norm() > 0.1 * base.norm()
    ranks = {name: adapter.rank for name, adapter in adapters_of(combined).items()}
    assert ranks == {name: entry.r for name, entry in read_adapter(tmp_path / "out").layers.items()}
    if case == "a rank above the bound":
        assert ranks[QKV] == 40 > bounded_rank(40, 64, 64)
    if case == "convolution and embeddings":
        kinds = {adapter.kind.name for adapter in adapters_of(combined).values()}
        assert kinds == {"column", "row", "linear", "conv", "embedding", "vocab"}


def test_adapters_on_one_model_are_as_strong_as_their_weighted_cat(make, tmp_path):
    folders, weights, batch = [make(0), make(1, r=2)], [0.7, -0.4], tiny_batch()
    batch["images"] = batch["images"].double()
    combine_adapters(folders, tmp_path / "out", method="cat", weights=weights)
    both, combined = tiny_model(torch.float64).eval(), tiny_model(torch.float64).eval()
    for folder, weight, name in zip(folders, weights, ("one", "two")):
        load_adapter(both, folder, name=name)
        for path, mixin in lora_mixins(both).items():
            if path.endswith(name):
                mixin.scale = weight
    load_adapter(combined, tmp_path / "out")
    torch.testing.assert_close(logits_of(combined, batch), logits_of(both, batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_combined_adapter_loads_with_its_deltas(make, tmp_path, method):
    """Ranks and alphas by name: the vision transformer's layers have names that end in those of the language model."""
    language, vit = r"^transformer\.layers\.0\.attention\.dense", r"mixins\.eva\..*\.1\.attention\.dense"
    fields = {"target_modules": ["language-attention", "vit-attention"], "rank_pattern": {language: 2, vit: 3}}
    folders = [make(0, **fields, use_rslora=True), make(1, **fields, alpha_pattern={language: 7})]
    combine_adapters(folders, tmp_path / "out", method=method.split()[0], weights=[1.3, -0.9], **METHODS[method][0])
    model = tiny_model(torch.float64)
    load_adapter(model, tmp_path / "out")
    expected = deltas_of(tmp_path / "out")
    for name, adapter in adapters_of(model).items():
        b = adapter.B.detach().split([stop - start for start, stop in adapter.target.rows])
        a = adapter.A.detach().split(adapter.rank)
        for slot, slot_a, slot_b in zip(adapter.slots or ("",), a, b):
            assert torch.equal(adapter.scale * slot_b @ slot_a, expected[name, slot])
    saved = read_adapter(tmp_path / "out")
    for name, entry in saved.layers.items():
        assert (saved.config.rank_for(name), saved.config.scale_for(name, entry.r)) == (entry.r, entry.scale)


def test_a_combined_adapter_of_other_layers_loads_and_its_config_selects_them(make, tmp_path):
    folders = [
        make(0, layers_to_transform="language:0"),
        make(1, target_modules=["vit-mlp"], exclude_modules="lm-head"),
    ]
    combine_adapters(folders, tmp_path / "out", method="linear")
    model, selected = tiny_model(torch.float64), tiny_model(torch.float64)
    load_adapter(model, tmp_path / "out")
    union = {name for folder in folders for name, _ in factors_of(folder)}
    add_lora(selected, read_adapter(tmp_path / "out").config)
    assert set(adapters_of(model)) == set(adapters_of(selected)) == union


def test_slots_are_combined_each_for_itself_and_get_one_rank(make, tmp_path):
    folders = [make(0, qkv_slots="qv"), make(1, qkv_slots="kv", r=2)]
    combine_adapters(folders, tmp_path / "out", method="cat", weights=[1.0, 2.0])
    entry, got = read_adapter(tmp_path / "out").layers[QKV], deltas_of(tmp_path / "out")
    assert entry == LayerEntry("column", 6, 16.0, ("q", "k", "v"), ((0, 64), (64, 128), (128, 192)))
    one, two = map(deltas_of, folders)
    expected = {"q": one[QKV, "q"], "k": 2 * two[QKV, "k"], "v": one[QKV, "v"] + 2 * two[QKV, "v"]}
    for slot, delta in expected.items():
        torch.testing.assert_close(got[QKV, slot], delta, rtol=1e-13, atol=1e-14)
    load_adapter(tiny_model(torch.float64), tmp_path / "out")


def test_svd_is_the_best_approximation_of_the_sum(make, tmp_path):
    folders, weights = [make(0), make(1, r=3)], [1.0, -0.5]
    combine_adapters(folders, tmp_path / "out", method="svd", weights=weights, rank=5)
    got, total = deltas_of(tmp_path / "out"), summed(folders, weights)
    for site, delta in got.items():
        tail = torch.linalg.svdvals(total[site])[5:].norm()
        assert (total[site] - delta).norm() == pytest.approx(float(tail), rel=1e-9)


def test_svd_never_forms_the_whole_matrix():
    """The out x in matrix of these factors would take 640 GB."""
    generator = torch.Generator().manual_seed(0)
    delta = Delta(torch.randn(2, 400_000, generator=generator), torch.randn(400_000, 2, generator=generator))
    total = svd([delta, delta], 2)
    torch.testing.assert_close(total.b[:5] @ total.a[:, :5], 2 * delta.b[:5] @ delta.a[:, :5], rtol=1e-3, atol=1e-4)


def test_svd_has_no_rank_that_would_be_zero(make, tmp_path):
    combine_adapters([make(0, r=2), make(1, r=2)], tmp_path / "out", method="svd", rank=40)
    factors = factors_of(tmp_path / "out").values()
    assert {len(a) for a, _, _ in factors} == {4}
    assert all(float(a.norm(dim=1).min()) > 0.01 for a, _, _ in factors)


def test_an_initialisation_that_wants_even_ranks_does_not_keep_a_sum_from_odd_ones(make, tmp_path):
    combine_adapters([make(0, init_lora_weights="orthogonal")], tmp_path / "out", method="svd", rank=3)
    assert read_adapter(tmp_path / "out").config.init_lora_weights == "kaiming"
    load_adapter(tiny_model(torch.float64), tmp_path / "out")


def test_svd_of_one_adapter_lowers_its_rank(make, tmp_path):
    folder = make(0)
    combine_adapters([folder], tmp_path / "out", method="svd", rank=1)
    got = deltas_of(tmp_path / "out")
    for site, delta in deltas_of(folder).items():
        u, s, vh = torch.linalg.svd(delta)
        torch.testing.assert_close(got[site], s[0] * u[:, :1] @ vh[:1])


def test_ties_keeps_the_large_and_averages_what_agrees():
    one, two = torch.tensor([[4.0, -3.0, 0.1, 2.0]]), torch.tensor([[-1.0, -5.0, 6.0, 0.2]])
    # Kept at 3 of 4: 4 -3 . 2 and -1 -5 6 .; elected + - + +
    assert ties_sum([one, two], [1.0, 1.0], 0.75, "total").tolist() == [[4.0, -4.0, 6.0, 2.0]]
    assert ties_sum([one, two], [1.0, 3.0], 0.75, "total").tolist() == [[4.0, -9.0, 18.0, 2.0]]
    three = torch.tensor([[-1.0, 0.0, 0.0, 0.0]])
    assert ties_sum([one, two, three], [1.0] * 3, 1.0, "total")[0, 0] == 4
    assert ties_sum([one, two, three], [1.0] * 3, 1.0, "frequency")[0, 0] == -1


def test_a_weight_of_zero_takes_an_adapter_out(make, tmp_path):
    folders = [make(0), make(1)]
    for method in ("cat", "linear", "svd"):
        combine_adapters(folders, tmp_path / method, method=method, weights=[0, 1.5])
        assert_same(deltas_of(tmp_path / method), summed(folders[1:], [1.5]), 1e-12)
    combine_adapters(folders, tmp_path / "none", method="cat", weights=[0, 0])
    assert all(not delta.any() for delta in deltas_of(tmp_path / "none").values())


def test_dtypes_are_promoted_and_rounded_once(make, tmp_path):
    folders = [make(0, torch.bfloat16, adapter_dtype="float32"), make(1, torch.bfloat16)]
    combine_adapters(folders, tmp_path / "mixed", method="linear", weights=[0.4, 0.6])
    assert {t.dtype for t in load_file(tmp_path / "mixed" / WEIGHTS).values()} == {torch.float32}
    folders = [make(0, torch.bfloat16, qkv_slots="qv"), make(1, torch.bfloat16, adapter_dtype="float32")]
    combine_adapters(folders, tmp_path / "slots", method="linear", weights=[0.4, 0.6])
    assert {t.dtype for t in load_file(tmp_path / "slots" / WEIGHTS).values()} == {torch.float32}
    folders = [make(2, torch.bfloat16), make(3, torch.bfloat16)]
    combine_adapters(folders, tmp_path / "half", method="linear", weights=[0.4, 0.6])
    one, two, out = (load_file(folder / WEIGHTS) for folder in (*folders, tmp_path / "half"))
    for key, tensor in out.items():
        exact = math.sqrt(2 / 3) * one[key].double() + two[key].double()
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact, rtol=0.501 * torch.finfo(torch.bfloat16).eps, atol=1e-9)


def test_the_same_call_writes_the_same_bytes_and_leaves_the_adapters_alone(make, tmp_path):
    folders = [make(0), make(1)]

    def bytes_of(*paths):
        return [(path / name).read_bytes() for path in paths for name in (WEIGHTS, CONFIG)]

    before = bytes_of(*folders)
    combine_adapters(folders, tmp_path / "a", method="svd", rank=2)
    combine_adapters(folders, tmp_path / "b", method="svd", rank=2)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") and bytes_of(*folders) == before


def test_an_adapter_may_be_given_twice(make, tmp_path):
    combine_adapters([make(0)] * 3, tmp_path / "out", method="cat", weights=[1.0, 0.5, 1.5])
    assert_same(deltas_of(tmp_path / "out"), summed([make(0)], [3.0]), 1e-14)

"""Adapters combined into one: against PEFT in float64, against the plain sum, and what is refused."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sat_lora import AdapterError, ConfigError, LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.adapter_file import adapters_of, read_adapter
from sat_lora.combine import Source, combine_adapters, combine_layer, keys_of
from sat_lora.combine_factors import cat, svd, ties_sum
from tests.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QKV, DENSE = "transformer.layers.0.attention.query_key_value", "transformer.layers.0.attention.dense"
SMALL = {"target_modules": ["language-attention", "vit-mlp"], "r": 4, "lora_alpha": 16}


@pytest.fixture
def make(tmp_path):
    """Saves an adapter with seeded values and gives its folder."""

    def adapter(seed, dtype=torch.float64, **fields):
        model = tiny_model(dtype)
        add_lora(model, LoraConfig(**{**SMALL, **fields}))
        fill_adapters(model, seed)
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        save_adapter(model, folder)
        return folder

    return adapter


def factors_of(folder):
    """{(layer, slot): (A, B, scale)} of an adapter folder, in float64."""
    _, own, tensors = read_adapter(folder)
    return {
        (name, slot): (*(tensors[key].double() for key in keys_of(name, slot)), entry["scale"])
        for name, entry in own["linears"].items()
        for slot in entry["slots"] or ("",)
    }


def deltas_of(folder):
    return {site: s * b @ a for site, (a, b, s) in factors_of(folder).items()}


def summed(folders, weights):
    total = {}
    for folder, weight in zip(folders, weights):
        for site, delta in deltas_of(folder).items():
            total[site] = total.get(site, 0) + weight * delta
    return total


def deltas_by_peft(folders, weights, method, **options):
    """The same by PEFT's add_weighted_adapter, on an nn.Sequential with one linear for each slot."""
    peft = pytest.importorskip("peft")
    adapters = [factors_of(folder) for folder in folders]
    sites = sorted({site for adapter in adapters for site in adapter})
    shapes = [next((b.shape[0], a.shape[1]) for a, b, _ in (d[s] for d in adapters if s in d)) for s in sites]
    plain = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)).double()
    model = None
    for number, adapter in enumerate(adapters):
        ranks = {str(i): len(adapter[site][0]) for i, site in enumerate(sites) if site in adapter}
        alphas = {i: adapter[sites[int(i)]][2] * rank for i, rank in ranks.items()}
        config = peft.LoraConfig(
            r=max(ranks.values()), target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas
        )
        if model is None:
            model = peft.get_peft_model(plain, config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
        for i in ranks:
            a, b, _ = adapter[sites[int(i)]]
            layer = model.base_model.model[int(i)]
            layer.lora_A[str(number)].weight.data.copy_(a)
            layer.lora_B[str(number)].weight.data.copy_(b)
    names = [str(number) for number in range(len(adapters))]
    model.base_model.add_weighted_adapter(names, weights, "combined", combination_type=method, **options)
    layers = model.base_model.model
    return {site: layers[i].get_delta_weight("combined").detach() for i, site in enumerate(sites)}


def assert_same(deltas, expected, tolerance):
    assert deltas.keys() == expected.keys()
    for site, delta in deltas.items():
        assert (delta - expected[site]).norm() <= tolerance * expected[site].norm(), site


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


def test_two_adapters_on_a_model_and_their_cat_give_the_same_logits(make, tmp_path):
    folders, batch = [make(0), make(1, r=2, target_modules=["language-mlp", "vit-mlp"])], tiny_batch()
    batch["images"] = batch["images"].double()
    combine_adapters(folders, tmp_path / "out", method="cat")
    both, combined = tiny_model(torch.float64).eval(), tiny_model(torch.float64).eval()
    base = logits_of(both, batch)
    load_adapter(both, folders[0], name="one")
    load_adapter(both, folders[1], name="two")
    load_adapter(combined, tmp_path / "out")
    torch.testing.assert_close(logits_of(combined, batch), logits_of(both, batch), rtol=1e-9, atol=1e-9)
    assert (logits_of(both, batch) - base).norm() > 0.1 * base.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_combined_adapter_loads_with_its_deltas(make, tmp_path, method):
    """Ranks and alphas by name: the vision transformer's layers have names that end in those of the language model."""
    language, vit = r"^transformer\.layers\.0\.attention\.dense", r"mixins\.eva\..*\.0\.attention\.dense"
    fields = {"target_modules": ["language-attention", "vit-attention"], "rank_pattern": {language: 2, vit: 3}}
    folders = [make(0, **fields, use_rslora=True), make(1, **fields, alpha_pattern={language: 7})]
    combine_adapters(folders, tmp_path / "out", method=method.split()[0], weights=[1.3, -0.9], **METHODS[method][0])
    model = tiny_model(torch.float64)
    load_adapter(model, tmp_path / "out")
    expected = deltas_of(tmp_path / "out")
    for name, adapter in adapters_of(model).items():
        b = adapter.B.detach().split([stop - start for start, stop in adapter.slot_rows])
        a = adapter.A.detach().split(adapter.rank)
        for slot, slot_a, slot_b in zip(adapter.slots or ("",), a, b):
            assert torch.equal(adapter.scale * slot_b @ slot_a, expected[name, slot])
    config, own, _ = read_adapter(tmp_path / "out")
    for name, entry in own["linears"].items():
        assert config.rank_for(name) == entry["r"] and config.scale_for(name, entry["r"]) == entry["scale"]


def test_a_combined_adapter_of_other_layers_loads_and_its_config_selects_them(make, tmp_path):
    folders = [
        make(0, layers_to_transform="language:0"),
        make(1, target_modules=["vit-mlp"], exclude_modules="lm-head"),
    ]
    combine_adapters(folders, tmp_path / "out", method="linear")
    model, selected = tiny_model(torch.float64), tiny_model(torch.float64)
    load_adapter(model, tmp_path / "out")
    union = {name for folder in folders for name, _ in factors_of(folder)}
    add_lora(selected, read_adapter(tmp_path / "out")[0])
    assert set(adapters_of(model)) == set(adapters_of(selected)) == union


def test_slots_are_combined_each_for_itself_and_get_one_rank(make, tmp_path):
    folders = [make(0, qkv_slots="qv"), make(1, qkv_slots="kv", r=2)]
    combine_adapters(folders, tmp_path / "out", method="cat", weights=[1.0, 2.0])
    entry, got = read_adapter(tmp_path / "out")[1]["linears"][QKV], deltas_of(tmp_path / "out")
    assert (entry["r"], entry["slots"]) == (6, ("q", "k", "v"))
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
    triples = [(torch.randn(2, 400_000, generator=generator), torch.randn(400_000, 2, generator=generator), 1.0)] * 2
    a, b = svd(triples, 2)
    torch.testing.assert_close(b[:5] @ a[:, :5], (2 * triples[0][1][:5] @ triples[0][0][:, :5]), rtol=1e-3, atol=1e-4)


def test_svd_has_no_rank_that_would_be_zero(make, tmp_path):
    combine_adapters([make(0, r=2), make(1, r=2)], tmp_path / "out", method="svd", rank=40)
    factors = factors_of(tmp_path / "out").values()
    assert {len(a) for a, _, _ in factors} == {4}
    assert all(float(a.norm(dim=1).min()) > 0.01 for a, _, _ in factors)


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


def test_other_values_of_an_entry_come_along_slot_by_slot():
    """What later versions of the file say about a layer is not lost."""

    def source(slots, rows):
        entry = {"r": 1, "scale": 1.0, "slots": slots, "kind": "column", "rows": rows}
        tensors = {key: torch.ones(1, 1) for slot in slots for key in keys_of("x", slot)}
        return Source("", 1.0, LoraConfig(), {}, {"x": entry}, tensors)

    entry, _ = combine_layer("x", [source(("q", "v"), [(0, 4), (8, 12)]), source(("k",), [(4, 8)])], cat)
    assert entry["kind"] == "column" and entry["slots"] == ("q", "k", "v")
    assert entry["rows"] == [(0, 4), (4, 8), (8, 12)]


# Refusals


def change(folder, tensors=(), **own):
    """Change tensors (None removes one) and what the config says under `sat_lora`."""
    content = load_file(folder / WEIGHTS)
    content = {key: tensor for key, tensor in {**content, **dict(tensors)}.items() if tensor is not None}
    save_file(content, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config["sat_lora"].update(own)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture
def pair(make):
    return [make(0, torch.float32), make(1, torch.float32)]


def assert_refused(folders, out, error, *messages, **arguments):
    with pytest.raises(error) as caught:
        combine_adapters(folders, out, **{"method": "cat", **arguments})
    for message in messages:
        assert re.search(message, str(caught.value)), (message, str(caught.value))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folders": []}, r"a list of at least one adapter folder, got \[\]"),
        ({"folders": "adapter"}, "a list of at least one adapter folder, got 'adapter'"),
        ({"method": "tise", "density": 0.5}, "no method 'tise', did you mean 'ties'. known: cat, linear, svd, ties"),
        ({"method": None}, "no method None"),
        ({"weights": [1.0]}, r"one finite number for each of 2 folders, got \[1.0\]"),
        ({"weights": []}, r"one finite number for each of 2 folders, got \[\]"),
        ({"weights": [1.0, float("nan")]}, r"one finite number for each of 2 folders, got \[1.0, nan\]"),
        ({"weights": [1.0, "2"]}, r"one finite number for each of 2 folders, got \[1.0, '2'\]"),
        ({"method": "ties"}, "ties needs a density"),
        ({"method": "ties", "density": 0}, "density has to be above 0 and at most 1, got 0"),
        ({"method": "ties", "density": 1.5}, "density has to be above 0 and at most 1, got 1.5"),
        ({"method": "ties", "density": float("nan")}, "density has to be above 0 and at most 1, got nan"),
        ({"method": "linear", "density": 0.5}, "density is for ties, linear does not use it"),
        ({"method": "cat", "rank": 4}, "rank is for svd, cat does not use it"),
        ({"method": "svd", "rank": 0}, "rank has to be a whole number of at least 1, got 0"),
        ({"method": "svd", "majority_sign": "frequency"}, "majority_sign is for ties, svd does not use it"),
        ({"method": "ties", "density": 1, "majority_sign": "sum"}, "no majority_sign 'sum', did you mean"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_read(tmp_path, arguments, message):
    arguments = {"folders": ["nowhere", "neither"], **arguments}
    assert_refused(arguments.pop("folders"), tmp_path / "out", ConfigError, message, **arguments)


def test_all_wrong_arguments_are_listed_at_once(tmp_path):
    messages = (
        "at least one adapter folder",
        "no method 'svt', did you mean 'svd'",
        "rank has",
        "density has",
        "exists",
    )
    with pytest.raises(ConfigError) as caught:
        combine_adapters([], tmp_path, method="svt", rank=-1, density=2)
    assert all(message in str(caught.value) for message in messages)


def test_an_existing_folder_is_not_overwritten(pair):
    before = (pair[1] / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        combine_adapters(pair, pair[1], method="cat")
    assert (pair[1] / WEIGHTS).read_bytes() == before


def test_everything_wrong_with_the_adapters_is_listed_at_once(pair, tmp_path, make):
    change(pair[1], base_fingerprint="another")
    third = change(make(2, torch.float32, r=2), {f"{DENSE}.lora_A": None})
    folders = [*pair, third, tmp_path / "nowhere"]
    text = assert_refused(
        folders,
        tmp_path / "out",
        AdapterError,
        f"{pair[1]}: trained on a base with other names or shapes than {pair[0]}",
        f"{third}: missing: {DENSE}.lora_A",
        rf"{DENSE}: linear wants equal ranks, got \[4, 4, 2\]; svd and cat take any",
        "nowhere is not an adapter folder",
        method="linear",
    )
    assert f"{third}: trained" not in text


def test_dora_magnitudes_and_whole_tensors_of_the_base_are_refused_by_name(pair, tmp_path):
    change(pair[0], {f"{DENSE}.lora_magnitude": torch.ones(64), f"{QKV}.q.lora_magnitude": torch.ones(64)})
    change(pair[1], {"mixins.eva.boi": torch.ones(1, 64)}, trained=["mixins.eva.boi"])
    assert_refused(
        pair,
        tmp_path / "out",
        AdapterError,
        f"{pair[0]}: DoRA magnitudes cannot be combined: {DENSE}.lora_magnitude, {QKV}.q.lora_magnitude",
        f"{pair[1]}: whole tensors of the base .* cannot be combined: mixins.eva.boi",
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{DENSE}.lora_A": torch.ones(3, 64)}, rf"{DENSE}.lora_A: shape \(3, 64\) does not go with rank 4"),
        ({f"{DENSE}.lora_B": torch.ones(64)}, rf"{DENSE}.lora_B: shape \(64,\) does not go with rank 4"),
        (
            {f"{DENSE}.lora_B": torch.ones(63, 4)},
            rf"{DENSE}.lora_B: \(64,\) features in one adapter, \(63,\) in another",
        ),
        ({f"{DENSE}.lora_A": torch.ones(4, 64, dtype=torch.int64)}, "dtype torch.int64"),
        ({f"{DENSE}.lora_A": torch.full((4, 64), float("inf"))}, "holds values that are not finite"),
        ({f"{DENSE}.lora_C": torch.ones(4)}, f"neither A nor B of an adapted layer: {DENSE}.lora_C"),
    ],
)
def test_a_damaged_adapter_is_refused(pair, tmp_path, tensors, message):
    change(pair[1], tensors)
    assert_refused(pair, tmp_path / "out", AdapterError, message)


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties"])
def test_a_combination_that_overflows_is_refused(pair, tmp_path, method):
    for folder in pair:
        change(folder, {f"{DENSE}.lora_A": torch.full((4, 64), 3e38), f"{DENSE}.lora_B": torch.full((64, 4), 3e38)})
    if method in ("linear", "svd"):
        assert_refused(pair, tmp_path / "out", AdapterError, DENSE, method=method)
    text = assert_refused(pair, tmp_path / "out", AdapterError, weights=[1e308, 1.0])
    assert f"{DENSE}: weight times scale is not finite" in text


def test_slots_in_one_adapter_only_are_refused(pair, tmp_path):
    config = json.loads((pair[1] / CONFIG).read_text())
    config["sat_lora"]["linears"][QKV]["slots"] = []
    change(pair[1], {f"{QKV}.lora_A": torch.ones(4, 64), f"{QKV}.lora_B": torch.ones(192, 4)}, **config["sat_lora"])
    assert_refused(pair, tmp_path / "out", AdapterError, f"{QKV}: cut into slots in one adapter and not in another")


def test_an_adapter_of_nothing_is_refused(pair, tmp_path):
    change(pair[1], dict.fromkeys(load_file(pair[1] / WEIGHTS)), linears={})
    assert_refused(pair, tmp_path / "out", AdapterError, f"{pair[1]}: adapts nothing")


def test_a_write_that_fails_leaves_nothing(pair, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    assert_refused(pair, tmp_path / "out", AdapterError, "out: the combined adapter could not be written: .*No space")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folder.name for folder in pair)


def test_an_adapter_may_be_given_twice(pair, tmp_path):
    combine_adapters([pair[0], shutil.copytree(pair[0], tmp_path / "copy"), pair[0]], tmp_path / "out", method="cat")
    assert_same(deltas_of(tmp_path / "out"), summed([pair[0]], [3.0]), 1e-6)

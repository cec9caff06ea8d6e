"""LoftQ against the published algorithm in float64, written anew here; and what it does on layers and models."""

import copy

import pytest
import torch

from sat_lora import ConfigError, LoraConfig, LoraMixin, add_lora, load_adapter, quantize_model, save_adapter
from sat_lora.cogvlm.checkpoints.load import load_cogvlm
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.mixin import lora_mixins
from sat_lora.quantization.config import Quantization
from sat_lora.quantized.layers import bytes_of, quantized_weights
from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.quantized.schemes import NF4, SCHEMES
from tests.support.paths import TINY_BASE
from tests.support.quantized_layers import decoded_copy, pair_of
from tests.support.single_layer import adapter_for
from tests.support.tiny import WIDE, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")


def published(weight: torch.Tensor, scheme: str, rank: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q_T, L_T) of LoftQ, arXiv 2310.08659, algorithm 1, in float64."""
    weight = weight.double()
    low_rank = torch.zeros_like(weight)
    for _ in range(rounds):
        quantized = rounded(weight - low_rank, scheme)
        u, singular, vh = torch.linalg.svd(weight - quantized)
        low_rank = u[:, :rank] @ torch.diag(singular[:rank]) @ vh[:rank]
    return quantized, low_rank


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """Each element's nearest value that the scheme has in its block of 64, by trying all of them."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    if scheme == "nf4":
        scales = largest
        levels = torch.tensor(NF4.levels, dtype=torch.float64)
        nearest = levels[(blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)]
    else:
        scales = (largest / 127).float().bfloat16().double()
        nearest = (blocks / scales).round().clamp(-127, 127)
    return (nearest * scales.float().bfloat16().double()).reshape(weight.shape)


def begun(name="linear", scheme="nf4", dtype=torch.float32, **fields):
    """(the layer, its adapter, the weight before it was encoded)."""
    layer, _ = pair_of(name, scheme, dtype)
    original = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer.weight.copy_(original)
    layer.weight.original = original.clone
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "init_lora_weights": "loftq", **fields})
    return layer, adapter_for(layer, config), original


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["linear", "column", "row"])
def test_codes_and_pair_are_those_of_the_published_algorithm(name, scheme, rounds):
    layer, adapter, original = begun(name, scheme, loftq_iter=rounds)
    quantized, low_rank = published(original, scheme, 8, rounds)
    weight = layer.weight
    codes_alone = weight.scheme.decode(weight.codes, weight.scales, torch.float32)
    torch.testing.assert_close(codes_alone.double(), quantized, rtol=1e-6, atol=1e-6)
    pair = adapter.scale * (adapter.B @ adapter.A)
    torch.testing.assert_close(pair.double(), low_rank, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.decoded().double(), quantized + low_rank, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_step_0_is_the_base_and_training_is_that_of_codes_and_pair(dtype):
    """y = Q x + s B A x, with the gradients of that: what the published method trains."""
    layer, adapter, _ = begun(dtype=dtype, loftq_iter=3)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    base = layer(x)
    torch.testing.assert_close(
        adapter(base.clone(), x, layer), base, rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-5
    )
    with torch.no_grad():
        adapter.B.add_(torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(4)), alpha=0.1)
    y = adapter(layer(x), x, layer)
    y.double().square().sum().backward()
    weight = layer.weight
    a, b = (p.detach().double().requires_grad_() for p in (adapter.A, adapter.B))
    quantized = weight.scheme.decode(weight.codes, weight.scales, dtype).double()
    expected = x.double() @ (quantized + adapter.scale * b @ a).T + layer.bias.double()
    expected.square().sum().backward()
    bound = dict(rtol=0.05, atol=3.0) if dtype is torch.bfloat16 else dict(rtol=1e-3, atol=1e-3)
    for ours, theirs in ((y, expected), (adapter.A.grad, a.grad), (adapter.B.grad, b.grad)):
        torch.testing.assert_close(ours.double(), theirs, **bound)


def test_more_rounds_and_rank_come_closer():
    errors = []
    for fields in (dict(), dict(loftq_iter=5), dict(r=16, loftq_iter=5)):
        layer, _, original = begun(**fields)
        errors.append(float((layer.weight.decoded() - original).norm() / original.norm()))
    plain = float((QuantizedWeight.of(original, SCHEMES["nf4"]).decoded() - original).norm() / original.norm())
    assert plain > errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (None, 0.092),
        pytest.param(dict(r=8, loftq_iter=5), 0.075, marks=pytest.mark.matrix),
        (dict(r=16, loftq_iter=5), 0.0647),
    ],
    ids=str,
)
def test_the_error_of_the_tiny_base(fields, expected):
    """Of all quantised linears together, relative; each of q, k and v has a pair of its own."""
    model, _ = load_cogvlm(TINY_BASE, quantize=Quantization())
    if fields is not None:
        add_lora(model, init_lora_weights="loftq", **fields)
    differences, squares = 0.0, 0.0
    for _, weight in quantized_weights(model):
        original = weight.original()
        differences += float((weight.decoded() - original).square().sum())
        squares += float(original.square().sum())
    assert (differences / squares) ** 0.5 == pytest.approx(expected, rel=0.02)


def loftq_model(config=WIDE, dtype=torch.float32, **fields):
    model = tiny_model(dtype, config=config)
    quantize_model(model, keep_originals=True)
    targets = ["layers.0.attention.query_key_value", "layers.1.mlp.dense_4h_to_h", "linear_proj"]
    add_lora(model, **{"r": 4, "init_lora_weights": "loftq", "loftq_iter": 2, "target_modules": targets, **fields})
    return model


def without_mixins(model):
    for sat_model in (model, model.mixins["eva"].vit_model):
        sat_model.del_mixin("lora")
    return model


@pytest.mark.parametrize("fields", [{}, dict(qkv_slots="qv"), dict(use_dora=True), dict(use_rslora=True)], ids=str)
def test_a_fresh_adapter_changes_nothing_and_the_base_comes_closer(fields):
    whole = tiny_model(config=WIDE)
    model = loftq_model(**fields)
    batch = tiny_batch()
    output = logits_of(model, batch)
    mixins = lora_mixins(model).values()
    for mixin in mixins:
        mixin.disable()
    torch.testing.assert_close(logits_of(model, batch), output, rtol=1e-3, atol=1e-3)
    rough = tiny_model(config=WIDE)
    quantize_model(rough)
    wanted = logits_of(whole, batch)
    assert (output - wanted).norm() < (logits_of(rough, batch) - wanted).norm()


def test_rows_without_a_slot_keep_their_codes():
    model = loftq_model(target_modules=["query_key_value"], qkv_slots="qv")
    rough = tiny_model(config=WIDE)
    quantize_model(rough)
    name = "transformer.layers.0.attention.query_key_value"
    ours, theirs = (side.get_submodule(name).weight.decoded() for side in (model, rough))
    k = slice(128, 256)
    assert torch.equal(ours[k], theirs[k]) and not torch.equal(ours[:128], theirs[:128])
    dense = name.replace("query_key_value", "dense")
    assert torch.equal(model.get_submodule(dense).weight, rough.get_submodule(dense).weight)


def test_its_file_is_a_plain_lora_on_any_base(tmp_path):
    """It stores B A - B_0 A_0: on the whole base the delta that was learnt, whatever the codes were."""
    model = loftq_model()
    save_adapter(model, tmp_path / "fresh")
    whole = tiny_model(config=WIDE)
    batch = tiny_batch()
    base = logits_of(whole, batch)
    load_adapter(whole, tmp_path / "fresh")
    torch.testing.assert_close(logits_of(whole, batch), base, rtol=1e-4, atol=1e-4)
    learnt = {}
    for name, adapter in adapters_of(model).items():
        with torch.no_grad():
            adapter.B.add_(torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
        pair, origin = (
            torch.cat([b @ a for a, b in zip(left.chunk(slots), right.split(rows))])
            for left, right in ((adapter.A, adapter.B), (adapter.origin_A, adapter.origin_B))
            for slots, rows in [(adapter.target.slots_count, [stop - start for start, stop in adapter.target.rows])]
        )
        learnt[name] = adapter.scale * (pair - origin)
    save_adapter(model, tmp_path / "trained")
    decoded = without_mixins(decoded_copy(model))
    load_adapter(decoded, tmp_path / "trained", any_base=True)
    torch.testing.assert_close(logits_of(decoded, batch), logits_of(model, batch), rtol=1e-3, atol=1e-3)
    load_adapter(whole, tmp_path / "trained")
    for name, adapter in adapters_of(whole).items():
        delta = adapter.delta()
        slots = adapter.target.slots_count
        rows = [stop - start for start, stop in adapter.target.rows]
        product = torch.cat([b @ a for a, b in zip(delta.a.chunk(slots), delta.b.split(rows))]) * delta.scale
        torch.testing.assert_close(product, learnt[name], rtol=1e-4, atol=1e-4)


def test_it_goes_on_from_its_file(tmp_path):
    model = loftq_model()
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    again = loftq_model()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, tiny_batch()), logits_of(model, tiny_batch()))


def test_a_deleted_mixin_leaves_the_approximated_base():
    model = loftq_model()
    batch = tiny_batch()
    fresh = logits_of(model, batch)
    fill_adapters(model)
    without_mixins(model)
    torch.testing.assert_close(logits_of(model, batch), fresh, rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_whole_begins_as_by_default():
    model = tiny_model(config=WIDE)
    quantize_model(model, keep_originals=True, keep_modules=["projector"])
    add_lora(model, r=4, init_lora_weights="loftq", target_modules=["projector", "layers.0.attention.dense"])
    adapter = adapters_of(model)["mixins.eva.linear_proj.linear_proj"]
    assert not adapter.B.any() and adapter.A.any() and torch.equal(adapter.origin_A, adapter.A)


def test_beginning_again_gives_the_same():
    model = loftq_model()
    before = {name: copy.deepcopy(weight) for name, weight in quantized_weights(model)}
    for mixin in lora_mixins(model).values():
        mixin.reinit()
    assert all(torch.equal(weight, before[name]) for name, weight in quantized_weights(model))


@pytest.mark.parametrize("change", [copy.deepcopy, lambda w: w.to(torch.bfloat16), torch.clone, "pickled"])
def test_what_is_added_goes_where_the_weight_goes(change, tmp_path):
    layer, _, _ = begun()
    weight = layer.weight
    if change == "pickled":
        torch.save(weight, tmp_path / "weight.pt")
        other = torch.load(tmp_path / "weight.pt", weights_only=True)
    else:
        other = change(weight)
    torch.testing.assert_close(other.decoded().float(), weight.decoded(), rtol=0.02, atol=0.02)
    assert other.low_rank.b.dtype is other.dtype and (other.dtype != weight.dtype or torch.equal(other, weight))
    assert bytes_of(weight) == weight.codes.nbytes + weight.scales.nbytes + 4 * 8 * (96 + 128)
    other.copy_(torch.ones(96, 128))
    assert other.low_rank is None and other.original is None and not torch.equal(other, weight)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: add_lora(tiny_model(), init_lora_weights="loftq"), "none of the [0-9]+ adapted layers is quantised"),
        (lambda: LoraMixin(tiny_model(), init_lora_weights="loftq"), "none of the [0-9]+ adapted layers is quantised"),
        (lambda: loftq_model(target_modules=["lm-head"]), "none of the 1 adapted layers is quantised"),
        (
            lambda: LoraConfig(init_lora_weights="loftq", loftq_iter=0),
            "loftq_iter has to be a whole number from 1 to 1000",
        ),
        (lambda: LoraConfig(init_lora_weights="loftq", loftq_iter=True), "loftq_iter has to be a whole number"),
        (lambda: LoraConfig(init_lora_weights="loftq", lora_alpha=-1), "lora_alpha has to be above 0"),
        (lambda: LoraConfig(init_lora_weights="loftq_5"), "init_lora_weights has to be one of kaiming, .*, loftq"),
    ],
)
def test_mistakes_are_one_error(make, problem):
    with pytest.raises(ConfigError, match=problem):
        make()


def test_codes_without_their_original_are_refused_before_anything_changes():
    model = tiny_model(config=WIDE)
    quantize_model(model)
    before = logits_of(model, tiny_batch())
    with pytest.raises(ConfigError, match=r"weight: the weight that its codes were made of.*keep_orig"):
        add_lora(model, init_lora_weights="loftq")
    assert not lora_mixins(model) and torch.equal(logits_of(model, tiny_batch()), before)


def deleted(model):
    add_lora(model, **FIELDS)
    without_mixins(model)


FIELDS = dict(r=2, init_lora_weights="loftq", target_modules=["layers.0.attention.dense", "linear_proj"])
OTHERS = {
    "a plain adapter on all of them": lambda model: add_lora(model, r=2),
    "one on one of them": lambda model: add_lora(model, r=2, target_modules=["linear_proj"]),
    "one of loftq": lambda model: add_lora(model, **FIELDS),
    "a mixin made by hand": lambda model: model.add_mixin("lora", LoraMixin(model, r=2)),
    "a foreign hook before it": lambda model: [
        model.get_submodule("mixins.eva.linear_proj.linear_proj").register_forward_hook(lambda *_: None),
        add_lora(model, r=2),
    ],
    "one of loftq, deleted": deleted,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("by", ["add_lora", "a mixin"])
def test_it_does_not_change_the_base_of_another_adapter(other, by):
    model = tiny_model(config=WIDE)
    quantize_model(model, keep_originals=True)
    other(model)
    before = {name: copy.deepcopy(weight) for name, weight in quantized_weights(model)}
    mixins = len(lora_mixins(model))
    with pytest.raises(ConfigError, match="it changes the weights of the base, and .*(linear_proj|attention.dense) "):
        if by == "add_lora":
            add_lora(model, name="second", **FIELDS)
        else:
            LoraMixin(model, **FIELDS)
    assert len(lora_mixins(model)) == mixins
    assert all(torch.equal(weight, before[name]) for name, weight in quantized_weights(model))


def test_it_may_come_beside_adapters_of_other_layers_and_before_others_of_its_own():
    model = tiny_model(config=WIDE)
    quantize_model(model, keep_originals=True, keep_modules=["patch-embedding", "projector"])
    add_lora(model, name="first", r=2, target_modules=["language-mlp", "projector"])
    add_lora(model, **FIELDS)  # of the projector, which is whole, nothing changes
    before = {name: copy.deepcopy(weight) for name, weight in quantized_weights(model)}
    add_lora(model, name="last", r=2, init_lora_weights="pissa")
    assert all(torch.equal(weight, before[name]) for name, weight in quantized_weights(model))

"""How a base is known: what is compared, what is said of two that differ, what is written and read."""

import base64

import pytest
import torch

from sat_lora.lora.base_identity import (
    FEWEST,
    HALF_STEP,
    MOST,
    RUN,
    VALUES,
    BaseIdentity,
    fingerprint_of,
    identity_of,
    positions,
    same_values,
    values_per_tensor,
)

SHAPES = {"b": (2, 3), "a": (4,), "c": (100, 100)}


def identity(change=None, **fields):
    state = {name: torch.arange(float(torch.Size(shape).numel())) for name, shape in SHAPES.items()}
    for name in change or ():
        state[name] = state[name] + 1
    return identity_of(SHAPES, lambda name, index: state[name][index], **fields)


def test_an_identity_holds_the_values_in_the_order_of_the_names():
    known = identity(name="base", family="Tiny")
    count = len(positions(SHAPES["c"], values_per_tensor(3)))
    assert known.values[:10].tolist() == [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(known.values) == 10 + count == 10 + MOST
    assert torch.equal(known.values[10:], positions(SHAPES["c"], MOST).float())
    assert (known.name, known.family, known.parameters, known.shapes) == ("base", "Tiny", 10_010, SHAPES)
    assert known.fingerprint == fingerprint_of(SHAPES)


def test_a_zero_has_no_sign_and_no_base_no_values():
    zeros = identity_of({"a": (2,)}, lambda name, index: torch.tensor([-0.0, 0.0]))
    assert not torch.signbit(zeros.values).any()
    empty = identity_of({}, lambda name, index: index)
    assert empty.values.tolist() == [] and empty.parameters == 0


def test_a_fingerprint_is_of_names_and_shapes_in_any_order():
    assert fingerprint_of({"a": (1, 2), "b": ()}) == fingerprint_of({"b": (), "a": (1, 2)})
    others = [{"a": (2, 1), "b": ()}, {"b": (1, 2), "a": ()}, {"a": (1, 2)}, {}]
    assert len({fingerprint_of(shapes) for shapes in others} | {fingerprint_of({"a": (1, 2), "b": ()})}) == 5


def test_two_that_differ_are_told_apart_by_what_is_known_of_both():
    base = identity()
    assert base.difference(identity()) is None
    assert base.difference(BaseIdentity(base.fingerprint)) is None is BaseIdentity(base.fingerprint).difference(base)
    assert base.difference(BaseIdentity("other")) == "other names or shapes"
    fewer = BaseIdentity(base.fingerprint, values=base.values[:-1])
    assert base.difference(fewer) == "another number of values on record"
    assert base.difference(identity(["a"])) == "other values in 1 of 3 tensors (a, ...)"
    assert identity(["c", "b"]).difference(base) == "other values in 2 of 3 tensors (b, c, ...)"
    assert base.difference(identity("abc")) == "other values in 3 of 3 tensors (a, b, ...)"


def test_without_shapes_the_values_are_counted():
    base, other = (BaseIdentity("f", values=torch.tensor(values)) for values in ([1.0, 2.0, 3.0], [1.0, 9.0, 9.0]))
    assert base.difference(other) == "other values for 2 of the 3 weights that were compared"
    own = BaseIdentity("f", values=base.values, shapes={"x": (1,), "y": (2,)})
    assert own.difference(other) == "other values in 1 of 2 tensors (y, ...)" == other.difference(own)


@pytest.mark.parametrize(
    "fields, title",
    [
        ({}, "a base without a name"),
        ({"name": "base"}, "base"),
        ({"name": "ba\nse", "family": "Tiny"}, r"ba\nse (Tiny)"),
        ({"family": "Tiny", "parameters": 1234567}, "a base without a name (Tiny, 1,234,567 parameters)"),
        ({"name": "base", "parameters": 0}, "base (0 parameters)"),
    ],
)
def test_a_title_says_what_is_known(fields, title):
    assert BaseIdentity("f", **fields).title == title


def test_a_digest_is_of_shapes_and_values():
    base, bare = identity(), BaseIdentity(identity().fingerprint)
    assert base.digest == identity().digest and len(base.digest) == 8
    assert len({base.digest, identity("a").digest, bare.digest, BaseIdentity("other").digest}) == 4


def test_what_is_written_is_read_again():
    base = identity(name="base", family="Tiny")
    content = base.to_dict()
    assert content.keys() == {"name", "family", "parameters", "values"}
    again = BaseIdentity.from_dict(base.fingerprint, content)
    assert torch.equal(again.values, base.values) and again.shapes is None
    assert (again.fingerprint, again.title) == (base.fingerprint, base.title)
    bare = BaseIdentity("f", name="base")
    assert bare.to_dict() == {"name": "base", "family": None, "parameters": None}
    assert BaseIdentity.from_dict("f", bare.to_dict()) == bare == BaseIdentity.from_dict("f", {"name": "base"})


@pytest.mark.parametrize(
    "content, words",
    [
        ([], "base has to be an object, got list"),
        ({"name": 1}, "base.name has to be of str, got int"),
        ({"family": ["x"]}, "base.family has to be of str, got list"),
        ({"parameters": True}, "base.parameters has to be of int, got bool"),
        ({"parameters": 1.0}, "base.parameters has to be of int, got float"),
        ({"values": 3}, "base.values has to be of str, got int"),
    ],
)
def test_what_is_of_another_kind_is_named(content, words):
    with pytest.raises(TypeError, match=f"^{words}$"):
        BaseIdentity.from_dict("f", content)


@pytest.mark.parametrize(
    "values, words",
    [
        ("", "base.values: 0 bytes are no float32 numbers"),
        (base64.b64encode(b"12345").decode(), "base.values: 5 bytes are no float32 numbers"),
        ("!", "(?i)base64"),
        ("AAAA\nAA==", "(?i)base64"),
    ],
)
def test_what_is_no_float32_numbers_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        BaseIdentity.from_dict("f", {"values": values})


@pytest.mark.parametrize("tensors, count", [(0, MOST), (1, MOST), (256, MOST), (300, 52), (2048, 8), (10**6, FEWEST)])
def test_of_a_base_with_many_tensors_fewer_values_of_each_are_taken(tensors, count):
    assert values_per_tensor(tensors) == count and count % RUN == 0
    assert tensors * count <= max(VALUES, FEWEST * tensors)


def test_the_places_are_runs_inside_the_tensor_and_always_the_same():
    places = positions((40, 50), 16)
    assert places.dtype == torch.int64 and len(places) == 16
    runs = places.view(-1, RUN)
    assert (runs.diff() == 1).all() and places.min() >= 0 and places.max() < 2000
    positions.cache_clear()
    assert torch.equal(positions((40, 50), 16), places)
    assert not torch.equal(positions((50, 40), 16), places)
    assert positions((2, 8), 16).tolist() == [*range(16)]
    assert len(positions((17,), 16)) == 16
    assert all(int(positions((17, n), 8).max()) < 17 * n for n in range(1, 200))


def steps_of(dtype, value, steps):
    """float32 values, each so many steps of `dtype` above `value`, all of that dtype."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    step = 2.0 ** (torch.frexp(torch.tensor(value)).exponent.item() - bits)
    return torch.tensor([value + number * step for number in steps])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [1.0, 1.5, 3.0, -7.0, 2.0**-10])
def test_values_are_the_same_within_one_step_of_their_format(dtype, value):
    values = steps_of(dtype, value, [0, 1, 2, 3])
    one = values[:1].expand(4)
    # Of a value with few bits any format may be the one; the second makes it that of `dtype`.
    fine = values[1:2] if dtype == torch.bfloat16 else steps_of(dtype, value, [3])
    assert same_values(fine, fine).all()
    assert same_values(one, one).all()
    assert same_values(one[:2], values[:2]).tolist() == [True, True]
    assert same_values(values[:2], one[:2]).tolist() == [True, True]


def test_the_coarser_format_of_the_two_counts():
    exact = torch.tensor([1.2345678, 1.2345678, 1.2345678, 1.2345678])
    half, brain = exact.half().float(), exact.bfloat16().float()
    assert same_values(exact, half).all() and same_values(brain, exact).all() and same_values(half, brain).all()
    step = 2.0**-23
    assert same_values(exact, exact + step).all() and not same_values(exact, exact + 2 * step).any()
    step = 2.0**-10
    assert same_values(exact, half + step).tolist() == [bool(abs(exact[0] - half[0] - step) <= step)] * 4
    assert not same_values(exact, half + 2.5 * step).any()
    assert not same_values(exact, brain + 2.5 * 2.0**-7).any()


def test_small_values_are_the_same_within_what_half_precision_tells_apart():
    assert same_values(torch.tensor([0.0, 0.0]), torch.tensor([HALF_STEP, -HALF_STEP])).all()
    assert not same_values(torch.tensor([0.0]), torch.tensor([2 * HALF_STEP])).any()
    # Both are float32 numbers and no others: there the step is their own.
    assert not same_values(torch.tensor([1.2345678e-9]), torch.tensor([1.2355678e-9])).any()


def test_what_overflows_half_precision_is_the_same_as_its_infinity():
    inf = float("inf")
    one = torch.tensor([70000.0, -70000.0, 70000.0, 65504.0, 65000.0, inf, inf, float("nan"), float("nan"), 66000.0])
    other = torch.tensor([inf, -inf, -inf, inf, inf, inf, -inf, float("nan"), 1.0, 80000.0])
    expected = [True, True, False, True, False, True, False, True, False, False]
    assert same_values(one, other).tolist() == expected == same_values(other, one).tolist()

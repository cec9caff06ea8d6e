"""A quantised weight in a layer: its product is that of the decoded one, and nothing else of it can be had unasked."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from sat_lora import QuantizationError
from sat_lora.quantization.config import NAMES
from sat_lora.quantized.layers import bytes_of, quantized_weights
from sat_lora.quantized.quantized_weight import QuantizedWeight, rebuilt, whole
from sat_lora.quantized.schemes import SCHEMES
from tests.support.quantized_layers import DTYPES, IN, LAYERS, OUT, counted_decoding, pair_of

pytestmark = pytest.mark.usefixtures("single_process_group")


def weight(scheme="nf4", dtype=torch.float32, rows=OUT) -> QuantizedWeight:
    drawn = torch.randn(rows, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    return QuantizedWeight.of(drawn, SCHEMES[scheme])


def results(layer, x: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of x and, where it trains, of the bias."""
    wanted = [x] + [p for p in layer.parameters() if p.requires_grad]
    for tensor in wanted:
        tensor.grad = None
    y = layer(x)
    torch.manual_seed(3)
    y.backward(torch.randn_like(y))
    return [y, *(tensor.grad for tensor in wanted)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_it_gives_with_the_decoded_weight(name, scheme, dtype):
    layer, plain = pair_of(name, scheme, dtype)
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    assert all(map(torch.equal, results(layer, x), results(plain, x)))
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    if layer.bias is not None:
        for copied in (layer, plain):
            copied.bias.requires_grad_(True)
        assert all(map(torch.equal, results(layer, x), results(plain, x)))


def test_forward_and_backward_decode_once_each_and_keep_codes_alone(monkeypatch):
    layer, _ = pair_of("linear", "nf4", torch.float32)
    decodings = counted_decoding(monkeypatch)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(torch.randn(3, IN, requires_grad=True))
    assert [type(tensor) for tensor in kept] == [QuantizedWeight] and len(decodings) == 1
    y.sum().backward()
    assert len(decodings) == 2


def test_no_rows_decode_nothing(monkeypatch):
    layer, _ = pair_of("linear", "nf4", torch.float32)
    decodings = counted_decoding(monkeypatch)
    x = torch.randn(2, 0, IN, requires_grad=True)
    layer.bias.requires_grad_(True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, 0, OUT) and x.grad.shape == x.shape and not layer.bias.grad.any()
    with torch.no_grad():
        assert layer(x).shape == (2, 0, OUT)
    assert (torch.zeros(0, OUT) @ layer.weight).shape == (0, IN) and not decodings


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_autocast_it_is_cast_as_a_plain_one(dtype):
    layer, plain = pair_of("linear", "nf4", dtype)
    x = torch.randn(2, 5, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(layer, x), results(plain, x)
    assert ours[0].dtype is torch.bfloat16 and all(map(torch.equal, ours, theirs))


def test_another_dtype_is_refused_as_by_a_plain_one():
    with pytest.raises(RuntimeError, match="same dtype"):
        F.linear(torch.zeros(2, IN), weight(dtype=torch.bfloat16))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recomputation_changes_no_bit(checkpointed):
    layer, plain = pair_of("column", "nf4", torch.bfloat16)
    x = torch.randn(2, 5, IN, dtype=torch.bfloat16, requires_grad=True)

    def again(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=checkpointed)

    assert all(map(torch.equal, results(torch.nn.Sequential(_Called(again)), x), results(plain, x)))


class _Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


WRITES = {
    "add_": lambda w: w.add_(1),
    "mul_ by a tensor": lambda w: w.mul_(torch.ones(OUT, IN)),
    "zero_": lambda w: w.zero_(),
    "fill_ of the data": lambda w: w.data.fill_(0),
    "an element": lambda w: w.__setitem__((0, 0), 1.0),
    "a row": lambda w: w[0].zero_(),
    "an initialiser": lambda w: torch.nn.init.normal_(w),
    "resize_": lambda w: w.resize_(2, 2),
    "set_": lambda w: w.set_(torch.zeros(2)),
    "a shape that does not fit": lambda w: w.copy_(torch.zeros(2, IN)),
    "codes of another scheme": lambda w: w.copy_(weight("int8")),
    "what is not finite": lambda w: w.copy_(torch.full((OUT, IN), torch.nan)),
    "a gradient": lambda w: w.requires_grad_(),
    "a gradient, by attribute": lambda w: setattr(w, "requires_grad", True),
    "the data, by attribute": lambda w: setattr(w, "data", torch.zeros(OUT, IN)),
    "the data of another": lambda w: setattr(w, "data", weight(rows=OUT)),
    "the transpose": lambda w: w.t().zero_(),
    "a row of the transpose": lambda w: w.t()[0].fill_(1),
    "an element of the transpose": lambda w: w.t().__setitem__((0, 0), 1.0),
    "a view of the transpose": lambda w: w.t().unsqueeze(0).mul_(2),
    "the transpose of the transpose": lambda w: w.t().t().add_(1),
    "the data of the transpose": lambda w: w.t().data.zero_(),
    "the T of it": lambda w: w.T.copy_(torch.zeros(IN, OUT)),
    "the transpose, by a function": lambda w: torch.add(torch.ones(IN, OUT), 1, out=w.t()),
    "an initialiser of the transpose": lambda w: torch.nn.init.zeros_(w.t()),
}
READS = {
    "an element": lambda w: w[0, 0],
    "a sum": lambda w: w.sum(),
    "a comparison": lambda w: w == w,
    "arithmetic": lambda w: w + 1,
    "arithmetic in a plain tensor": lambda w: torch.ones(OUT, IN).mul_(w),
    "a copy into a plain tensor": lambda w: torch.empty(OUT, IN).copy_(w),
    "a flat view": lambda w: w.view(-1),
    "as codes": lambda w: w.to(torch.int8),
    "joined": lambda w: torch.cat([w, w]),
    "iterated": list,
    "as a left factor": lambda w: w @ torch.zeros(IN, 2),
    "its address": lambda w: w.data_ptr(),
    "its storage": lambda w: w.untyped_storage(),
    "shared memory": lambda w: w.share_memory_(),
    "dlpack": lambda w: torch.from_dlpack(w),
    "safetensors": lambda w: safetensors.torch.save({"w": w}),
}


@pytest.mark.parametrize("use", [*WRITES.values(), *READS.values()], ids=[*WRITES, *READS])
def test_what_needs_the_elements_is_refused_and_changes_nothing(use):
    ours = weight()
    before = ours.decoded()
    with pytest.raises(QuantizationError, match="quantised weight|does not fit|not finite|Quantized"):
        use(ours)
    assert torch.equal(ours.decoded(), before)


SHAPES = {
    "1-D": (IN,),
    "2-D": (3, IN),
    "3-D": (2, 3, IN),
    "4-D": (2, 1, 3, IN),
    "no rows": (0, IN),
    "2 x 0": (2, 0, IN),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inputs_of_any_number_of_dimensions_train_a_bias_as_a_plain_layer_does(shape):
    layer, plain = pair_of("linear", "nf4", torch.float32)
    for copied in (layer, plain):
        copied.bias.requires_grad_(True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    ours, theirs = results(layer, x), results(plain, x)
    assert [tensor.shape for tensor in ours] == [tensor.shape for tensor in theirs]
    assert all(map(torch.equal, ours, theirs))
    x.requires_grad_(False)
    assert all(map(torch.equal, results(layer, x)[::2], results(plain, x)[::2]))


PRODUCTS = {
    "x @ w.t()": lambda x, w: x @ w.t(),
    "matmul": lambda x, w: torch.matmul(x, torch.t(w)),
    "a bias added": lambda x, w: torch.addmm(torch.ones(OUT), x.reshape(-1, IN), w.t()),
    "of strided rows": lambda x, w: x.transpose(0, -2) @ w.t(),
    "einsum, read": lambda x, w: torch.einsum("...i,io->...o", x, w.t()),
}


@pytest.mark.parametrize("shape", [(3, IN), (4, 3, IN)])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_with_the_transpose_is_that_of_the_decoded_one(product, shape):
    ours = weight()
    plain = ours.decoded()
    outcomes = []
    for side in (ours, plain):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = product(x, side)
        y.square().sum().backward()
        outcomes.append((y, x.grad))
        assert type(y) is torch.Tensor
    assert all(map(torch.equal, *outcomes))
    assert torch.equal(torch.zeros(1) + ours.t(), plain.t()) and type(ours.t().clone()) is torch.Tensor
    assert repr(ours.t()) == repr(plain.t())


def test_whoever_reads_asks_for_the_whole():
    ours = weight()
    assert type(whole(ours)) is torch.Tensor and torch.equal(whole(ours), ours.decoded())
    plain = torch.zeros(2)
    assert whole(plain) is plain


@pytest.mark.parametrize("scheme", NAMES)
def test_a_dtype_is_what_it_is_decoded_to(scheme):
    ours = weight(scheme)
    half = ours.to(torch.bfloat16)
    assert torch.equal(half.codes, ours.codes) and torch.equal(half.scales, ours.scales)
    assert half.dtype is half.decoded().dtype is torch.bfloat16
    assert torch.equal(half.decoded(), ours.decoded().bfloat16())


def test_a_layer_is_copied_cast_and_moved():
    layer, _ = pair_of("column", "nf4", torch.float32)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.weight, layer.weight)
    copied.weight.codes.zero_()
    assert not torch.equal(copied.weight, layer.weight)
    for change, dtype in ((layer.half, torch.float16), (layer.bfloat16, torch.bfloat16)):
        changed = change()
        assert isinstance(changed.weight, QuantizedWeight) and changed.weight.dtype is dtype
        assert changed.weight.codes.dtype is torch.uint8 and changed.weight.scales.dtype is torch.bfloat16
    assert layer.to("meta").weight.codes.is_meta


@pytest.mark.parametrize("scheme", NAMES)
def test_a_state_dict_has_the_names_of_before_and_takes_plain_weights(scheme):
    layer, plain = pair_of("linear", scheme, torch.float32)
    assert set(layer.state_dict()) == set(plain.state_dict())
    fresh = copy.deepcopy(layer)
    fresh.weight.codes.zero_()
    fresh.load_state_dict({"weight": plain.weight.detach(), "bias": plain.bias.detach()})
    assert torch.equal(fresh.weight.decoded(), layer.weight.decoded())
    fresh.weight.scales.zero_()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, layer.weight)
    with pytest.raises(RuntimeError, match="quantised weight"):  # torch's own error, with ours in it
        plain.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("scheme", NAMES)
def test_it_is_saved_and_pickled(scheme):
    ours = weight(scheme, torch.bfloat16)
    file = io.BytesIO()
    torch.save({"w": ours}, file)
    file.seek(0)
    for loaded in (torch.load(file)["w"], pickle.loads(pickle.dumps(ours))):
        assert torch.equal(loaded, ours) and loaded.dtype is torch.bfloat16 and loaded.scheme is ours.scheme


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(scheme="nf5"), "scheme of a quantised weight is 'nf5'"),
        (dict(codes=torch.zeros(4, 32)), "codes in torch.float32"),
        (dict(scales=torch.zeros(4, 1)), "scales in torch.float32"),
        (dict(codes=torch.zeros(4, 48, dtype=torch.uint8)), "96 columns with 1 scales"),
        (dict(codes=torch.zeros(5, 32, dtype=torch.uint8)), r"codes \(5, 32\)"),
        (dict(scales=torch.zeros(4, 0, dtype=torch.bfloat16)), r"scales \(4, 0\)"),
        (dict(dtype=torch.int64), "decode to torch.int64"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, problem):
    parts = dict(
        codes=torch.zeros(4, 32, dtype=torch.uint8),
        scales=torch.zeros(4, 1, dtype=torch.bfloat16),
        scheme="nf4",
        dtype=torch.float32,
    )
    assert rebuilt(**parts).shape == (4, 64)
    with pytest.raises(QuantizationError, match=problem):
        rebuilt(**{**parts, **change})


@pytest.mark.parametrize("shape", [(4, 48), (4, 0), (64,), (2, 2, 64)])
def test_rows_that_no_block_divides_are_refused(shape):
    with pytest.raises(
        QuantizationError, match=r"some.name: its shape .* has no rows that divide into blocks of 64 or 32"
    ):
        QuantizedWeight.of(torch.zeros(shape), SCHEMES["nf4"], "some.name")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4e38])
def test_values_that_are_not_finite_are_refused_by_name(value):
    plain = torch.zeros(4, 64)
    plain[1, 2] = value
    with pytest.raises(QuantizationError, match="some.name: it holds values that are not finite; nf4 cannot hold them"):
        QuantizedWeight.of(plain, SCHEMES["nf4"], "some.name")


def test_bytes_are_those_of_codes_and_scales():
    layer, plain = pair_of("linear", "nf4", torch.float32)
    assert bytes_of(layer.weight) == OUT * IN // 2 + OUT * IN // 64 * 2
    assert bytes_of(plain.weight) == OUT * IN * 4
    assert [name for name, _ in quantized_weights(torch.nn.Sequential(plain, layer))] == ["1"]


def test_blocks_of_32_where_64_does_not_divide():
    ours = QuantizedWeight.of(torch.randn(4, 96), SCHEMES["nf4"])
    assert (ours.block, ours.scales.shape) == (32, (4, 3))

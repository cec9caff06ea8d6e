"""The delta of a linear and its gradients, in every dtype and on every device, against the formula in float64."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import sat_lora.lora.deltas.low_rank
from benchmarks.models import allow_checkpointing
from benchmarks.variants import LAYER, Shape, one_layer_model
from sat_lora import LoraConfig, LoraMixin, add_lora
from sat_lora.lora.apply import adapters_of
from sat_lora.training.steps.step import to_device
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

SHAPES = [Shape(64, 64), Shape(64, 192, 3), Shape(64, 128), Shape(128, 64)]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # relative; for halves two of their eps
DTYPES = list(TOLERANCES)
RANK, ALPHA, ROWS, SEED = 8, 16, 40, 5
DROPOUT = 0.25  # exact in any number of bits


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "cuda, as if large"))])
def device(request, monkeypatch) -> torch.device:
    """The device that the test is about; also with the kernels that large tensors get there."""
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "cuda, as if large":
        monkeypatch.setattr(sat_lora.lora.deltas.low_rank, "ADDITION_KERNEL_FROM", 0)
        monkeypatch.setattr(sat_lora.lora.deltas.low_rank, "DROPOUT_KERNELS_FROM", 0)
    return torch.device(request.param.partition(",")[0])


class Layer:
    """A linear of a SAT layer with its adapter, random weights."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, dropout: float = 0.0):
        torch.manual_seed(0)
        self.shape, self.dropout = shape, dropout
        model = one_layer_model(shape, dtype, device)
        target = (LAYER + shape.leaf).replace(".", r"\.")
        fields = dict(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=target)
        model.add_mixin("lora", LoraMixin(model, **fields))
        (adapter,) = adapters_of(model).values()
        self.A, self.B, self.weight = adapter.A, adapter.B, model.get_submodule(LAYER + shape.leaf).weight
        for factor in (self.A, self.B):
            torch.nn.init.normal_(factor, std=factor.shape[1] ** -0.5)
        hook = model.train().hooks["mlp_forward"]
        self.call = lambda x: hook(x, layer_id=0)

    def gradients(self, x: torch.Tensor, grad: torch.Tensor, call=None) -> list[torch.Tensor]:
        """[y, dx, dA, dB] under a fixed seed."""
        torch.manual_seed(SEED)
        inputs = (x, self.A, self.B)
        for tensor in inputs:
            tensor.grad = None
        y = (call or self.call)(x)
        y.backward(grad)
        return [y.detach(), *(tensor.grad for tensor in inputs)]

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """Which elements of x (rows, in) dropout keeps under that seed: A shows r of them at a time in the output."""
        kept, ones = [], torch.ones_like(x).requires_grad_()
        parameters = (self.A, self.B, self.weight)
        before = [parameter.detach().clone() for parameter in parameters]
        looks = torch.eye(self.shape.in_features, dtype=x.dtype, device=x.device)
        for some in looks.split(RANK):
            with torch.no_grad():
                for parameter in parameters:
                    parameter.zero_()
                self.A[:RANK].copy_(some)
                self.B[:RANK].copy_(looks[:RANK, :RANK])
            torch.manual_seed(SEED)
            kept.append(self.call(ones).detach()[:, :RANK] != 0)
        with torch.no_grad():
            for parameter, values in zip(parameters, before):
                parameter.copy_(values)
        return torch.cat(kept, 1)

    def in_float64(self, x: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        """[y, dx, dA, dB] of y = x Wᵀ + alpha / r (mask x / keep) Aᵀ Bᵀ, slot by slot, on the CPU."""
        x, A, B = (tensor.detach().cpu().double().requires_grad_() for tensor in (x, self.A, self.B))
        weight, dropped = self.weight.detach().cpu().double(), x
        if mask is not None:
            dropped = x * mask.cpu() / (1 - self.dropout)
        slots = zip(A.chunk(self.shape.slots), B.chunk(self.shape.slots))
        y = x @ weight.T + ALPHA / RANK * torch.cat([dropped @ down.T @ up.T for down, up in slots], 1)
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], grad.cpu().double())]


def operands(shape: Shape, dtype: torch.dtype, device: torch.device, rows: int = ROWS):
    """x (rows, in), which asks for a gradient, and a gradient of y (rows, out)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, shape.in_features, generator=generator).to(device, dtype).requires_grad_()
    return x, torch.randn(rows, shape.out_features, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_and_gradients_equal_float64(device, shape, dtype, dropout, single_process_group):
    layer = Layer(shape, dtype, device, dropout)
    x, grad = operands(shape, dtype, device)
    mask = layer.mask(x) if dropout else None
    if dropout:
        assert 0.6 < mask.float().mean() < 0.9
    expected = layer.in_float64(x, grad, mask)
    for name, value, exact in zip(("y", "dx", "dA", "dB"), layer.gradients(x, grad), expected):
        assert value.device.type == device.type and value.dtype == dtype
        error = (value.cpu().double() - exact).norm() / exact.norm()
        assert error < TOLERANCES[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_without_grad_the_output_is_the_same(device, shape, single_process_group):
    layer = Layer(shape, torch.float32, device)
    x, grad = operands(shape, torch.float32, device)
    with torch.no_grad():
        alone = layer.call(x)
    torch.testing.assert_close(alone, layer.gradients(x, grad)[0])


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_no_row_gives_zero_gradients(device, shape, dropout, single_process_group):
    layer = Layer(shape, torch.float32, device, dropout)
    y, dx, dA, dB = layer.gradients(*operands(shape, torch.float32, device, rows=0))
    assert y.shape == (0, shape.out_features) and dx.shape == (0, shape.in_features)
    assert dA.shape == layer.A.shape and not dA.any()
    assert dB.shape == layer.B.shape and not dB.any()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputation_draws_the_same_mask(device, dtype, reentrant, single_process_group):
    layer = Layer(SHAPES[1], dtype, device, DROPOUT)
    x, grad = operands(SHAPES[1], dtype, device)
    again = layer.gradients(x, grad, lambda x: checkpoint(layer.call, x, use_reentrant=reentrant))
    assert all(map(torch.equal, layer.gradients(x, grad), again))


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_gradients_of_a_model_with_and_without_checkpointing_are_bitwise_equal(device, dropout, single_process_group):
    batch = to_device(tiny_batch(), device)
    results = []
    for checkpointing in (False, True):
        settings = dict(checkpoint_activations=checkpointing, vit_checkpoint_activations=checkpointing)
        model = tiny_model(**settings).to(device).train()
        add_lora(model, LoraConfig(r=4, lora_dropout=dropout))
        fill_adapters(model)
        allow_checkpointing(device)  # which seeds as well
        torch.manual_seed(SEED)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels add in any order
            logits_of(model, batch).float().square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = results
    assert plain.keys() == recomputed.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)

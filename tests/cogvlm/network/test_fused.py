"""The fused kernels, run by Triton's interpreter, against float64 and the plain path; both forward and backward."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from sat_lora.cogvlm.network import fused
from sat_lora.cogvlm.network.fused import rotary, silu_mul
from sat_lora.cogvlm.network.rotary import RotaryEmbedding
from tests.support.ranks import run_ranks
from tests.support.triton_interpreter import in_the_interpreter

IMPORTS = "import torch; from tests.cogvlm.network import test_fused"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = ((1, 1, 1, 2), (2, 5, 3, 8), (1, 7, 5, 6), (2, 3, 4, 16), (1, 0, 2, 4))  # batch, seq, heads, head_dim
FEW_SIZES = ((1, 1, 1, 2), (1, 7, 5, 6), (1, 0, 2, 4))


def exact_rotary(mixed, angles, head_dim):
    """In complex numbers: q and k times e^(i angle), v as it is."""
    query, key, value = mixed.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    turn, half = torch.polar(torch.ones_like(angles), angles), head_dim // 2
    turned = [torch.complex(x[..., :half], x[..., half:]) * turn for x in (query, key)]
    return [torch.cat([x.real, x.imag], -1) for x in turned] + [value]


def with_gradients(run, inputs, weights):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = run(*inputs)
    loss = sum((output * weight.to(output.dtype)).sum() for output, weight in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_rounded_once(got, exact, dtype):
    """Within one rounding, and a few of float32 on the way. Triton's interpreter cuts bf16 off where a GPU rounds."""
    rounding = 1.0 if dtype == torch.bfloat16 and got[0].device.type == "cpu" else 0.5
    for ours, wanted in zip(got, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == wanted.shape
        if wanted.numel():
            size = wanted.abs().clamp_min(wanted.abs().max() * 1e-2)
            error = ((ours.double() - wanted).abs() / size).max().item()
            assert error <= rounding * torch.finfo(dtype).eps + 100 * torch.finfo(torch.float32).eps


def check_rotary(dtype, batch, seq, heads, head_dim, layout):
    torch.manual_seed(seq)
    mixed = torch.randn(batch, seq, 3 * heads * head_dim).to(dtype)
    if layout == "strided":
        mixed = torch.randn(batch, seq, 6 * heads * head_dim).to(dtype)[..., ::2]
    angle = torch.rand(batch, 1, seq, head_dim // 2, dtype=torch.float64) * 100
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    # The kernel gets rounded cosines and sines, so the float64 oracle gets the same ones.
    rounded = torch.complex(cos.double(), sin.double())
    weights = torch.randn(3, batch, heads, seq, head_dim).to(dtype)
    if layout == "strided":
        weights = torch.randn(3, batch, head_dim, seq, heads).to(dtype).transpose(2, 4)

    def exact_run(mixed):
        query, key, value = mixed.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
        half = head_dim // 2
        turned = [torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * rounded for x in (query, key)]
        return [*(torch.cat([x.real, x.imag], -1) for x in turned), value]

    exact = with_gradients(exact_run, [mixed.double()], weights.double())
    got = with_gradients(lambda mixed: fused._Rotary.apply(mixed, cos, sin, head_dim), [mixed], weights)
    assert_rounded_once(got, exact, dtype)
    assert torch.equal(got[2], mixed.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)[2])
    again = with_gradients(lambda mixed: fused._Rotary.apply(mixed, cos, sin, head_dim), [mixed], weights)
    assert all(torch.equal(one, other) for one, other in zip(got, again))


def check_rotary_of_grouped_heads(dtype):
    """Fewer heads of keys and values than of queries, each block by itself in the fused tensor."""
    torch.manual_seed(1)
    mixed = torch.randn(2, 5, (6 + 2 * 3) * 8).to(dtype)
    angle = torch.rand(2, 1, 5, 4, dtype=torch.float64) * 100
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights = [torch.randn(2, heads, 5, 8).to(dtype) for heads in (6, 3, 3)]
    exact = with_gradients(
        lambda mixed: rotary(mixed, cos.double(), sin.double(), 8, 3), [mixed.double()], [w.double() for w in weights]
    )
    got = with_gradients(lambda mixed: fused._Rotary.apply(mixed, cos, sin, 8, 3), [mixed], weights)
    assert_rounded_once(got, exact, dtype)
    assert torch.equal(got[2], mixed[..., 9 * 8 :].unflatten(-1, (3, 8)).transpose(1, 2))


def check_silu_mul(dtype, shape, layout):
    torch.manual_seed(len(shape))
    gate, up, weight = 4 * torch.randn(3, *shape).to(dtype)
    if layout == "strided":
        gate, up, weight = 4 * torch.randn(3, *reversed(shape)).to(dtype).permute(0, *range(len(shape), 0, -1))
    exact = with_gradients(lambda g, u: [g * u / (1 + (-g).exp())], [gate.double(), up.double()], [weight.double()])
    got = with_gradients(lambda g, u: [fused._SiluMul.apply(g, u)], [gate, up], [weight])
    assert_rounded_once(got, exact, dtype)
    plain = with_gradients(lambda g, u: [F.silu(g) * u], [gate, up], [weight])
    for ours, theirs in zip(got, plain):
        torch.testing.assert_close(ours, theirs, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def check_all(dtype, rotary_sizes=SIZES):
    for sizes in rotary_sizes:
        for layout in ("contiguous", "strided"):
            check_rotary(dtype, *sizes, layout)
    check_rotary_of_grouped_heads(dtype)
    for shape in ((1,), (3, 7), (0, 8), (2, 3, 401), (1025,)):
        for layout in ("contiguous", "strided"):
            check_silu_mul(dtype, shape, layout)


def test_kernels_equal_float64_rounded_once():
    in_the_interpreter(f"{IMPORTS}; test_fused.check_all(torch.bfloat16, test_fused.FEW_SIZES)")


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["bfloat16", "float32", "float16"])
def test_kernels_of_every_size_and_dtype_equal_float64_rounded_once(name):
    in_the_interpreter(f"{IMPORTS}; test_fused.check_all(torch.{name})")


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sat_lora.cogvlm.network import kernels

sizes = dict(INVERSE=True, HEADS=32, HALF=64, BLOCK=1024)
strides = {name for name in kernels.rotary.arg_names if name[:2] in ("q_", "k_", "v_")}
counts = strides | {"seq", "heads", "key_heads", "half", "size"}
for kernel in (kernels.rotary, kernels.silu_mul, kernels.silu_mul_backward):
    constants = {name: sizes[name] for name in kernel.arg_names if name.isupper()}
    signature = {name: "i32" if name in counts else "*bf16" for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert "cubin" in compile(source, target=GPUTarget("cuda", 80, 32)).asm
"""


def test_kernels_compile_for_cuda(tmp_path):
    """Needs no GPU: Triton brings its own assembler."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_plain_path_equals_complex_numbers():
    torch.manual_seed(0)
    mixed = torch.randn(2, 5, 3 * 4 * 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 1, 2, 3], [4, 5, 6, 7, 90]])
    embedding = RotaryEmbedding(8).double()
    cos, sin = embedding(positions, torch.float64)
    got = rotary(mixed, cos, sin, 8)
    expected = exact_rotary(mixed, torch.atan2(sin, cos), 8)
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    gate, up = mixed.chunk(2, -1)
    torch.testing.assert_close(silu_mul(gate, up), gate * up / (1 + (-gate).exp()), rtol=1e-12, atol=1e-12)


def forward_and_backward():
    """Whether the kernels have been imported afterwards."""
    from tests.support.tiny import logits_of, tiny_batch, tiny_model

    logits_of(tiny_model(), tiny_batch()).sum().backward()
    return "sat_lora.cogvlm.network.kernels" in sys.modules


def test_no_kernel_is_imported_on_the_cpu():
    assert run_ranks(forward_and_backward, 1) == [False]

"""When bitsandbytes decodes, and what is said where it does not."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from sat_lora.quantized import kernels
from sat_lora.quantized.schemes import SCHEMES, encode


def test_a_cpu_never_imports_them(monkeypatch):
    monkeypatch.setattr(kernels, "is_usable", lambda: pytest.fail("asked for on a CPU"))
    codes, scales = encode(torch.randn(2, 64), SCHEMES["nf4"], 64)
    assert SCHEMES["nf4"].decode(codes, scales, torch.float32).shape == (2, 64)


@pytest.mark.parametrize(
    ("block", "dtype", "wanted"),
    [(64, torch.bfloat16, True), (32, torch.bfloat16, False), (64, torch.float64, False)],
)
def test_they_are_for_codes_on_cuda_in_blocks_and_dtypes_that_they_have(monkeypatch, block, dtype, wanted):
    monkeypatch.setattr(kernels, "is_usable", lambda: True)
    assert kernels.has_kernels(SimpleNamespace(is_cuda=True), block, dtype) is wanted


def without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def broken_import(monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, *more):
            if name == "bitsandbytes":
                raise OSError("libcudart.so.13: cannot open\nshared object file")

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


def without_a_part_of_it(monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, *more):
            if name == "bitsandbytes":
                raise ModuleNotFoundError("No module named 'packaging'", name="packaging")

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


def failing_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__version__="0.1"))
    monkeypatch.setattr(torch, "full", lambda *args, **more: None)
    monkeypatch.setattr(torch, "ones", lambda *args, **more: None)

    def decode(*args):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(kernels, "decode_nf4", decode)


def wrong_kernel(monkeypatch):
    failing_kernel(monkeypatch)
    monkeypatch.setattr(kernels, "decode_nf4", lambda *args: torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        (without_it, "bitsandbytes is not installed"),
        (broken_import, "bitsandbytes cannot be imported: OSError: libcudart.so.13: cannot open"),
        (without_a_part_of_it, "bitsandbytes cannot be imported: No module named 'packaging'"),
        (failing_kernel, "bitsandbytes 0.1 fails on CUDA: RuntimeError: no kernel image is available"),
        (wrong_kernel, "bitsandbytes 0.1 decodes zeros to other numbers"),
    ],
)
def test_the_real_cause_and_the_way_of_torch_are_named_once(monkeypatch, caplog, case, cause):
    case(monkeypatch)
    kernels.is_usable.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.is_usable() and not kernels.is_usable()
    kernels.is_usable.cache_clear()
    (record,) = caplog.records
    assert cause in record.message and "decoded by torch" in record.message and "sat_lora[quant]" in record.message

"""Every test here runs on the CPU and, where there is one, on a GPU: `pytest -m cuda` takes the latter alone."""

import pytest
import torch

GPU = pytest.param("cuda", marks=pytest.mark.cuda)


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(name)


@pytest.fixture(params=["cpu", GPU])
def device(request) -> torch.device:
    """The device that the test is about."""
    return device_of(request.param)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.matrix), GPU])
def device_of_long_test(request) -> torch.device:
    """The same for a test that takes a CPU long, and is short on a GPU."""
    return device_of(request.param)

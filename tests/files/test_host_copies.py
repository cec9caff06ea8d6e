"""Copies in memory that is kept from one use to the next."""

import pytest
import torch

from sat_lora.files import host_copies
from sat_lora.files.host_copies import ALIGNMENT, HostCopies


@pytest.fixture
def copies(monkeypatch):
    monkeypatch.setattr(host_copies, "CHUNK", 4 * ALIGNMENT)
    return HostCopies()


def test_a_copy_stays_what_the_tensor_was(copies):
    tensors = [
        torch.arange(6.0).view(2, 3).requires_grad_(),
        torch.arange(6).view(2, 3).t(),
        torch.tensor(True),
        torch.empty(0, 3),
        torch.arange(5, dtype=torch.bfloat16),
    ]
    expected = [tensor.detach().clone() for tensor in tensors]
    copied = [copies.copy(tensor) for tensor in tensors]
    copies.wait()
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    for copy, tensor in zip(copied, expected):
        assert copy.dtype == tensor.dtype and not copy.requires_grad and copy.is_contiguous()
        assert torch.equal(copy, tensor)


def test_copies_lie_aligned_beside_each_other_until_a_chunk_is_full(copies):
    """Four places in a chunk here; what is larger than a chunk has one of its own."""
    small = [copies.copy(torch.full((1 + number,), number)) for number in range(3)]  # three places
    whole = copies.copy(torch.arange(4 * ALIGNMENT, dtype=torch.uint8))
    fits = copies.copy(torch.full((ALIGNMENT,), 7, dtype=torch.uint8))  # the last place, to its last byte
    large = copies.copy(torch.arange(5 * ALIGNMENT).to(torch.uint8))
    assert len(copies._chunks) == 3
    offsets = [copy.data_ptr() - copies._chunks[0].data_ptr() for copy in (*small, fits)]
    assert offsets == [0, ALIGNMENT, 2 * ALIGNMENT, 3 * ALIGNMENT]
    assert [copy.tolist() for copy in small] == [[0], [1, 1], [2, 2, 2]]
    assert torch.equal(whole, torch.arange(4 * ALIGNMENT, dtype=torch.uint8))
    assert torch.equal(large, torch.arange(5 * ALIGNMENT).to(torch.uint8)) and (fits == 7).all()


def test_memory_serves_again_after_clear(copies):
    first = [copies.copy(torch.zeros(3 * ALIGNMENT, dtype=torch.uint8)) for _ in range(2)]
    places = [copy.data_ptr() for copy in first]
    copies.clear()
    second = [copies.copy(torch.ones(3 * ALIGNMENT, dtype=torch.uint8)) for _ in range(2)]
    assert [copy.data_ptr() for copy in second] == places
    assert len(copies._chunks) == 2

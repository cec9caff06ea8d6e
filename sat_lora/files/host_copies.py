"""Copies of tensors in host memory, for what is written to a disk while the tensors change."""

import torch

CHUNK = 64 * 2**20  # bytes
ALIGNMENT = 64


class HostCopies:
    """Copies of tensors in host memory that is kept from one use to the next; pinned where a device has CUDA.

    Copies into pinned memory run beside the device. A copy may be read after `wait`, and until `clear`, after which its
    memory serves the next ones.
    """

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self._used: list[int] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy in host memory, of the same shape and dtype; it is there after `wait`."""
        size = tensor.numel() * tensor.element_size()
        place = self._take(size).view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor.detach(), non_blocking=True)
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))  # ZeRO-3 frees it on another stream
        return place

    def wait(self) -> None:
        """Wait until every copy is there."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def clear(self) -> None:
        """Let the memory of all copies serve the next ones."""
        self._used = [0] * len(self._chunks)

    def _take(self, size: int) -> torch.Tensor:
        """Return `size` bytes of a chunk that has them, or of a new one: (size,) uint8."""
        number = next((n for n, used in enumerate(self._used) if used + size <= len(self._chunks[n])), None)
        if number is None:
            number = len(self._chunks)
            pinned = torch.cuda.is_available()
            self._chunks.append(torch.empty(max(size, CHUNK), dtype=torch.uint8, pin_memory=pinned))
            self._used.append(0)
        start = self._used[number]
        self._used[number] += -(-size // ALIGNMENT) * ALIGNMENT
        return self._chunks[number][start : start + size]

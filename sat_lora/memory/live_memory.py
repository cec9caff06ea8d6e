"""Bytes of tensors that live at once while something runs, counted where torch makes them.

The process's own memory would be a poor measure on a CPU: an allocator gives freed memory back late, or never.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sat_lora.quantized.layers import plain_parts


class LiveBytes(TorchDispatchMode):
    """A context that counts, in `now` and `peak`, the bytes of the storages that operations return.

    Each storage counts once, until it is freed.
    known: tensors that are not counted, nor are views of them. Works on fake tensors too; on "meta" none counts. Memory
    that a kernel takes and gives back within one operation is not seen; on CUDA ask `torch.cuda.max_memory_allocated`.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = 0
        self.peak = 0
        self._live: dict[int, int] = {}
        self._known = {part.untyped_storage()._cdata for tensor in known for part in plain_parts(tensor)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                for part in plain_parts(leaf):
                    self._count(part.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        size = storage.nbytes()
        self._live[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._live.pop(key)


def peak_of(work: Callable[[], object], model: torch.nn.Module, device: torch.device) -> int:
    """Return the most bytes that tensors beyond the model's own take at once while `work` runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        work()
    return live.peak

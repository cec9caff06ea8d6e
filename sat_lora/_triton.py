"""What every launch of a Triton kernel needs, without importing triton."""

import contextlib

import torch

_HERE: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which Triton launches on the tensor's device: by itself it takes the current one."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE  # where nothing is to be changed, to change it and back would cost microseconds

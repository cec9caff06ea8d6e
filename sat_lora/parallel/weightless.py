"""Building a model whose parameters have shapes and no memory yet."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What SAT's and torch's layers make parameters with. Rotary frequencies are computed, from torch.arange, and stay real.
_ALLOCATIONS = {torch.empty, torch.zeros, torch.ones}


class without_memory(TorchFunctionMode):
    """A context in which parameters come on the device "meta", whatever device the layer names.

    SAT 0.4.12 names the CPU in each of its parallel layers, which `with torch.device("meta")` does not override.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if function in _ALLOCATIONS:
            keywords["device"] = "meta"
        return function(*args, **keywords)

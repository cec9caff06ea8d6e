"""Parameters of the base that train whole, beside the adapters: `modules_to_save` and `bias`."""

import torch

from sat_lora.errors import ConfigError
from sat_lora.sharding import mark_sharded, sharding_of
from sat_lora.targets import BaseParameter


class TrainedBase:
    """They train in place, so that ZeRO and model parallelism see ordinary parameters; the originals wait on the CPU.

    Holds tensors and no modules, since the call that gives the originals back must not keep the model alive.
    """

    def __init__(self, parameters: dict[str, BaseParameter]):
        self.shardings = {name: sharding_of(one.module, one.leaf) for name, one in parameters.items()}
        # SAT sets only its own flag on what it cuts; DeepSpeed's gradient norm reads another.
        self.tensors = {name: mark_sharded(one.tensor, self.shardings[name]) for name, one in parameters.items()}
        self._originals: dict[str, torch.Tensor] = {}
        self._swapped = False

    @torch.no_grad()
    def remember(self) -> None:
        """Take the present values as the originals."""
        self._originals = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        self._swapped = False

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange trained values and originals."""
        for name, tensor in self.tensors.items():
            if hasattr(tensor, "ds_id"):
                raise ConfigError(f"{name} is partitioned by ZeRO-3: its original cannot be brought back during a run")
        for name, tensor in self.tensors.items():
            current = tensor.detach().to("cpu", copy=True)
            tensor.copy_(self._originals[name])
            self._originals[name] = current
        self._swapped = not self._swapped

    def give_back(self) -> None:
        """The originals, untrainable, for a base whose mixin is gone."""
        if not self._swapped and not any(hasattr(tensor, "ds_id") for tensor in self.tensors.values()):
            self.swap()
        for tensor in self.tensors.values():
            tensor.requires_grad_(False)

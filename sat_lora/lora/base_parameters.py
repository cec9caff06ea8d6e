"""Parameters of the base that train whole, beside the adapters: `modules_to_save` and `bias`."""

from collections.abc import Iterator

import torch

from sat_lora._sat import RowParallelLinear
from sat_lora.errors import ConfigError
from sat_lora.lora.targets import BaseParameter
from sat_lora.parallel.sharding import mark_sharded, model_parallel_layout, sharding_of


class TrainedBase:
    """Parameters that train in place, so that ZeRO and model parallelism see ordinary ones.

    The originals wait on the CPU. It holds tensors and no modules, since the call that gives the originals back must
    not keep the model alive.
    """

    def __init__(self, parameters: dict[str, BaseParameter]):
        self.shardings = {name: sharding_of(place.module, place.leaf) for name, place in parameters.items()}
        # SAT sets only its own flag on what it cuts; DeepSpeed's gradient norm reads another.
        self.tensors = {name: mark_sharded(place.tensor, self.shardings[name]) for name, place in parameters.items()}
        self._hooks = [
            place.tensor.requires_grad_().register_hook(lambda gradient: gradient * model_parallel_layout()[1])
            for place in parameters.values()
            if has_part_of_gradient(place)
        ]
        self._originals: dict[str, torch.Tensor] = {}
        self._swapped = False

    @torch.no_grad()
    def remember(self) -> None:
        """Take the present values as the originals; of what ZeRO-3 has partitioned, this rank's partition."""
        local = {name: getattr(tensor, "ds_tensor", tensor) for name, tensor in self.tensors.items()}
        self._originals = {name: tensor.detach().to("cpu", copy=True) for name, tensor in local.items()}
        self._swapped = False

    def originals(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (parameter, its original on the CPU) of each that has another value now, as `remember` keeps it."""
        if not self._swapped:
            yield from ((self.tensors[name], original) for name, original in self._originals.items())

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange trained values and originals. Raises ConfigError where ZeRO-3 has partitioned one."""
        for name, tensor in self.tensors.items():
            if hasattr(tensor, "ds_id"):
                raise ConfigError(f"{name} is partitioned by ZeRO-3: its original cannot be brought back during a run")
        for name, tensor in self.tensors.items():
            current = tensor.detach().to("cpu", copy=True)
            tensor.copy_(self._originals[name])
            self._originals[name] = current
        self._swapped = not self._swapped

    def give_back(self) -> None:
        """Put the originals back and make them untrainable, for a base whose mixin is gone."""
        if not self._swapped and not any(hasattr(tensor, "ds_id") for tensor in self.tensors.values()):
            self.swap()
        for hook in self._hooks:
            hook.remove()
        for tensor in self.tensors.values():
            tensor.requires_grad_(False)


def has_part_of_gradient(parameter: BaseParameter) -> bool:
    """Return whether SAT leaves each of n model-parallel ranks an n-th of the gradient of a parameter that all hold.

    A row-parallel linear with final_bias=False (the ViT's) adds bias / n on every rank before the sum.
    """
    layer = parameter.module
    return isinstance(layer, RowParallelLinear) and parameter.leaf == "bias" and not layer.final_bias

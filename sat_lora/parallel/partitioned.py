"""ZeRO-3 while loading: parameters become partitions one by one, and no rank sends a weight to another."""

from typing import Any

import torch
from torch import nn

from sat_lora._sat import mpu


class Partitioning:
    """Cuts parameters over the data-parallel ranks as `deepspeed.zero.Init` does, without its broadcast.

    DeepSpeed 0.19.8 sends each whole parameter from the group's first rank to the others before it is cut. Here every
    rank has filled its own part from the file, so the two steps of `_zero_init_param` around the broadcast are taken.
    """

    def __init__(self, config: dict[str, Any]):
        """Take the data-parallel group that is there, and the settings of DeepSpeed's own `zero.Init`.

        config: what `deepspeed.initialize` will get; the process groups have to exist.
        """
        import deepspeed

        group = mpu.get_data_parallel_group()
        self.group = group
        self._init = deepspeed.zero.Init(config_dict_or_path=dict(config), data_parallel_group=group, mpu=mpu)
        self._rank = torch.distributed.get_rank(group)
        self._size = torch.distributed.get_world_size(group)
        if self._init.mem_efficient_linear:  # as `deepspeed.initialize` would, given parameters that are still whole
            self._init._enable_mem_efficient_linear()

    def rows(self, shape: torch.Size) -> range:
        """Return the rows, along the first dimension, that hold some of this rank's partition."""
        row = shape[1:].numel()
        length = -(-shape.numel() // self._size)
        start, stop = (min(length * rank, shape.numel()) for rank in (self._rank, self._rank + 1))
        return range(start // row, -(-stop // row))

    def partition(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part and free the rest."""
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()

"""What a piece of code sends, counted where every library's collectives pass: at torch's c10d operators."""

from collections import Counter

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling.communication import DATA, MODEL, WORLD, Collective
from sat_lora._sat import mpu

# The kind of each operator, and the argument that holds the whole tensor, rather than a rank's part of it.
KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
}


class CountCollectives(TorchDispatchMode):
    """`with CountCollectives() as count:` ... `count.seen`: how often each Collective was made.

    Left out is what a group of one rank does. An operator that KINDS does not know is an error.
    """

    def __init__(self):
        super().__init__()
        self.seen: Counter[Collective] = Counter()
        world = torch.distributed.group.WORLD
        groups = ((WORLD, world), (MODEL, mpu.get_model_parallel_group()), (DATA, mpu.get_data_parallel_group()))
        self._names = {group.group_name: name for name, group in groups}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            group = next(ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
            if group.size() > 1:
                kind, place = KINDS[operator._schema.name.partition("::")[2]]
                payload = sum(tensor.nbytes for tensor in _tensors(args[place]))
                self.seen[Collective(kind, payload, self._names[group.group_name])] += 1
        return operator(*args, **(kwargs or {}))


def _is_group(argument) -> bool:
    return isinstance(argument, torch.ScriptObject) and argument._type().name() == "ProcessGroup"


def _tensors(argument) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for one in argument for tensor in _tensors(one)]

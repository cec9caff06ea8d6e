"""SAT's own training loop on a machine without a GPU, for tests and demos; off unless asked for.

SAT 0.4.12 trains on CUDA alone. What stands in the way of gloo and a CPU is little, and all of it is here:

- `get_args` refuses a device that is not the local rank's number, in every mode but inference.
- `Timers` and `report_memory` synchronise with CUDA and ask it for its memory.
- `broadcast_data` and `save_checkpoint` put tensors on the current device of CUDA, and ask for its random state.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

import sat_lora._sat  # noqa: F401 (so that SAT is imported quietly)
from sat_lora._deepspeed import skip_shared_memory_build


@contextmanager
def sat_on_cpu() -> Iterator[None]:
    """Inside, `sat.get_args` and `training_main` run on the CPU with gloo; afterwards SAT and torch are as before.

    Nothing changes on a machine with CUDA. What SAT asks of `torch.cuda` is answered for the CPU, and `Tensor.cuda`
    gives the tensor itself. To be entered before `get_args` is called.
    """
    if torch.cuda.is_available():
        yield
        return
    import sat.arguments

    skip_shared_memory_build()
    cpu = torch.device("cpu")
    start = sat.arguments.initialize_distributed
    answers: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: cpu,
        "synchronize": lambda device=None: None,
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": lambda state: None,
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda device=None: 0),
        "max_memory_reserved": lambda device=None: 0,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor))
        stack.enter_context(mock.patch.object(sat.arguments, "initialize_distributed", _on_cpu(start)))
        yield


def _on_cpu(start: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return SAT's `initialize_distributed` for arguments that are sent to the CPU first."""

    def started(args: Any) -> bool:
        args.device = "cpu"
        args.distributed_backend = "gloo"
        return start(args)

    return started

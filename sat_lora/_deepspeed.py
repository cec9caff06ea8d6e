"""The door to DeepSpeed: what has to be said to it before it starts, with version and reason."""

import torch


def skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPU ranks; nothing changes where there is CUDA.

    DeepSpeed 0.19.8 compiles it at its first start, which takes half a minute and a C++ compiler, for what gloo does
    here anyway; and a start that is killed meanwhile leaves a lock for which all later ones wait.
    """
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

"""The end of an engine: its model goes on without it, and the memory that training took is given back."""

import gc

import torch

from sat_lora._sat import BaseModel


def end_training(engine) -> BaseModel | None:
    """Return the engine's model with trained values, without gradients and DeepSpeed's hooks; None where ZeRO-3 has
    partitioned the weights: no rank has a whole model, and its weights are freed too. The engine is of no use then.

    Optimizer, gradients and buffers are freed once the caller has let go of engine and optimizer and called
    `free_memory`.
    """
    model = engine.module
    engine.destroy()
    # DeepSpeed 0.19.8 leaves these on the model and on the optimizer, and each holds the engine.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    if hasattr(engine.optimizer, "unregister_grad_acc_post_hooks"):  # not a plain one, at stage 0
        engine.optimizer.unregister_grad_acc_post_hooks()
    partitioned = False
    for parameter in model.parameters():
        parameter.grad = None
        if hasattr(parameter, "ds_id"):
            # The functions that stage 3 puts on a parameter hold it and its part in a ring that is never collected.
            partitioned = True
            for name in vars(parameter).keys() - {"ds_id"}:
                delattr(parameter, name)
            parameter.data = parameter.data.new_empty(0)
    return None if partitioned else model


def free_memory() -> None:
    """Free objects in rings of references, and give the device back the memory that torch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

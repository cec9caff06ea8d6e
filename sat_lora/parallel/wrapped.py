"""What stands around a model while it trains: DeepSpeed's engine, or a wrapper of torch's."""

from typing import Any

from torch import nn

from sat_lora.errors import ConfigError

ENGINE = "DeepSpeedEngine"
COMPILED = "OptimizedModule"
SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def is_engine(model: object) -> bool:
    """Return whether that is an engine of DeepSpeed's; DeepSpeed need not be imported to know that."""
    return ENGINE in {base.__name__ for base in type(model).__mro__}


def is_in_engine(model: nn.Module) -> bool:
    """Return whether the model is the one in an engine, which has put hooks on it."""
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    return any(ENGINE in getattr(hook, "__qualname__", "") for hook in hooks)


def unwrapped(model: Any, *, user: str) -> nn.Module:
    """Return the model inside DeepSpeed's engine, or inside what torch wraps models in; a model alone is its own.

    user: who asks, for messages. Raises ConfigError for what is no model, for an engine that has been closed, and for
    FSDP, which cuts parameters in its own way.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{user}: got {_called(model)} for the model; give the model itself (a torch.nn.Module), or what "
            "deepspeed.initialize returns first"
        )
    if is_engine(model) and _is_closed(model):
        raise ConfigError(
            f"{user}: the engine has been closed (engine.destroy()), and its hooks are gone; call this before, or "
            "give the model, or a new engine"
        )
    classes = {base.__name__ for base in type(model).__mro__}
    if classes & SHARDED:
        raise ConfigError(
            f"{user}: the model is in torch's {min(classes & SHARDED)}, whose parts of parameters are not known here; "
            "use DeepSpeed's ZeRO stage 3"
        )
    if is_engine(model) or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module, user=user)
    if COMPILED in classes:
        return unwrapped(model._orig_mod, user=user)
    return model


def require_trainable(model: nn.Module, *, user: str) -> list[tuple[str, nn.Parameter]]:
    """Return the trainable parameters by name. Raises ConfigError where nothing of the model trains."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            f"{user}: nothing of the {type(model).__name__} trains; call add_lora(model, ...) or "
            'model.add_mixin("lora", LoraMixin(model, ...)) first'
        )
    return trained


def _called(thing: object) -> str:
    """Return how a message calls what was given in place of a model."""
    is_pair = isinstance(thing, tuple | list) and any(isinstance(part, nn.Module) for part in thing)
    return f"a {type(thing).__name__}" + (" with a model in it" if is_pair else "")


def _is_closed(engine: Any) -> bool:
    """Return whether the engine has been destroyed: DeepSpeed 0.19.8 keeps no note of that, but takes its hooks away.

    At ZeRO stage 0 it has none, and goes on working.
    """
    if getattr(engine, "module", None) is None:
        return True
    handles = getattr(engine.optimizer, "_grad_acc_hooks", [])
    hooks = [(handle.id, handle.hooks_dict_ref() or {}) for handle in handles if hasattr(handle, "hooks_dict_ref")]
    return bool(hooks) and not any(number in table for number, table in hooks)

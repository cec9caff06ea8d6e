"""LoRA for CogVLM and other SwissArmyTransformer models, with DeepSpeed ZeRO and model parallelism.

model.add_mixin("lora", LoraMixin(model, r=16, lora_alpha=32))
add_lora(model, LoraConfig(r=16))               # the language model and the vision transformer inside it
save_adapter(model, "adapter"); load_adapter(model, "adapter")
"""

import importlib

from sat_lora import _moved

__version__ = "0.1.0"

_HOMES = {
    "LoraMixin": "lora.mixin",
    "add_lora": "lora.apply",
    "freeze_base": "lora.base_parameters",
    "LoraConfig": "lora.config",
    "load_adapter": "adapters.save_load",
    "save_adapter": "adapters.save_load",
    "adapter_checkpoints": "interop.sat_trainer",
    "parameter_groups": "lora.optimizer_groups",
    "combine_adapters": "adapters.combine",
    "watched": "any_loop.watched",
    "GradientWatch": "any_loop.gradient_watch",
    "examine": "doctor.examine",
    "estimate": "memory.of_model",
    "describe": "lora.summary",
    "describe_text": "lora.summary",
    "SatLoraError": "errors",
    "AdapterError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "MergeError": "errors",
    "TrainingError": "errors",
    "QuantizationError": "errors",
    "quantize_model": "quantization.apply",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Return a public name, imported when it is first asked for: SAT takes seconds, and `--help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return what completion offers."""
    return sorted({*globals(), *__all__})


_moved.install()

"""LoRA for CogVLM and other SwissArmyTransformer models, with DeepSpeed ZeRO and model parallelism.

model.add_mixin("lora", LoraMixin(model, r=16, lora_alpha=32))
add_lora(model, LoraConfig(r=16))               # the language model and the vision transformer inside it
save_adapter(model, "adapter"); load_adapter(model, "adapter")
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "LoraMixin": "mixin",
    "add_lora": "placement",
    "freeze_base": "mixin",
    "LoraConfig": "config",
    "load_adapter": "adapter_file",
    "save_adapter": "adapter_file",
    "parameter_groups": "optimizer_groups",
    "combine_adapters": "combine",
    "describe": "summary",
    "describe_text": "summary",
    "SatLoraError": "errors",
    "AdapterError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "MergeError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name when it is first asked for: SAT takes seconds, and `sat-lora --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

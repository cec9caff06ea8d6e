"""LoRA for CogVLM and other SwissArmyTransformer models, with DeepSpeed ZeRO and model parallelism.

model.add_mixin("lora", LoraMixin(model, r=16, lora_alpha=32))
add_lora(model, LoraConfig(r=16))               # the language model and the vision transformer inside it
save_adapter(model, "adapter"); load_adapter(model, "adapter")
"""

from sat_lora.adapter_file import load_adapter, save_adapter
from sat_lora.config import LoraConfig
from sat_lora.errors import AdapterError, CheckpointError, ConfigError, DataError, SatLoraError
from sat_lora.mixin import LoraMixin, add_lora, freeze_base
from sat_lora.summary import describe, describe_text

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LoraConfig",
    "LoraMixin",
    "SatLoraError",
    "add_lora",
    "describe",
    "describe_text",
    "freeze_base",
    "load_adapter",
    "save_adapter",
]

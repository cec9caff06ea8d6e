"""The --deepspeed_config file: read, and checked for what DeepSpeed would ignore in silence or refuse much later."""

import difflib
import json
from pathlib import Path

from sat_lora.errors import ConfigError

# DeepSpeed (0.19.8) checks the keys of its sections, never those of the top level.
TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)
OFFLOADS = ("offload_optimizer", "offload_param")  # written at the top level, as in CogVLM's published config
SECTIONS = ("zero_optimization", "bf16", "bfloat16", "fp16", "optimizer", "scheduler", "activation_checkpointing")
POSITIVE_INTEGERS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_deepspeed_file(path: str | Path) -> dict:
    """The content of a DeepSpeed json without its "auto" entries. ConfigError: missing, not JSON, not an object."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--deepspeed_config: {path} is not a file; give DeepSpeed's json, or leave the option out")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed_config: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed_config: {path} holds a {type(content).__name__}, wanted a JSON object")
    return _without_auto(content)


def _without_auto(content: dict) -> dict:
    """Hugging Face's files leave an entry to the trainer by "auto"; to DeepSpeed it is just a wrong value."""
    kept = {name: value for name, value in content.items() if value != "auto"}
    return {name: _without_auto(value) if isinstance(value, dict) else value for name, value in kept.items()}


def file_problems(content: dict, path: str | Path) -> tuple[list[str], list[str]]:
    """(errors, warnings) about the content of a DeepSpeed file, each a sentence that names the entry."""
    where = f"--deepspeed_config: {path}"
    errors, warnings = [], []
    for key in sorted(content.keys() - TOP_LEVEL_KEYS):
        if key in OFFLOADS:
            warnings.append(
                f'{where}: "{key}" at the top level does nothing; DeepSpeed reads it inside "zero_optimization"'
            )
            continue
        near = difflib.get_close_matches(key, TOP_LEVEL_KEYS, 1, 0.5)
        hint = f'did you mean "{near[0]}"?' if near else "remove it"
        errors.append(f'{where}: "{key}" is no entry of DeepSpeed\'s top level and would be ignored; {hint}')
    sections = [name for name in SECTIONS if name in content]
    for name in sections:
        if not isinstance(content[name], dict):
            errors.append(f'{where}: "{name}" is {content[name]!r}, wanted an object in braces')
    for name in POSITIVE_INTEGERS:
        value = content.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            errors.append(f'{where}: "{name}" is {value!r}, wanted a whole number above 0')
    if not errors:
        errors += [f"{where}: {problem}" for problem in _problems_in_sections(content)]
    return errors, warnings


def _problems_in_sections(content: dict) -> list[str]:
    problems = [
        f'"{outer}": {problem}'
        for outer, check in _section_models().items()
        if outer in content
        for problem in check(content[outer])
    ]
    kind = content.get("optimizer", {}).get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        problems.append(f'"optimizer": type is {kind!r}, wanted "AdamW" or "Adam"; AdamW is what trains here')
    if enabled(content, "fp16") and (enabled(content, "bf16") or enabled(content, "bfloat16")):
        problems.append('"bf16" and "fp16" are both enabled; enable one')
    return problems


def enabled(content: dict, section: str) -> bool:
    """Whether a section is there and says `"enabled": true`."""
    return content.get(section, {}).get("enabled", False) is True


def _section_models() -> dict:
    """DeepSpeed's own checks of the sections that ZeRO and precision need, as functions that list problems."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    import sat_lora._sat  # noqa: F401  imports DeepSpeed without its remarks

    def check_with(model):
        def check(section: dict) -> list[str]:
            try:
                model(**section)
            except ValidationError as error:
                return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            return []

        return check

    bf16 = check_with(DeepSpeedBF16Config)
    fp16, zero = check_with(DeepSpeedFP16Config), check_with(DeepSpeedZeroConfig)
    return {"zero_optimization": zero, "bf16": bf16, "bfloat16": bf16, "fp16": fp16}


def section_keys() -> dict[str, frozenset[str]]:
    """The keys that DeepSpeed reads inside its sections, by section; sections in sections as "outer.inner"."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    found = {
        section: frozenset(name for field, one in model.model_fields.items() for name in (field, one.alias) if name)
        for section, model in models.items()
    }
    found["bfloat16"] = found["bf16"]
    found["optimizer"], found["scheduler"] = (
        frozenset({"type", "params", "legacy_fusion"}),
        frozenset({"type", "params"}),
    )
    found["optimizer.params"] = frozenset("lr betas eps weight_decay bias_correction torch_adam adam_w_mode".split())
    found["scheduler.params"] = frozenset(
        "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps last_batch_iteration".split()
    )
    found["activation_checkpointing"] = frozenset(
        """
        partition_activations number_checkpoints contiguous_memory_optimization synchronize_checkpoint_boundary
        cpu_checkpointing profile
        """.split()
    )
    return found

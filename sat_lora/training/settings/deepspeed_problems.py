"""What is wrong with a --deepspeed_config file: what DeepSpeed would ignore, or refuse much later."""

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from sat_lora.printable import printable
from sat_lora.training.settings.deepspeed_file import (
    ENTRIES,
    OF_OPTIMIZER,
    SWITCHES,
    WHOLE,
    enabled,
    is_no_number,
    is_number,
    is_reached,
    is_whole,
    shown,
)

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
# Entries that would change what is trained, or how, in a way that this program has not; `false` or "enabled": false is
# as good as nothing. Those that are not in TOP_LEVEL_KEYS are of other versions of DeepSpeed.
UNSUPPORTED = frozenset(
    """
    amp autotuning compile compression_training curriculum_learning data_efficiency datastates_ckpt deepspeed_mpi
    eigenvalue elasticity expert_parallel hybrid_engine nebula pipeline progressive_layer_drop quantize_training
    seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients tensor_parallel
    torch_autocast use_data_before_expert_parallelism weight_quantization
    """.split()
)
SECTIONS = frozenset(
    """
    activation_checkpointing aio bf16 bfloat16 checkpoint comet comms_logger csv_monitor data_types
    flops_profiler fp16 optimizer scheduler tensorboard timers wandb zero_optimization
    """.split()
)
LARGEST_POWER = 126  # the largest power of two by which float32 bears to multiply a loss
DATA_TYPES = ("fp32", "fp16", "bf16")
# Entries that DeepSpeed itself takes, and what it wants.
SCALARS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "train_batch_size": (WHOLE, lambda v: is_whole(v, 1)),
    "steps_per_print": (WHOLE, lambda v: is_whole(v, 1)),
    "gradient_predivide_factor": ("a number above 0", lambda v: is_number(v, above=0)),
    "communication_data_type": (f"one of {', '.join(DATA_TYPES)}", lambda v: v in DATA_TYPES),
    "gradient_allreduce_op": (
        '"mean": the losses of all ranks are weighed already',
        lambda v: str(v).lower() in ("mean", "avg", "average"),
    ),
    **{name: ("true or false", lambda v: isinstance(v, bool)) for name in SWITCHES if name != "enabled"},
}
# Entries of the optimizer beside those in ENTRIES, with the values that change nothing.
HARMLESS_OF_OPTIMIZER = {
    "adam_w_mode": (True,),
    "amsgrad": (False,),
    "bias_correction": (True,),
    "capturable": (True, False),
    "foreach": (True, False),
    "fused": (True, False),
    "maximize": (False,),
    "torch_adam": (True, False),
}


def file_problems(content: dict, path: str | Path) -> tuple[list[str], list[str]]:
    """Return (errors, warnings) about the plain content of a DeepSpeed file, each a sentence that names the entry."""
    where = f"--deepspeed_config: {printable(path)}"
    warnings = [
        f'{where}: "{key}" at the top level does nothing; DeepSpeed reads it inside "zero_optimization"'
        for key in OFFLOADS
        if key in content
    ]
    errors = [*_problems_at_the_top(content), *_numbers_that_are_none(content)]
    objects = {key: value for key, value in content.items() if key not in SECTIONS or isinstance(value, dict)}
    finite = _without_numbers_that_are_none(objects)
    errors += _problems_in_sections(finite)
    named = {key for key in finite if any(error.startswith(f'"{key}"') for error in errors)}
    errors += _refused_by_deepspeed({key: finite[key] for key in finite.keys() & TOP_LEVEL_KEYS - named})
    if content.get("checkpoint"):
        warnings.append(f'{where}: "checkpoint" is not used; checkpoints are this program\'s own')
    return [f"{where}: {problem}" for problem in errors], warnings


def is_of_key(problem: str, key: str) -> bool:
    """Return whether one of `file_problems` says no more than that DeepSpeed does not know a key where it stands."""
    return (
        f': "{printable(key)}" is no entry of ' in problem
        or f'"params" has "{printable(key)}", which ' in problem
        or re.search(rf"[ .]{re.escape(printable(key))}: Extra inputs", problem) is not None
    )


def _problems_at_the_top(content: dict) -> Iterator[str]:
    """Yield what is wrong with entries of the top level, each as a sentence that names it."""
    for key in sorted(content.keys() - set(OFFLOADS)):
        value = content[key]
        if key in UNSUPPORTED:
            if _is_on(value):
                yield f'"{key}" is {shown(value)}, which this program does not do; remove it'
        elif key not in TOP_LEVEL_KEYS:
            yield f'"{printable(key)}" is no entry of DeepSpeed\'s top level and would be ignored; {_advice(key)}'
        elif key in SECTIONS and not isinstance(value, dict):
            yield f'"{key}" is {shown(value)}, wanted an object in braces'
        elif key in SCALARS and not is_no_number(value) and not SCALARS[key][1](value):
            yield f'"{key}" is {shown(value)}, wanted {SCALARS[key][0]}'
    for entry in ENTRIES:
        problem = entry.problem(content) if len(entry.path) == 1 else None
        if problem:
            yield problem


def _is_on(value) -> bool:
    """Return whether an entry asks for something: no empty or disabled section, no `false`, no size of 0 or 1."""
    if isinstance(value, dict):
        return value.get("enabled", bool(value)) is not False
    return value is True or value not in (0, 1, "", [])


def _advice(key: str) -> str:
    """Return what to do about a key that DeepSpeed does not know at the top level."""
    homes = [place for place, keys in section_keys().items() if key in keys]
    if homes:
        return f'DeepSpeed reads it inside "{homes[0]}"; move it there'
    near = difflib.get_close_matches(key.lower(), TOP_LEVEL_KEYS, 1, 0.75)
    return f'did you mean "{near[0]}"?' if near else "remove it"


def _numbers_that_are_none(content, place: str = "") -> Iterator[str]:
    """Yield a sentence for each NaN and infinity, which Python's JSON takes, wherever it stands. place: the dotted name
    of the content.
    """
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        name = f"{place}.{key}" if place else str(key)
        if is_no_number(value):
            yield f'"{printable(name)}" is {value}, wanted a finite number'
        yield from _numbers_that_are_none(value, name)


def _without_numbers_that_are_none(content):
    """Return the content without NaN and infinities, of which enough has been said."""
    if isinstance(content, dict):
        return {
            key: _without_numbers_that_are_none(value)
            for key, value in content.items()
            if not any(map(is_no_number, value if isinstance(value, list) else [value]))
        }
    return content


def _problems_in_sections(content: dict) -> list[str]:
    """Return what is wrong inside the sections of a file, each as a sentence that names the entry."""
    problems = [*_optimizer_problems(content.get("optimizer", {})), *_schedule_problems(content.get("scheduler", {}))]
    inner = [entry for entry in ENTRIES if len(entry.path) > 1 and is_reached(entry.path, content)]
    said = {entry.path: problem for entry in inner if (problem := entry.problem(content))}
    problems += said.values()
    for outer, (model, check) in _section_models().items():
        section = {key: value for key, value in content.get(outer, {}).items() if (outer, key) not in said}
        wrong = dict(_wrong_kinds(model, section))
        rest = {key: value for key, value in section.items() if key not in wrong}
        problems += [f'"{outer}": {problem}' for problem in (*wrong.values(), *check(rest))]
    power = content.get("fp16", {}).get("initial_scale_power", 16)
    if is_number(power) and not (is_whole(power, 0) and power <= LARGEST_POWER):
        wanted = f"a whole number from 0 to {LARGEST_POWER}"
        problems.append(f'"fp16": "initial_scale_power" is {shown(power)}, wanted {wanted}')
    for name in OFFLOADS:
        offload = content.get("zero_optimization", {}).get(name, {})
        if isinstance(offload, dict) and offload.get("device") == "nvme" and not offload.get("nvme_path"):
            problems.append(f'"zero_optimization": "{name}" goes to nvme without an "nvme_path"; name a folder there')
    data_type = content.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if data_type not in DATA_TYPES:
        wanted = ", ".join(DATA_TYPES)
        problems.append(f'"data_types": "grad_accum_dtype" is {shown(data_type)}, wanted one of {wanted}')
    if "bf16" in content and "bfloat16" in content:
        problems.append('"bf16" and "bfloat16" are two names of one section; keep "bf16"')
    if enabled(content, "fp16") and (enabled(content, "bf16") or enabled(content, "bfloat16")):
        problems.append('"bf16" and "fp16" are both enabled; enable one')
    return problems


def _optimizer_problems(section: dict) -> Iterator[str]:
    """Yield what is wrong with the section "optimizer", of which AdamW takes what it has."""
    kind = section.get("type", "AdamW")
    settings = section.get("params", {})
    if str(kind).lower() not in ("adam", "adamw"):
        yield f'"optimizer": type is {shown(kind)}, wanted "AdamW" or "Adam"; AdamW is what trains here'
    if not isinstance(settings, dict):
        yield f'"optimizer": "params" is {shown(settings)}, wanted an object in braces'
        return
    known = [*(entry.path[-1] for entry in ENTRIES if entry.path[:2] == OF_OPTIMIZER), *HARMLESS_OF_OPTIMIZER]
    for key in sorted(settings.keys() - known):
        near = difflib.get_close_matches(key, known, 1, 0.6)
        hint = f'did you mean "{near[0]}"?' if near else "remove it"
        yield f'"optimizer": "params" has "{printable(key)}", which AdamW does not take; {hint}'
    for key in settings.keys() & HARMLESS_OF_OPTIMIZER.keys():
        if settings[key] not in HARMLESS_OF_OPTIMIZER[key]:
            yield f'"optimizer": "{key}" is {shown(settings[key])}, which this program does not do; remove it'


def _schedule_problems(section: dict) -> Iterator[str]:
    """Yield what is wrong with the section "scheduler": it is not used, but whoever wrote it meant something."""
    kind = section.get("type", "")
    settings = section.get("params", {})
    if not isinstance(kind, str):
        yield f'"scheduler": "type" is {shown(kind)}, wanted a name in quotes such as "WarmupDecayLR"'
    if not isinstance(settings, dict):
        yield f'"scheduler": "params" is {shown(settings)}, wanted an object in braces'


def _section_models() -> dict:
    """Return by section, of those for ZeRO and precision, (DeepSpeed's own model of it, a function that lists
    problems).
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    import sat_lora._sat  # noqa: F401  imports DeepSpeed without its remarks

    def check_with(model):
        def check(section: dict) -> list[str]:
            try:
                model(**section)
            except ValidationError as error:
                return _complaints(error)
            except (TypeError, ValueError, AttributeError) as error:
                return [str(error)]
            return []

        return model, check

    bf16 = check_with(DeepSpeedBF16Config)
    fp16 = check_with(DeepSpeedFP16Config)
    zero = check_with(DeepSpeedZeroConfig)
    return {"zero_optimization": zero, "bf16": bf16, "bfloat16": bf16, "fp16": fp16}


def _complaints(error) -> list[str]:
    """Return what pydantic says, field by field; of another error its text."""
    fields = error.errors() if hasattr(error, "errors") else ()
    return [f"{'.'.join(map(str, field['loc']))}: {field['msg']}" for field in fields] or [printable(error)]


def _wrong_kinds(model, section: dict) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) of values that pydantic would turn into another kind: true for a number, a number in
    quotes.
    """
    fields = {key: field for name, field in model.model_fields.items() for key in (name, field.alias) if key}
    for key in section.keys() & fields.keys():
        kind = fields[key].annotation
        value = section[key]
        if kind in (int, float) and isinstance(value, bool | str):
            yield key, f'"{key}" is {shown(value)}, wanted a number, without quotes'
        elif kind in (int, float) and is_number(value) and not abs(value) < 2**63:
            yield key, f'"{key}" is {shown(value)}, wanted a number below 2^63'
        elif kind is bool and not isinstance(value, bool):
            yield key, f'"{key}" is {shown(value)}, wanted true or false'


def _refused_by_deepspeed(content: dict) -> list[str]:
    """Return what DeepSpeed says against entries that nothing above looks into, each as a sentence that names it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    problems = []
    looked_at = {entry.path[0] for entry in ENTRIES} | SCALARS.keys() | UNSUPPORTED | set(OFFLOADS)
    for key in sorted(content.keys() - looked_at - {"bf16", "bfloat16", "fp16", "scheduler"}):
        try:
            DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, key: content[key]})
        except Exception as error:  # whatever a parser of another project meets
            problems.append(f'"{key}" is refused by DeepSpeed: {"; ".join(_complaints(error))}')
    return problems


def section_keys() -> dict[str, frozenset[str]]:
    """Return the keys that DeepSpeed reads inside its sections, by section; sections in sections as "outer.inner"."""
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
    keys = {
        section: frozenset(key for name, field in model.model_fields.items() for key in (name, field.alias) if key)
        for section, model in models.items()
    }
    keys["bfloat16"] = keys["bf16"]
    keys["optimizer"] = frozenset({"type", "params", "legacy_fusion"})
    keys["scheduler"] = frozenset({"type", "params"})
    keys["optimizer.params"] = frozenset("lr betas eps weight_decay bias_correction torch_adam adam_w_mode".split())
    keys["scheduler.params"] = frozenset(
        "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps last_batch_iteration".split()
    )
    keys["activation_checkpointing"] = frozenset(
        """
        partition_activations number_checkpoints contiguous_memory_optimization synchronize_checkpoint_boundary
        cpu_checkpointing profile
        """.split()
    )
    return keys

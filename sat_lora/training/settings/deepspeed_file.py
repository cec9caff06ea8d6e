"""The --deepspeed_config file: read, made plain, and checked for what DeepSpeed would ignore or refuse much later.

Whatever trainers, editors and people leave to others in such a file is made plain once, in `open_deepspeed_file`: an
entry that says "auto" or null is as if it were not there, and a boolean in quotes is a boolean. ENTRIES are those that
decide a setting of the run; `deepspeed_config` takes them by the same table by which they are checked here.
"""

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sat_lora.errors import ConfigError
from sat_lora.files.foreign import JSON_LIMIT, parse_json, read_bytes
from sat_lora.printable import printable
from sat_lora.terminal.option_types import LARGEST_RATE

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
SWITCHES = frozenset(
    """
    dataloader_drop_last disable_allgather disable_python_gc dump_state enabled managed_gradient_accumulation
    memory_breakdown prescale_gradients wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """.split()
)
LARGEST_POWER = 126  # the largest power of two by which float32 bears to multiply a loss
DATA_TYPES = ("fp32", "fp16", "bf16")
_YES = ("1", "yes", "on", "y", "t")
_NO = ("0", "no", "off", "n", "f")


@dataclass(frozen=True)
class Entry:
    """An entry of the file that decides an option."""

    option: str
    """The name of the setting."""
    path: tuple[str, ...]
    """The keys that lead to the entry."""
    label: str
    """What a line about the decision calls it."""
    wanted: str
    """What fits, for messages."""
    accepts: Callable[[object], bool]
    kind: Callable = float
    """The function that makes the setting's value of the entry's."""

    def value_in(self, content: dict):
        """Return the entry's value in a file whose sections are objects; None where it has none."""
        value: Any = content
        for key in self.path:
            value = value.get(key)
            if value is None:
                return None
        return value

    def problem(self, content: dict) -> str | None:
        """Return what is wrong with the entry's value in a file whose sections are objects; None where nothing is."""
        value = self.value_in(content)
        if value is None or _is_no_number(value) or self.accepts(value):
            return None
        section = f'"{self.path[0]}": ' if len(self.path) > 1 else ""
        quoted = ", without quotes" if isinstance(value, str) else ""
        return f'{section}"{self.path[-1]}" is {_shown(value)}, wanted {self.wanted}{quoted}'


def is_number(
    value: object, low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf
) -> TypeGuard[float]:
    """Return whether a value is a finite number, no boolean, from `low` to `high` and above `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return False
    return low <= value <= high and value > above


def _is_no_number(value) -> bool:
    """Return whether a value is NaN or an infinity, of which `_numbers_that_are_none` speaks."""
    return isinstance(value, float) and not math.isfinite(value)


def is_whole(value: object, low: int) -> TypeGuard[float]:
    """Return whether a value is a whole number from `low` on; 4.0 is one."""
    return is_number(value, low, 2**63 - 1) and value == int(value)


def _are_betas(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(beta, 0) and beta < 1 for beta in value)


_WHOLE = "a whole number above 0"
_OF_OPTIMIZER = ("optimizer", "params")
ENTRIES = (
    Entry("batch_size", ("train_micro_batch_size_per_gpu",), "batch size", _WHOLE, lambda v: is_whole(v, 1), int),
    Entry(
        "gradient_accumulation_steps",
        ("gradient_accumulation_steps",),
        "accumulation steps",
        _WHOLE,
        lambda v: is_whole(v, 1),
        int,
    ),
    Entry("clip_grad", ("gradient_clipping",), "clipping", "a number, 0 or above", lambda v: is_number(v, 0)),
    Entry(
        "zero_stage",
        ("zero_optimization", "stage"),
        "ZeRO stage",
        "a number: 0, 1, 2 or 3",
        lambda v: is_whole(v, 0) and v <= 3,
        int,
    ),
    Entry(
        "lr",
        (*_OF_OPTIMIZER, "lr"),
        "lr",
        f"a number above 0, {LARGEST_RATE:g} at most",
        lambda v: is_number(v, high=LARGEST_RATE, above=0),
    ),
    Entry(
        "eps",
        (*_OF_OPTIMIZER, "eps"),
        "eps",
        "a number from 1e-38 up to, but not including, 1",
        lambda v: is_number(v, 1e-38) and v < 1,  # none in float32 divides by the moments of a gradient of 0
    ),
    Entry(
        "weight_decay",
        (*_OF_OPTIMIZER, "weight_decay"),
        "weight decay",
        "a number, 0 or above",
        lambda v: is_number(v, 0, LARGEST_RATE),
    ),
    Entry(
        "betas",
        (*_OF_OPTIMIZER, "betas"),
        "betas",
        "two numbers from 0 up to, but not including, 1",
        _are_betas,
        lambda betas: [float(beta) for beta in betas],
    ),
)
# Entries that DeepSpeed itself takes, and what it wants.
SCALARS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "train_batch_size": (_WHOLE, lambda v: is_whole(v, 1)),
    "steps_per_print": (_WHOLE, lambda v: is_whole(v, 1)),
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


@dataclass(frozen=True)
class DeepSpeedFile:
    """The content of a DeepSpeed json, and the names of what it leaves to the trainer."""

    content: dict
    """The content without entries of "auto" and null; what stands for true or false in an `enabled` is a boolean."""
    auto: tuple[str, ...]
    """The dotted names of the entries that say "auto"."""


def read_deepspeed_file(path: str | Path) -> dict:
    """Return the content of a DeepSpeed json, made plain. Raises ConfigError as `open_deepspeed_file` does."""
    return open_deepspeed_file(path).content


def open_deepspeed_file(path: str | Path) -> DeepSpeedFile:
    """Return what the json says, made plain. Raises ConfigError where it is missing, is not JSON (with line and
    column), or is not an object.
    """
    path = Path(path)
    where = f"--deepspeed_config: {printable(path)}"
    try:
        text = read_bytes(path, JSON_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{where} is not a file; give DeepSpeed's json, or leave the option out") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}; give DeepSpeed's json") from error
    try:
        content = parse_json(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read as JSON: {_why_no_json(path, text, error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds a {type(content).__name__}, wanted a JSON object")
    auto: list[str] = []
    return DeepSpeedFile(_plain(content, "", auto), tuple(auto))


def values_of_file(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that plain content of a DeepSpeed file decides, by name; a wrong value decides
    nothing.
    """
    values = {}
    for entry in ENTRIES:
        if _is_reached(entry.path, dict(content)):
            value = entry.value_in(dict(content))
            if value is not None and entry.accepts(value):
                values[entry.option] = entry.kind(value)
    return values


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Return the object of these pairs. Raises ValueError for a key that comes twice, of which JSON would keep the
    last.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{printable(twice)}" stands twice in one object; keep one of them')
    return content


def _why_no_json(path: Path, text: bytes, error: Exception) -> str:
    """Return why a file cannot be read as JSON, and what it probably is or what to mend."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16; save it as UTF-8"
    if not text.strip():
        return "it is empty"
    lines = [line for line in text.decode("utf-8", "replace").splitlines() if line.strip() and line.strip()[0] != "#"]
    if path.suffix.lower() in (".yaml", ".yml") or (lines and re.match(r"\s*(---|-\s|[\w.-]+\s*:(\s|$))", lines[0])):
        return (
            f'it is YAML, and DeepSpeed reads JSON: write {{"zero_optimization": {{"stage": 2}}}} for stage 2, say; '
            f"of an accelerate config give the json that its deepspeed_config_file names ({error})"
        )
    if isinstance(error, json.JSONDecodeError):
        before = error.doc[: error.pos].rstrip()
        after = error.doc[error.pos :].lstrip()
        if after.startswith(("//", "/*", "#")):
            return f"{error}; JSON has no comments, remove it"
        if before.endswith(",") and after[:1] in ("}", "]"):
            return f"{error}; remove the comma before it"
        if after.startswith("'") or re.match(r"(True|False|None)\b", after):
            return f'{error}; JSON wants "double quotes", true, false and null'
    return str(error)


def _plain(content: dict, place: str, auto: list[str]) -> dict:
    """Return the section without entries that are left to the trainer, whose dotted names are added to `auto`."""
    plain = {}
    for key, value in content.items():
        name = f"{place}{key}"
        if isinstance(value, dict):
            plain[key] = _plain(value, f"{name}.", auto)
        elif _is_auto(value):
            auto.append(name)
        elif value is not None and not (name == "steps_per_print" and _is_never(value)):
            plain[key] = _switch(key, value)
    return plain


def _is_auto(value) -> bool:
    """Return whether an entry is left to the trainer: "auto", or a list of that."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_auto, value))
    return isinstance(value, str) and value.strip().lower() == "auto"


def _is_never(value) -> bool:
    """Return whether a value is the infinity of steps that accelerate writes: nothing is printed then, as is the case
    here.
    """
    text = value.strip().lower() if isinstance(value, str) else value
    return text in ("inf", "infinity", math.inf)


def _switch(key: str, value):
    """Return the boolean that a value stands for, and another value as it is; no text of DeepSpeed's is "true"."""
    text = value.strip().lower() if isinstance(value, str) else None
    if text in ("true", "false"):
        return text == "true"
    if key in SWITCHES and (text in _YES + _NO or (type(value) is int and value in (0, 1))):
        return text in _YES if text is not None else bool(value)
    return value


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
                yield f'"{key}" is {_shown(value)}, which this program does not do; remove it'
        elif key not in TOP_LEVEL_KEYS:
            yield f'"{printable(key)}" is no entry of DeepSpeed\'s top level and would be ignored; {_advice(key)}'
        elif key in SECTIONS and not isinstance(value, dict):
            yield f'"{key}" is {_shown(value)}, wanted an object in braces'
        elif key in SCALARS and not _is_no_number(value) and not SCALARS[key][1](value):
            yield f'"{key}" is {_shown(value)}, wanted {SCALARS[key][0]}'
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
        if _is_no_number(value):
            yield f'"{printable(name)}" is {value}, wanted a finite number'
        yield from _numbers_that_are_none(value, name)


def _without_numbers_that_are_none(content):
    """Return the content without NaN and infinities, of which enough has been said."""
    if isinstance(content, dict):
        return {
            key: _without_numbers_that_are_none(value)
            for key, value in content.items()
            if not any(map(_is_no_number, value if isinstance(value, list) else [value]))
        }
    return content


def _problems_in_sections(content: dict) -> list[str]:
    """Return what is wrong inside the sections of a file, each as a sentence that names the entry."""
    problems = [*_optimizer_problems(content.get("optimizer", {})), *_schedule_problems(content.get("scheduler", {}))]
    inner = [entry for entry in ENTRIES if len(entry.path) > 1 and _is_reached(entry.path, content)]
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
        problems.append(f'"fp16": "initial_scale_power" is {_shown(power)}, wanted {wanted}')
    for name in OFFLOADS:
        offload = content.get("zero_optimization", {}).get(name, {})
        if isinstance(offload, dict) and offload.get("device") == "nvme" and not offload.get("nvme_path"):
            problems.append(f'"zero_optimization": "{name}" goes to nvme without an "nvme_path"; name a folder there')
    data_type = content.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if data_type not in DATA_TYPES:
        wanted = ", ".join(DATA_TYPES)
        problems.append(f'"data_types": "grad_accum_dtype" is {_shown(data_type)}, wanted one of {wanted}')
    if "bf16" in content and "bfloat16" in content:
        problems.append('"bf16" and "bfloat16" are two names of one section; keep "bf16"')
    if enabled(content, "fp16") and (enabled(content, "bf16") or enabled(content, "bfloat16")):
        problems.append('"bf16" and "fp16" are both enabled; enable one')
    return problems


def _is_reached(path: tuple[str, ...], content: dict) -> bool:
    """Return whether all sections that an entry lies in are objects, or are not there."""
    for key in path[:-1]:
        content = content.get(key, {})
        if not isinstance(content, dict):
            return False
    return True


def _optimizer_problems(section: dict) -> Iterator[str]:
    """Yield what is wrong with the section "optimizer", of which AdamW takes what it has."""
    kind = section.get("type", "AdamW")
    settings = section.get("params", {})
    if str(kind).lower() not in ("adam", "adamw"):
        yield f'"optimizer": type is {_shown(kind)}, wanted "AdamW" or "Adam"; AdamW is what trains here'
    if not isinstance(settings, dict):
        yield f'"optimizer": "params" is {_shown(settings)}, wanted an object in braces'
        return
    known = [*(entry.path[-1] for entry in ENTRIES if entry.path[:2] == _OF_OPTIMIZER), *HARMLESS_OF_OPTIMIZER]
    for key in sorted(settings.keys() - known):
        near = difflib.get_close_matches(key, known, 1, 0.6)
        hint = f'did you mean "{near[0]}"?' if near else "remove it"
        yield f'"optimizer": "params" has "{printable(key)}", which AdamW does not take; {hint}'
    for key in settings.keys() & HARMLESS_OF_OPTIMIZER.keys():
        if settings[key] not in HARMLESS_OF_OPTIMIZER[key]:
            yield f'"optimizer": "{key}" is {_shown(settings[key])}, which this program does not do; remove it'


def _schedule_problems(section: dict) -> Iterator[str]:
    """Yield what is wrong with the section "scheduler": it is not used, but whoever wrote it meant something."""
    kind = section.get("type", "")
    settings = section.get("params", {})
    if not isinstance(kind, str):
        yield f'"scheduler": "type" is {_shown(kind)}, wanted a name in quotes such as "WarmupDecayLR"'
    if not isinstance(settings, dict):
        yield f'"scheduler": "params" is {_shown(settings)}, wanted an object in braces'


def enabled(content: dict, section: str) -> bool:
    """Return whether a section is there and says `"enabled": true`."""
    return content.get(section, {}).get("enabled") is True


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
            yield key, f'"{key}" is {_shown(value)}, wanted a number, without quotes'
        elif kind in (int, float) and is_number(value) and not abs(value) < 2**63:
            yield key, f'"{key}" is {_shown(value)}, wanted a number below 2^63'
        elif kind is bool and not isinstance(value, bool):
            yield key, f'"{key}" is {_shown(value)}, wanted true or false'


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


def _shown(value) -> str:
    """Return a value as text for a message, cut where it is long."""
    text = printable(repr(value))
    return text if len(text) <= 100 else text[:100] + " ..."


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

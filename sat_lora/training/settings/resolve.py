"""The config of a run, out of all sources that have a say in it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sat_lora.errors import ConfigError
from sat_lora.training.settings.config import DEFAULTS, LORA_FIELDS, NONE, Origin, TrainConfig
from sat_lora.training.settings.deepspeed_file import values_of_file
from sat_lora.training.settings.lora_options import lora_problems

LOWEST_USEFUL_RATE = 1e-5
EXCLUSIVE = (("train_iters", "epochs"), ("bf16", "fp16"))
"""Pairs of settings of which the one from the better source counts, and the other is as if nobody had said it."""
QUANTIZING = ("quantize", "quantize_modules", "keep_modules")
NOTHING: Mapping[str, Any] = {}


def resolve(
    given: Mapping[str, Any],
    *,
    file: Mapping[str, Any] = NOTHING,
    resumed_run: Mapping[str, Any] = NOTHING,
    deepspeed_json: Mapping[str, Any] = NOTHING,
    demo: Mapping[str, Any] = NOTHING,
    base: Mapping[str, Any] = NOTHING,
    local_rank: int = 0,
) -> tuple[TrainConfig, list[str]]:
    """Return (the config, warnings). It reads no file, prints nothing and changes nothing.

    Each value comes from the first that has one: `given` (the options of the command line), `file` (a --config file),
    what was set by hand in the run to go on with, `deepspeed_json`, the rest of that run, `base` (what the
    base says, see `settings_of_base`), `demo`, the defaults.

    resumed_run: as `settings_of_run` gives it, with the names of what was set by hand under `given`. deepspeed_json: as
    `read_deepspeed_file` gives it; entries that are wrong say nothing here, `file_problems` speaks of them.
    local_rank: as the launcher says.
    Raises ConfigError where two settings exclude each other. What is wrong with LoRA's values is in `problems` of the
    config.
    """
    _refuse_pairs(given, file)
    stored = {name: value for name, value in resumed_run.items() if name != "given"}
    if stored.get("train_iters") is not None:
        stored.pop("epochs", None)  # a run has written down what they came to
    by_hand = {name: value for name, value in stored.items() if name in resumed_run.get("given", ())}
    rest = {name: value for name, value in stored.items() if name not in by_hand}
    sources: list[tuple[Origin, Mapping[str, Any]]] = [
        (Origin.DEMO, demo),
        (Origin.BASE, base),
        (Origin.RUN_DEFAULT, rest),
        (Origin.DEEPSPEED, values_of_file(deepspeed_json)),
        (Origin.RUN, by_hand),
        (Origin.FILE, file),
        (Origin.OPTION, given),
    ]
    values: dict[str, Any] = {"local_rank": local_rank}
    origins: dict[str, Origin] = {}
    for origin, own in sources:
        for pair in EXCLUSIVE:
            for name, beaten in (pair, pair[::-1]):
                if own.get(name) and not own.get(beaten):
                    values[beaten] = DEFAULTS[beaten]
                    origins.pop(beaten, None)
        values |= own
        origins |= dict.fromkeys(own, origin)
    values["local_tokenizer"] = values.get("local_tokenizer") or values.get("from_pretrained")
    if values.get("replay"):
        values["experiment_name"] = "replay"
    config = _config_of(values, origins)
    return config, _warnings(config.optimizer.lr, deepspeed_json)


def held_as_its_folder(config: TrainConfig) -> TrainConfig:
    """Return the config for a base that answers, on the weights that its folder holds.

    A folder that is quantised needs no option: what a run says of how it held its own base is left out where another
    base is given. Raises ConfigError, with all problems, for options of this start that cannot be followed, and
    CheckpointError where the note of the folder is none. That is read only where something is said of it.
    """
    said = config.given_here & set(QUANTIZING)
    if not said and config.quantization.quantize == NONE:
        return config
    from sat_lora.cogvlm.checkpoints.quantized_files import note_of_folder  # which imports torch

    note = note_of_folder(config.model.base)
    if note is not None and "from_pretrained" in config.given_here and "quantize" not in said:
        config = config.replaced(quantize=NONE)
    if config.quantization.quantize == NONE:  # the run's patterns say nothing then
        config = config.replaced(**{name: DEFAULTS[name] for name in QUANTIZING if name not in said})
    if problems := config.quantization.unheeded(config.given_here, note, config.model.base):
        raise ConfigError("; ".join(problems))
    return config


def _config_of(values: dict[str, Any], origins: Mapping[str, Origin]) -> TrainConfig:
    """Return the config with these values; what no LoraConfig can have is left out of it, and said in `problems`."""
    lora = {name: values[name] for name in (*LORA_FIELDS, "seed") if name in values}
    config = TrainConfig.of({name: value for name, value in values.items() if name not in lora}, origins)
    try:
        return config.replaced(**lora)
    except ConfigError as error:
        schedule = replace(config.schedule, seed=values.get("seed", config.schedule.seed))
        return replace(config, schedule=schedule, problems=tuple(lora_problems(error)))


def _refuse_pairs(given: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    """Raise ConfigError where settings that were set by hand contradict each other."""
    for source, start in ((given, ("--train-iters", "--epochs")), (file, ("--config: train_iters", "epochs"))):
        if source.get("train_iters") is not None and source.get("epochs") is not None:
            raise ConfigError(
                f"{start[0]} {source['train_iters']} and {start[1]} {source['epochs']:g}: both say how long to train; "
                "give one of them"
            )
    if "shrink" in given and not given.keys() & {"doctor", "replay"}:
        raise ConfigError(
            f"--shrink {given['shrink']}: training takes the whole model; it is for --doctor and --replay"
        )
    if {"overwrite", "resume"} <= given.keys():
        raise ConfigError("--overwrite and --resume: the one removes what the other goes on with; give one of them")
    if "any_data" in given and "resume" not in given:
        raise ConfigError("--any-data: a run that starts takes any data; it is for --resume")
    for source, prefix in ((given, "--{}"), (file, "--config: {}")):
        for name in ("save", "experiment_name"):
            if source.get(name) is not None and not source[name].strip():
                shown = prefix.format(name.replace("_", "-") if source is given else name)
                raise ConfigError(f"{shown}: got {source[name]!r}, wanted a name; is a variable of the shell empty?")


def _warnings(rate: float, deepspeed_json: Mapping[str, Any]) -> list[str]:
    """Return sentences on settings that are allowed, and probably not meant."""
    warnings = []
    if rate < LOWEST_USEFUL_RATE:
        warnings.append(
            f"--lr: {rate:g} is very low, LoRA learns next to nothing below {LOWEST_USEFUL_RATE:g}; try 1e-4"
        )
    if "scheduler" in deepspeed_json:
        warnings.append('--deepspeed_config: "scheduler" is not used; --lr-decay-style, --warmup, --min-lr-ratio are')
    return warnings

"""What DeepSpeed would ignore, or take otherwise than it is meant, in a --deepspeed_config file."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.load import open_folder
from sat_lora.errors import ConfigError, SatLoraError
from sat_lora.findings.finding import Finding, looks_for
from sat_lora.training.settings.config import TrainConfig
from sat_lora.training.settings.deepspeed_config import base_dtype, is_accumulation_left, settle
from sat_lora.training.settings.deepspeed_file import read_deepspeed_file
from sat_lora.training.settings.deepspeed_problems import TOP_LEVEL_KEYS, section_keys

TOP = "the top level"
OPTION = "--deepspeed_config"


def configuration_findings(config: TrainConfig, environ: Mapping[str, str], device: str) -> list[Finding]:
    """Return what is wrong with the file that the options name, and with the precision.

    It changes nothing, and reads headers of weight files.
    """
    findings = []
    if config.parallel.deepspeed_config is not None:
        try:
            content = read_deepspeed_file(config.parallel.deepspeed_config)
        except ConfigError as error:
            return [Finding(code="options", seen=str(error), file=config.parallel.deepspeed_config, option=OPTION)]
        findings += key_findings(content, config.parallel.deepspeed_config)
        findings += _batch_findings(content, config, environ)
    with contextlib.suppress(ConfigError):  # `options` says it
        config = settle(config, device=device, environ=environ).config
    return findings + precision_findings(config, device)


@looks_for("unknown-key", "misplaced-key")
def key_findings(content: dict, path: str | Path) -> list[Finding]:
    """Return keys that DeepSpeed does not know where they stand, with the place where it would, or a near name."""
    places = {TOP: TOP_LEVEL_KEYS, **section_keys()}
    findings = []
    for place, key in unknown_keys(content):
        homes = [section for section, keys in places.items() if key in keys]
        if homes:
            home = TOP if homes[0] == TOP else f'inside "{homes[0]}"'
            seen = f'"{key}" stands in {_called(place)}; DeepSpeed reads it {"at " * (homes[0] == TOP)}{home}'
            fix = f'move "{key}" to {home}'
            findings.append(Finding(code="misplaced-key", seen=seen, fix=fix, file=str(path), option=OPTION))
            continue
        near = difflib.get_close_matches(key, {known_key for keys in places.values() for known_key in keys}, 1, 0.6)
        seen = f'"{key}" in {_called(place)} is no key of DeepSpeed'
        if near:
            home = next(section for section, keys in places.items() if near[0] in keys)
            seen += f'; the nearest is "{near[0]}" of {_called(home)}'
        findings.append(Finding(code="unknown-key", seen=seen, file=str(path), option=OPTION))
    return findings


def unknown_keys(content: dict) -> list[tuple[str, str]]:
    """Return (place, key) of each key that DeepSpeed does not know there."""
    places = {TOP: TOP_LEVEL_KEYS, **section_keys()}
    return [(place, key) for place, key in _keys(content, places) if key not in places[place]]


def _keys(content: dict, places: Mapping[str, frozenset[str]]) -> Iterator[tuple[str, str]]:
    """Yield (place, key) of the top level and of the sections whose keys are known, those in sections too."""

    def walk(section: dict, place: str) -> Iterator[tuple[str, str]]:
        for key, value in section.items():
            yield place, key
            inner = key if place == TOP else f"{place}.{key}"
            if isinstance(value, dict) and inner in places:
                yield from walk(value, inner)

    return walk(content, TOP)


def _called(place: str) -> str:
    return place if place == TOP else f'"{place}"'


@looks_for("batch-arithmetic")
def _batch_findings(content: dict, config: TrainConfig, environ: Mapping[str, str]) -> list[Finding]:
    whole = content.get("train_batch_size")
    ranks = max(1, int(environ.get("WORLD_SIZE", 1)) // config.parallel.model_parallel_size)
    if not isinstance(whole, int) or is_accumulation_left(config.given, content, ranks):
        return []
    micro = content.get("train_micro_batch_size_per_gpu", config.schedule.batch_size)
    steps = content.get("gradient_accumulation_steps", config.schedule.gradient_accumulation_steps)
    if not isinstance(micro, int) or not isinstance(steps, int) or micro * steps * ranks == whole:
        return []
    seen = (
        f'"train_batch_size" is {whole}, but {micro} samples x {steps} accumulation steps x {ranks} data-parallel '
        f"ranks make {micro * steps * ranks}"
    )
    return [Finding(code="batch-arithmetic", seen=seen, file=str(config.parallel.deepspeed_config), option=OPTION)]


@looks_for("precision")
def precision_findings(config: TrainConfig, device: str) -> list[Finding]:
    """Return where the run's precision does not fit what the device has, or what the checkpoint holds."""
    findings = []
    run_dtype = base_dtype(config.precision)
    if device.startswith("cuda") and run_dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        seen = f"bf16 on {torch.cuda.get_device_name()}, which has no bfloat16 and emulates it"
        findings.append(Finding(code="precision", seen=seen, option="--bf16", fix="use --fp16"))
    try:
        saved = checkpoint_dtype(config.model.base, trust=config.start.trust_checkpoint)
    except SatLoraError:
        return findings  # `options` says it
    if run_dtype is torch.float16 and saved in (torch.bfloat16, torch.float32):
        seen = f"the checkpoint holds {_name(saved)} and the run takes float16, which ends at 65,504"
        findings.append(Finding(code="precision", seen=seen, option="--fp16", fix="use --bf16 where the GPU has it"))
    if device.startswith("cuda") and run_dtype is torch.float32 and saved != torch.float32:
        seen = f"the checkpoint holds {_name(saved)} and the run takes float32: twice the memory, and no tensor cores"
        findings.append(Finding(code="precision", seen=seen, option="--bf16", fix="use --bf16"))
    return findings


def checkpoint_dtype(folder: str | Path, *, trust: bool = False) -> torch.dtype | None:
    """Return the dtype of the first matrix in a model folder; None if there is none.

    Raises CheckpointError if it cannot be read.
    """
    state = open_folder(folder, trust=trust).map(0)
    tensors = (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 1)
    return next((tensor.dtype for tensor in tensors), None)


@looks_for("bucket-size")
def bucket_findings(engine: dict, trained: int, itemsize: int) -> list[Finding]:
    """Return a finding if DeepSpeed's buffers are much larger than what they are for.

    engine: DeepSpeed's config. trained: elements that train on this rank, of `itemsize` bytes.
    """
    zero = engine.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size")
    if zero.get("stage", 0) not in (1, 2) or not isinstance(bucket, int) or bucket <= max(2 * trained, 1):
        return []
    buffers = (2 if zero.get("overlap_comm") else 1) * bucket * itemsize
    if buffers < 2**28:
        return []
    seen = f'"reduce_bucket_size" is {bucket:,} and {trained:,} elements train: {buffers / 2**30:.1f} GiB of buffers'
    return [Finding(code="bucket-size", seen=seen, option=OPTION)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Adapter folders read with care: whoever made one may have put anything into it, and it may be of another base.

What such a folder holds is told in `format`.
"""

import dataclasses
import itertools
import shlex
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import torch

from sat_lora.adapters.format import (
    CONFIG,
    FORMAT_VERSION,
    SAT_WEIGHTS,
    TENSOR_DTYPES,
    WEIGHTS,
    LayerEntry,
    SavedAdapter,
    brief,
    strings_of,
)
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.files.foreign import MEBIBYTE, read_json, stand_in
from sat_lora.files.step_folders import follow, steps_in
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.config import DTYPES, LoraConfig
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn

# Ten times and more what an adapter of all of CogVLM-17B has.
CONFIG_LIMIT = 4 * MEBIBYTE
MOST_ENTRIES = 50_000
# A file of at least so many bytes of which a sixteenth is on the disk.
HOLES_FROM = 64 * MEBIBYTE
HOLES_SHARE = 16
ZERO_3_PARTS = "z3_rank_*_model_states.pt"  # SAT's save at ZeRO-3, of the first data-parallel rank alone
_IMPORT = "it may be one of PEFT: `sat-lora import --from peft FOLDER --base BASE --out DIR` makes an adapter of it"


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Return what an adapter folder holds, tensors on the CPU.

    folder: an adapter, a run's folder of them (its latest is read), or a pointer in that, `.../best`; or a checkpoint
    of the whole model with a LoraMixin called `lora` in it, as SAT's trainer writes them.
    Raises AdapterError, which names the file and the cause.
    """
    try:
        folder = follow(folder)
        problem = missing_problem(folder)
        is_model = problem is not None and next(iter(folder.glob(SAT_WEIGHTS)), None) is not None
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error}") from error
    if is_model:
        from sat_lora.adapters.whole_model import adapter_of_whole_model

        return adapter_of_whole_model(folder)
    if problem is not None:
        raise AdapterError(problem)
    about = _read_config(folder / CONFIG)
    return dataclasses.replace(about, tensors=_read_tensors(folder / WEIGHTS))


def missing_problem(folder: Path) -> str | None:
    """Return why that is no adapter's folder, what it holds and what to give in its place; None if it is one.

    What is in its files does not matter. Raises OSError where the folder cannot be read.
    """
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if not missing:
        return None
    names = sorted(p.name for p in itertools.islice(folder.iterdir(), 10_000)) if folder.is_dir() else None
    content = "no such folder" if names is None else ", ".join(map(printable, names[:12])) or "nothing"
    return f"{folder} is not an adapter folder: {', '.join(missing)} missing; found: {content}{_advice(folder)}"


def is_adapter_folder(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter's weights and config, whatever is in them."""
    return all((Path(folder) / name).is_file() for name in (WEIGHTS, CONFIG))


def base_of_adapter(folder: str | Path) -> BaseIdentity:
    """Return the base that an adapter was trained on, by its config alone. Raises the errors of `read_adapter`."""
    about = about_adapter(folder)
    return about.base or BaseIdentity(about.base_fingerprint)


def trained_whole(folder: str | Path) -> tuple[str, ...]:
    """Return the names of the base's parameters that an adapter holds whole, by its config alone.

    Raises the errors of `read_adapter`.
    """
    return about_adapter(folder).trained


def about_adapter(folder: str | Path) -> SavedAdapter:
    """Return what the config of an adapter says, without its tensors."""
    try:
        return _read_config(follow(folder) / CONFIG)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error}") from error


def base_problem(
    saved: SavedAdapter, base: BaseIdentity, source: str | Path, folder: str | Path | None = None
) -> str | None:
    """Return why `base` is not the one that the adapter was trained on; None if it is, or nothing says otherwise.

    source: the adapter's folder; folder: the base's, where it has one. A warning where the adapter, of an older
    version, knows too little.
    """
    trained_on = saved.base or BaseIdentity(saved.base_fingerprint)
    difference = dataclasses.replace(trained_on, fingerprint=saved.base_fingerprint).difference(base)
    if difference is not None:
        subject = (
            f"the base model has {difference} than the one this adapter was trained on"
            if folder is None
            else f"{source} was trained on a base with {difference} than {folder}"
        )
        return (
            f"{subject}: it was {saved.base_title}, this is {base.title}; give its own base, or insist with --any-base "
            "(any_base=True)"
        )
    if trained_on.values is None and base.values is not None:
        warn(
            f"{source} was written by a version that kept names and shapes of its base alone: nobody can say whether "
            f"{base.title} is that base"
        )
    return None


def _read_config(path: Path) -> SavedAdapter:
    """Return what an adapter_config.json says, as an adapter without tensors."""
    try:
        values = read_json(path, limit=CONFIG_LIMIT, parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError(f"wanted an object, got {brief(repr(values))}")
        if "sat_lora" not in values and "peft_type" in values:
            raise ValueError("no 'sat_lora' in it")
        section = values.pop("sat_lora")
        values.pop("peft_type", None)
        version = section["format_version"]
        if version != FORMAT_VERSION:
            raise AdapterError(f"{path}: format version {version!r}, this sat_lora reads {FORMAT_VERSION}")
        if len(section["layers"]) > MOST_ENTRIES:
            raise ValueError(f"{len(section['layers'])} layers, no more than {MOST_ENTRIES} are read")
        layers = {name: _layer_entry(name, values) for name, values in section["layers"].items()}
        fingerprint = str(section["base_fingerprint"])
        trained = strings_of(section["trained"])
        base = BaseIdentity.from_dict(fingerprint, section["base"]) if "base" in section else None
        quantization = section.get("base_quantization")  # a note: of a scheme that is not known here as well
        if quantization is not None and not isinstance(quantization, dict):
            raise TypeError(f"base_quantization has to be an object, got {brief(repr(quantization))}")
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        problem = stand_in(path) or brief(_cause(error))
        advice = _advice(path.parent)
        raise AdapterError(f"{path}: not an adapter config of sat_lora: {problem}{advice}") from error
    try:
        config = LoraConfig.from_dict(values)
    except ConfigError as error:
        raise AdapterError(f"{path}: {brief(str(error))}") from error
    if config.takes_from_base:  # written files never do; loading one would take from the base again
        raise AdapterError(f"{path}: init_lora_weights {config.init_lora_weights!r}, but the file is a plain LoRA")
    return SavedAdapter(config, fingerprint, layers, trained, {}, base, quantization)


def _advice(folder: Path) -> str:
    """Return what to do with a folder that is no adapter here, where it is something else that is known."""
    try:
        if next(iter(folder.glob(ZERO_3_PARTS)), None) is not None:
            return (
                "; it is a part of a model as ZeRO-3 cuts it, from which SAT and this package make no whole: train "
                "inside adapter_checkpoints, or save at ZeRO 0 to 2"
            )
        if any((folder / "adapter" / name).exists() for name in ("latest", "best", CONFIG)):
            return f"; give {printable(folder / 'adapter')}, where the adapters of a run are"
        steps = [step for step in steps_in(folder) if (folder / str(step) / CONFIG).is_file()]
        if steps:
            return f"; no `latest` names a step that is there: give {printable(folder / str(steps[-1]))}, the newest"
        values = read_json(folder / CONFIG, limit=CONFIG_LIMIT)
    except (OSError, ValueError):
        values = None
    if isinstance(values, dict) and "sat_lora" not in values and "peft_type" in values:
        place = shlex.quote(printable(folder))
        command = f"sat-lora import --from peft {place} --base BASE --out DIR"
        return f"; it is an adapter of PEFT: {command} makes one of sat_lora"
    if (folder / "adapter_model.bin").is_file():
        return f"; {_IMPORT}"
    return "" if folder.is_dir() else "; give the folder of an adapter, such as runs/NAME/adapter"


def _layer_entry(name: str, values: Any) -> LayerEntry:
    try:
        return LayerEntry.from_dict(values)
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{printable(name)}: {_cause(error)}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        problem = stand_in(path) or _holes(path)
        if problem is not None:
            raise ValueError(problem)
        with safetensors.safe_open(path, framework="pt") as file:
            keys = file.keys()
            if len(keys) > MOST_ENTRIES:
                shown = ", ".join(printable(key)[:100] for key in sorted(keys)[:3])
                raise ValueError(f"{len(keys)} tensors ({shown}, ...), no more than {MOST_ENTRIES} are read")
            return {key: file.get_tensor(key) for key in keys}
    # safetensors 0.8 meets a dtype that torch or its own binding lacks with whatever comes first.
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise AdapterError(f"{path}: cannot be read as safetensors: {brief(str(error))}") from error


def _holes(path: Path) -> str | None:
    """Return, as a clause, that most of a large file was never written (its tensors would be zeros); else None."""
    about = path.stat()
    says_nothing = about.st_blocks == 0  # some network file systems
    if says_nothing or about.st_size < HOLES_FROM or about.st_blocks * 512 * HOLES_SHARE > about.st_size:
        return None
    return f"only {about.st_blocks * 512:,} of its {about.st_size:,} bytes are on the disk; download or copy it again"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _cause(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error) or repr(error)


def tensor_problems(tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Return what keeps the tensors of a file from being the expected ones: names, shapes, dtypes, values."""
    problems = form_problems(tensors, expected)
    problems += [
        f"{brief(printable(key))}: holds values that are not finite"
        for key in expected.keys() & tensors.keys()
        if tuple(tensors[key].shape) == expected[key]
        and tensors[key].dtype in TENSOR_DTYPES
        and not bool(torch.isfinite(tensors[key]).all())
    ]
    return problems


def form_problems(tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the same without the values, of which none is read."""
    problems = [f"missing {brief(printable(key))}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {brief(printable(key))}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        tensor = tensors[key]
        name = brief(printable(key))
        if tuple(tensor.shape) != expected[key]:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, the model wants {brief(str(expected[key]))}")
        elif tensor.dtype not in TENSOR_DTYPES:
            problems.append(f"{name}: dtype {tensor.dtype}, one of {', '.join(DTYPES)} is wanted")
    return problems

"""The adapter on disk, without a model.

FOLDER/adapter_model.safetensors   whole tensors, whatever the parallel layout was:
                                   `<layer>.lora_A` (r, in), `<layer>.lora_B` (out, r), with DoRA
                                   `<layer>.lora_magnitude` (out,); for q/k/v slots `<layer>.q.lora_A` and so on;
                                   and parameters of the base that were trained whole, under their own names
FOLDER/adapter_config.json         the LoraConfig, and under `sat_lora` the format version, for every layer its kind,
                                   rank, scale, slots and their rows, the names of what was trained whole, the
                                   fingerprint of the base model (its names and shapes) and under `base` what the base
                                   was: name of its folder, family, number of parameters, and some of its values, see
                                   `base_identity`

It is always a plain LoRA for the original base: what PiSSA and OLoRA take from the base is subtracted in the pair.
"""

import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import torch
from safetensors.torch import save_file

from sat_lora.errors import AdapterError, ConfigError
from sat_lora.files.atomic import replaced_folder
from sat_lora.files.foreign import MEBIBYTE, read_json, stand_in
from sat_lora.files.step_folders import follow, steps_in
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.config import DTYPES, LoraConfig
from sat_lora.lora.deltas.delta import Delta
from sat_lora.printable import printable
from sat_lora.terminal.notice import warn

FORMAT_VERSION = 2
# Ten times and more what an adapter of all of CogVLM-17B has.
CONFIG_LIMIT = 4 * MEBIBYTE
MOST_ENTRIES = 50_000
# A file of at least so many bytes of which a sixteenth is on the disk.
HOLES_FROM = 64 * MEBIBYTE
HOLES_SHARE = 16
_IMPORT = "it may be one of PEFT: `sat-lora import --from peft FOLDER --base BASE --out DIR` makes an adapter of it"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PAIR = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude"
LARGEST_SCALE = torch.finfo(torch.float32).max
TENSOR_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """What the file says about one adapted layer."""

    kind: str
    r: int
    scale: float
    slots: tuple[str, ...]
    rows: tuple[tuple[int, int], ...]  # of the whole weight as a matrix (see `lora.deltas.layers`), one range per slot

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerEntry":
        """Return the entry of a layer's JSON object. Raises ValueError, TypeError or LookupError if it is none."""
        kind = values["kind"]
        rank = values["r"]
        scale = values["scale"]
        slots = _strings(values["slots"])
        rows = tuple((start, stop) for start, stop in values["rows"])
        if not isinstance(kind, str) or len(set(slots)) != len(slots):
            raise ValueError(f"kind {kind!r} with slots {slots}")
        if any(type(number) is not int for number in (rank, *sum(rows, ()))):
            raise TypeError(f"r {rank!r} and rows {rows} have to be whole numbers")
        if rank < 1 or any(not 0 <= start < stop for start, stop in rows):
            raise ValueError(f"r {rank} and rows {rows}")
        if type(scale) not in (int, float) or not abs(scale) <= LARGEST_SCALE:
            raise ValueError(f"scale {scale!r} is no finite number")
        if len(rows) != max(1, len(slots)):
            raise ValueError(f"{len(slots)} slots, {len(rows)} ranges of rows")
        return cls(kind, rank, float(scale), slots, rows)


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter as its folder holds it."""

    config: LoraConfig
    base_fingerprint: str
    layers: dict[str, LayerEntry]
    trained: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    base: BaseIdentity | None = None  # None: an adapter of a version that did not know

    @property
    def base_title(self) -> str:
        """The base, for people."""
        return self.base.title if self.base else "a base that it does not name"

    def of_layer(self, name: str) -> dict[str, torch.Tensor]:
        """Return a layer's tensors by leaf, slots stacked: A (slots * r, in), B (rows, r), magnitude (rows,) of
        DoRA.
        """
        leaves = (*PAIR, MAGNITUDE) if self.config.use_dora else PAIR
        return {leaf: self._stacked(name, leaf) for leaf in leaves}

    def delta_of(self, name: str) -> Delta:
        """The delta of all slots of that layer."""
        a, b = (self._stacked(name, leaf) for leaf in PAIR)
        return Delta(a, b, self.layers[name].scale)

    def magnitude_of(self, name: str) -> torch.Tensor | None:
        """DoRA's magnitude (rows of all slots,) of that layer; None without DoRA."""
        return self._stacked(name, MAGNITUDE) if self.config.use_dora else None

    def _stacked(self, name: str, leaf: str) -> torch.Tensor:
        return torch.cat([self.tensors[key] for key in self.keys(name, leaf)])

    def keys(self, name: str, leaf: str) -> list[str]:
        """Return the names of a layer's tensors of that leaf, slot by slot."""
        return [f"{name}.{slot}.{leaf}" for slot in self.layers[name].slots] or [f"{name}.{leaf}"]

    def expected(self, in_features: dict[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes, by key, that the tensors of those layers have to have, given the layers' `in`."""
        shapes = {}
        for name, entry in ((name, self.layers[name]) for name in in_features):
            for number, (start, stop) in enumerate(entry.rows):
                rows = stop - start
                leaves = {PAIR[0]: (entry.r, in_features[name]), PAIR[1]: (rows, entry.r), MAGNITUDE: (rows,)}
                for leaf in leaves if self.config.use_dora else PAIR:
                    shapes[self.keys(name, leaf)[number]] = leaves[leaf]
        return shapes


def cut_slots(
    name: str, slots: tuple[str, ...], rows: list[int], stacked: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of the file, by key, for the stacked ones of a layer (see `SavedAdapter.of_layer`)."""
    if not slots:
        return {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in stacked.items()}
    rank = stacked[PAIR[0]].shape[0] // len(slots)
    return {
        f"{name}.{slot}.{leaf}": part.contiguous()
        for leaf, tensor in stacked.items()
        for slot, part in zip(slots, tensor.split(rank if leaf == PAIR[0] else rows))
    }


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the config of the plain LoRA that stands for one of `config`: of twice the rank for PiSSA and OLoRA."""
    if not config.takes_from_base:
        return config
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init_lora_weights="kaiming",
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
    )


def write_adapter(folder: str | Path, adapter: SavedAdapter) -> None:
    """Write the folder; a reader sees the old one or the new one, never a torn one.

    Raises OSError if it cannot be written.
    """
    config = {
        "peft_type": "LORA",
        **adapter.config.to_dict(),
        "sat_lora": {
            "format_version": FORMAT_VERSION,
            "base_fingerprint": adapter.base_fingerprint,
            **({} if adapter.base is None else {"base": adapter.base.to_dict()}),
            "layers": {name: dataclasses.asdict(entry) for name, entry in sorted(adapter.layers.items())},
            "trained": sorted(adapter.trained),
        },
    }
    with replaced_folder(folder) as temporary:
        try:  # unlike `save`, it lets other threads run meanwhile
            save_file(dict(sorted(adapter.tensors.items())), temporary / WEIGHTS, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Return what an adapter folder holds, tensors on the CPU.

    folder: an adapter, a run's folder of them (its latest is read), or a pointer in that, `.../best`.
    Raises AdapterError, which names the file and the cause.
    """
    try:
        folder = follow(folder)
        missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
        names = sorted(p.name for p in itertools.islice(folder.iterdir(), 10_000)) if folder.is_dir() else None
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error}") from error
    if missing:
        content = "no such folder" if names is None else ", ".join(map(printable, names[:12])) or "nothing"
        advice = _advice(folder)
        raise AdapterError(f"{folder} is not an adapter folder: {', '.join(missing)} missing; found: {content}{advice}")
    about = _read_config(folder / CONFIG)
    return dataclasses.replace(about, tensors=_read_tensors(folder / WEIGHTS))


def base_of_adapter(folder: str | Path) -> BaseIdentity:
    """Return the base that an adapter was trained on, by its config alone. Raises the errors of `read_adapter`."""
    try:
        about = _read_config(follow(folder) / CONFIG)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error}") from error
    return about.base or BaseIdentity(about.base_fingerprint)


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
            raise ValueError(f"wanted an object, got {_brief(repr(values))}")
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
        trained = _strings(section["trained"])
        base = BaseIdentity.from_dict(fingerprint, section["base"]) if "base" in section else None
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        problem = stand_in(path) or _brief(_cause(error))
        advice = _advice(path.parent)
        raise AdapterError(f"{path}: not an adapter config of sat_lora: {problem}{advice}") from error
    try:
        config = LoraConfig.from_dict(values)
    except ConfigError as error:
        raise AdapterError(f"{path}: {_brief(str(error))}") from error
    if config.takes_from_base:  # written files never do; loading one would take from the base again
        raise AdapterError(f"{path}: init_lora_weights {config.init_lora_weights!r}, but the file is a plain LoRA")
    return SavedAdapter(config, fingerprint, layers, trained, {}, base)


def _advice(folder: Path) -> str:
    """Return what to do with a folder that is no adapter here, where it is something else that is known."""
    try:
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
        raise AdapterError(f"{path}: cannot be read as safetensors: {_brief(str(error))}") from error


def _holes(path: Path) -> str | None:
    """Return, as a clause, that most of a large file was never written (its tensors would be zeros); else None."""
    about = path.stat()
    says_nothing = about.st_blocks == 0  # some network file systems
    if says_nothing or about.st_size < HOLES_FROM or about.st_blocks * 512 * HOLES_SHARE > about.st_size:
        return None
    return f"only {about.st_blocks * 512:,} of its {about.st_size:,} bytes are on the disk; download or copy it again"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _strings(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"wanted a list of texts, got {_brief(repr(values))}")
    return tuple(values)


def _cause(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error) or repr(error)


def _brief(text: str) -> str:
    """Return the text, shortened: a damaged file may put anything of any length into a message."""
    return text if len(text) <= 500 else text[:500] + " ..."


def tensor_problems(tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Return what keeps the tensors of a file from being the expected ones: names, shapes, dtypes, values."""
    problems = form_problems(tensors, expected)
    problems += [
        f"{_brief(printable(key))}: holds values that are not finite"
        for key in expected.keys() & tensors.keys()
        if tuple(tensors[key].shape) == expected[key]
        and tensors[key].dtype in TENSOR_DTYPES
        and not bool(torch.isfinite(tensors[key]).all())
    ]
    return problems


def form_problems(tensors: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the same without the values, of which none is read."""
    problems = [f"missing {_brief(printable(key))}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {_brief(printable(key))}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        tensor = tensors[key]
        name = _brief(printable(key))
        if tuple(tensor.shape) != expected[key]:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, the model wants {_brief(str(expected[key]))}")
        elif tensor.dtype not in TENSOR_DTYPES:
            problems.append(f"{name}: dtype {tensor.dtype}, one of {', '.join(DTYPES)} is wanted")
    return problems

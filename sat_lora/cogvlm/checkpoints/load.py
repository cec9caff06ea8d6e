"""A model from its folder, SAT's or Hugging Face's, saved at any model-parallel size.

Each rank maps the files and copies its own slices: there is no whole model, nor a whole tensor, in anyone's memory.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sat_lora.cogvlm.checkpoints.hugging_face_folder import INDEX, SINGLE, HuggingFaceFolder, is_computed
from sat_lora.cogvlm.checkpoints.quantized_files import QuantizationNote
from sat_lora.cogvlm.checkpoints.sat_folder import (
    PARTS,
    WEIGHT_DTYPES,
    SatFolder,
    map_weights,
    save_weights,
    weight_problems,
)
from sat_lora.cogvlm.families import family_of, family_of_names
from sat_lora.cogvlm.network.model import VIT, CogVLMModel, build_cogvlm
from sat_lora.cogvlm.sizes import lacking
from sat_lora.errors import CheckpointError, ConfigError
from sat_lora.parallel.partitioned import Partitioning
from sat_lora.parallel.sharding import REPLICATED, Sharding, model_parallel_layout, sharding_of
from sat_lora.printable import printable
from sat_lora.quantization.apply import remember_quantization
from sat_lora.quantization.config import Quantization
from sat_lora.quantization.select import as_encoded, select_layers
from sat_lora.quantized.kernels import look_for_kernels
from sat_lora.quantized.layers import put_quantized
from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.quantized.schemes import BLOCKS, Scheme, block_for
from sat_lora.terminal.progress import Progress

__all__ = [
    "check_files",
    "load_cogvlm",
    "map_weights",
    "open_folder",
    "read_config",
    "save_weights",
    "shardings_of",
    "weight_files",
]


def open_folder(folder: str | Path, *, trust: bool = False) -> SatFolder | HuggingFaceFolder:
    """Return the model folder as what it is. trust: see `map_weights`.

    Raises CheckpointError if it is neither kind, or both.
    """
    folder = Path(folder)
    sat = [name for name in PARTS if (folder / name).is_file()]
    hugging_face = [name for name in (INDEX, SINGLE) if (folder / name).is_file()]
    if sat and hugging_face:
        raise CheckpointError(
            f"{folder} holds a SAT model ({', '.join(sat)}) and a Hugging Face model ({', '.join(hugging_face)}); "
            "keep one of them there"
        )
    return HuggingFaceFolder(folder) if hugging_face else SatFolder(folder, trust=trust)


def read_config(folder: str | Path) -> dict:
    """Return the sizes of the model in a folder, by the names of SAT's model_config.json."""
    return open_folder(folder).config()


def weight_files(folder: str | Path) -> list[Path]:
    """Return the files with the weights: SAT's, one per rank and in rank order, or Hugging Face's shards."""
    return open_folder(folder).files()


def check_files(folder: str | Path, *, trust: bool = False) -> None:
    """Raise CheckpointError if a file of the folder cannot be a base; no more than the files' headers is read.

    It is missing, truncated, no checkpoint, or of a model with another number of layers than the config says.
    """
    source = open_folder(folder, trust=trust)
    for rank in range(source.saved_ranks):
        _refuse_what_is_no_base(source, source.map(rank))


def _refuse_what_is_no_base(source: SatFolder | HuggingFaceFolder, state: dict) -> None:
    """Raise CheckpointError if what one saved rank holds cannot be a base of the folder's config."""
    problems = weight_problems(state)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source.path}: cannot be used as a base: {shown}")
    source.check(state)
    config = source.config()
    missing = lacking(config)
    if missing:
        raise CheckpointError(f"{source.path}: {missing}")
    _refuse_other_family(source.path, config, state)
    for prefix, sizes in (("", config), (f"{VIT}.", config.get("eva_args", {}))):
        numbers = [re.match(re.escape(prefix) + r"transformer\.layers\.(\d{1,9})\.", str(name)) for name in state]
        layers = 1 + max((int(number[1]) for number in numbers if number), default=-1)
        if layers and sizes.get("num_layers", layers) != layers:
            where = "eva_args." if prefix else ""
            raise CheckpointError(
                f"{source.path}: its config says {where}num_layers {sizes['num_layers']}, its weights have {layers} "
                "layers; config and weights do not belong together"
            )


def _refuse_other_family(folder: Path, config: dict, state: dict) -> None:
    """Raise CheckpointError if the config is of one family, and the names of the weights are those of another."""
    family = family_of(config)
    named = family_of_names(state)
    if named is not family and any(name.startswith("mixins.") for name in map(str, state)):
        raise CheckpointError(
            f"{folder}: its config is of a {family.title}, and its weights are those of a {named.title}; copy both "
            f"again, or, if the weights are right, {named.advice(config)}"
        )


def shardings_of(model: nn.Module) -> dict[str, Sharding]:
    """Return how each entry of `model.state_dict()` is cut over the model-parallel ranks, by name."""
    modules = dict(model.named_modules())
    shardings = {}
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        shardings[name] = sharding_of(modules[owner], leaf) if owner in modules else REPLICATED
    return shardings


def load_cogvlm(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    zero_config: dict | None = None,
    trust: bool = False,
    layers: int | None = None,
    quantize: Quantization | None = None,
    partition_quantized: bool = False,
    progress: Progress[tuple[str, nn.Module]] = iter,
    **settings,
) -> tuple[CogVLMModel, dict]:
    """Return (a CogVLM with the weights of a SAT or Hugging Face folder, its config).

    settings: those of `build_cogvlm`. zero_config: DeepSpeed's, of stage 3; every parameter is then partitioned as it
    is loaded, and a rank reads no more than its own partition. trust: see `map_weights`. layers: take at most so many
    of each transformer, the first ones; the config says so. quantize: which linears are held in fewer bits; each is
    encoded as it is read, on the device. partition_quantized: with a zero_config, each data-parallel rank keeps a part
    of those as well, else all of them. progress: goes through the modules, as
    tqdm does. Ranks do not speak to each other here: an error on one is an error on it alone. Raises CheckpointError if
    files, names or shapes do not fit, before anything is allocated; ConfigError as `build_cogvlm` and `select_layers`.
    """
    source = open_folder(folder, trust=trust)
    config = source.config()
    rank, size = (0, 1) if not source.saved_ranks > 1 else model_parallel_layout()
    _refuse_what_is_no_base(source, source.map(rank * source.saved_ranks // size))  # fail before the model is built
    left_out: frozenset[str] = frozenset()
    if layers is not None:
        whole = build_cogvlm(config, device="meta", **settings).state_dict().keys()
        config = shortened(config, layers)
    model = build_cogvlm(config, device="meta", **settings)
    if layers is not None:
        left_out = frozenset(whole - model.state_dict().keys())
    model.base_folder = source.path.resolve()
    model.base_name = model.base_folder.name  # adapters name it
    note = source.note()
    quantized = quantized_layers(model, quantize, note, source.path)
    if quantize is not None and note is None:
        quantize = as_encoded(model, quantize)
    quantization = quantize if note is None else note.quantization
    look_for_kernels(None if quantization is None else quantization.scheme, device)
    whole_weight = _memory_for(quantized if note is None else {}, device)
    weights = _OwnWeights(model, source, left_out)
    partitioning = None if zero_config is None else Partitioning(zero_config)
    with torch.no_grad():
        for module_name, module in progress([*model.named_modules()]):
            prefix = f"{module_name}." if module_name else ""
            if module_name in quantized:
                name = prefix + "weight"
                if note is not None:
                    encoded = weights.encoded(name, module.weight, device)
                elif quantize is not None:
                    encoded = weights.quantized(name, module.weight, quantize.weight_scheme, whole_weight)
                    encoded.original = weights.reader(name, module.weight, trust=trust)
                if partitioning is not None and partition_quantized:
                    encoded = encoded.partitioned(partitioning.group)
                put_quantized(module, encoded)
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = _loaded(parameter, prefix + leaf, weights, device, partitioning)
            for leaf, buffer in module._buffers.items():
                if isinstance(buffer, QuantizedWeight):
                    continue
                module._buffers[leaf] = buffer.to(device)
                weights.copy(prefix + leaf, module._buffers[leaf])
    if quantization is not None:
        from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights  # which reads folders as they are opened here

        identity = BaseWeights(folder, trust=trust).identity
        remember_quantization(model, identity, quantization)
    return model, config


def quantized_layers(
    model: CogVLMModel, quantize: Quantization | None, note: QuantizationNote | None, folder: Path
) -> dict[str, nn.Module]:
    """Return the layers that are to have quantised weights, by name.

    note: what a folder says that holds such weights already. Raises ConfigError where `quantize` wants others than it
    has, CheckpointError where the slices of this model-parallel size would cut a block.
    """
    if note is None:
        return {} if quantize is None else select_layers(model, quantize)
    own = {name.removesuffix(".weight") for name in note.weights}
    if quantize is not None:
        wanted = select_layers(model, quantize).keys()
        differing = sorted(wanted ^ own & dict(model.named_modules()).keys())
        if quantize.scheme != note.quantization.scheme or differing:
            what = f", and {differing[0]} is one of {len(differing)} layers that differ" if differing else ""
            raise ConfigError(
                f"--quantize: {folder} is quantised already, to {note.quantization.scheme}{what}; leave the option and "
                "its patterns out, or give the base that it was made of"
            )
    modules = {name: module for name, module in model.named_modules() if name in own}
    uneven = [name for name, module in modules.items() if block_for(module.weight.shape[1]) is None]
    if uneven:
        raise CheckpointError(
            f"{folder}: at this model-parallel size the rows of {uneven[0]} are cut within a block of {BLOCKS[-1]}; "
            "give the base that it was made of"
        )
    return modules


def _memory_for(layers: dict[str, nn.Module], device) -> torch.Tensor:
    """Return flat memory for one weight of these layers at a time: freed and taken anew, a CPU may keep more."""
    weights = [layer.weight for layer in layers.values()]
    largest = max(weights, key=torch.Tensor.numel, default=torch.empty(0))
    return torch.empty(largest.numel(), dtype=largest.dtype, device=device)


def shortened(config: dict, layers: int) -> dict:
    """Return the config of a model with at most so many layers in each transformer."""
    vit = config["eva_args"]
    fewer = {
        name: min(layers, config[name]) for name in ("num_layers", "num_vision_layers") if config.get(name) is not None
    }
    return {
        **config,
        **fewer,
        "eva_args": {**vit, "num_layers": min(layers, vit["num_layers"])},
    }


def _loaded(
    shape: nn.Parameter, name: str, weights: "_OwnWeights", device, partitioning: Partitioning | None
) -> nn.Parameter:
    """Return the parameter with memory and values, and the attributes that SAT gave it."""
    parameter = nn.Parameter(torch.empty_like(shape, device=device), requires_grad=shape.requires_grad)
    parameter.__dict__.update(shape.__dict__)
    if partitioning is None:
        weights.copy(name, parameter)
    else:
        weights.copy(name, parameter, rows=partitioning.rows(parameter.shape))
        partitioning.partition(parameter)
    return parameter


class _OwnWeights:
    """What this model-parallel rank takes from a folder; names and shapes are checked when it is made."""

    def __init__(self, model: CogVLMModel, source: SatFolder | HuggingFaceFolder, left_out: frozenset[str]):
        """Map the files that hold something of this rank's, and compare names and shapes.

        left_out: names that the files may have and the model has not. Raises CheckpointError with everything that does
        not fit.
        """
        rank, size = model_parallel_layout()
        saved = source.saved_ranks
        self._folder = source.path.resolve()
        self._layout = dict(saved=saved, rank=rank, size=size)
        self._shardings = shardings_of(model)
        self._states = {
            saved_rank: source.map(saved_rank)
            for saved_rank in range(rank * saved // size, -(-(rank + 1) * saved // size))
        }
        shapes = {
            name: self._shardings[name].saved_shape(tensor.shape, size, saved)
            for name, tensor in model.state_dict().items()
            if source.own_name(name) is not None
        }
        uneven = sorted(name for name, shape in shapes.items() if shape is None)
        problems = (
            [f"{len(uneven)} sizes do not divide by {saved}, the number of files: {uneven[0]}, ..."] if uneven else []
        )
        for saved_rank, state in self._states.items():
            where = f" in {source.files()[saved_rank].name}" if saved > 1 else ""
            for name, shape in shapes.items():
                problem = None if name not in state and is_computed(name) else _misfit(state, name, shape)
                if problem:
                    name_in_file = source.own_name(name)
                    problems.append(
                        problem + where + (f" ({name_in_file} in the file)" if name_in_file != name else "")
                    )
            problems += [f"unexpected {printable(name)}{where}" for name in state.keys() - shapes.keys() - left_out]
        if problems:
            shown = "\n  ".join(sorted(problems)[:20]) + ("\n  ..." if len(problems) > 20 else "")
            raise CheckpointError(
                f"{source.path}: the weights do not fit the model of its config, {len(problems)} problems:\n  {shown}"
            )

    def copy(self, name: str, target: torch.Tensor, rows: range | None = None) -> None:
        """Copy what the files have under `name`, this rank's part, into `target`; rows: only these are needed."""
        parts = {saved_rank: state[name] for saved_rank, state in self._states.items() if name in state}
        if parts:
            self._shardings[name].fill(target, parts, **self._layout, rows=rows)

    def quantized(self, name: str, like: torch.Tensor, scheme: Scheme, memory: torch.Tensor) -> QuantizedWeight:
        """Return what the files have under `name`, this rank's part, encoded.

        Its shape is that of `like`. memory: flat, of its dtype and device, in which each weight in turn is whole.
        Raises QuantizationError where a value is not finite.
        """
        weight = memory[: like.numel()].view(like.shape)
        self.copy(name, weight)
        return QuantizedWeight.of(weight, scheme, name)

    def reader(self, name: str, like: torch.Tensor, *, trust: bool) -> Callable[[], torch.Tensor]:
        """Return what reads the same again, whole, in the shape and dtype of `like`. It keeps no file open."""
        return partial(
            _read_again,
            *(self._folder, trust, name, self._shardings[name], tuple(self._states), self._layout),
            *(like.shape, like.dtype),
        )

    def encoded(self, name: str, like: torch.Tensor, device) -> QuantizedWeight:
        """Return the same of files that hold codes and scales: the values are theirs, whatever the cut.

        Its dtype is that of `like`. Raises CheckpointError where a scale is not finite.
        """
        parts = {saved_rank: state[name] for saved_rank, state in self._states.items()}
        first = next(iter(parts.values()))
        rows, columns = like.shape
        block = min(first.block, block_for(columns))
        codes = torch.empty(rows, columns // first.scheme.elements_per_code, dtype=first.codes.dtype, device=device)
        scales = torch.empty(rows, columns // block, dtype=first.scales.dtype, device=device)
        fill = self._shardings[name].fill
        fill(codes, {saved_rank: part.codes for saved_rank, part in parts.items()}, **self._layout, rows=None)
        repeats = first.block // block  # a smaller block is a part of a larger one, with its scale
        part_scales = {saved_rank: part.scales.repeat_interleave(repeats, 1) for saved_rank, part in parts.items()}
        fill(scales, part_scales, **self._layout, rows=None)
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"{self._folder}: {name}: scales of its codes are not finite; the file is damaged, copy it again"
            )
        return QuantizedWeight(codes, scales, first.scheme, like.dtype)


def _read_again(
    folder: Path,
    trust: bool,
    name: str,
    sharding: Sharding,
    saved_ranks: tuple[int, ...],
    layout: dict[str, int],
    shape: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return this rank's part of a tensor of a folder, as `_OwnWeights.copy` gives it, from its files opened anew.

    Raises CheckpointError where they are not there any more, or hold other tensors.
    """
    source = open_folder(folder, trust=trust)
    parts = {saved_rank: source.map(saved_rank) for saved_rank in saved_ranks}
    for saved_rank, part in parts.items():
        wanted = sharding.saved_shape(shape, layout["size"], layout["saved"])
        problem = _misfit(part, name, wanted)
        if problem:
            raise CheckpointError(
                f"{source.files()[saved_rank]}: {problem}; it was another file when the base was loaded"
            )
    weight = torch.empty(shape, dtype=dtype)
    sharding.fill(weight, {saved_rank: part[name] for saved_rank, part in parts.items()}, **layout, rows=None)
    return weight


def _misfit(state: dict, name: str, shape: tuple[int, ...] | None) -> str | None:
    """Return what is wrong with one entry of a saved state dict, None if nothing is.

    shape: None, which has been said already, fits all.
    """
    if name not in state:
        return f"missing {name}"
    if not isinstance(state[name], torch.Tensor):
        return f"{name}: not a tensor"
    if shape not in (None, state[name].shape):
        return f"{name}: shape {tuple(state[name].shape)}, the model has {shape}"
    if state[name].dtype not in WEIGHT_DTYPES:
        return f"{name}: dtype {state[name].dtype}, which is none of a base's weights"
    return None

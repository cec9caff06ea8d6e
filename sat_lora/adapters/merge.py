"""Fold an adapter into a base checkpoint on the CPU, tensor by tensor: SAT or Hugging Face folder in, either out.

The base is mapped and the result is filled through a mapping, so the process itself holds one tensor at a time.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from sat_lora.adapters.format import SavedAdapter
from sat_lora.adapters.loftq_base import approximated, rounds_of
from sat_lora.adapters.read import base_problem, read_adapter, tensor_problems
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.beside import copy_beside
from sat_lora.cogvlm.checkpoints.hugging_face_folder import CONFIG, ROTARY
from sat_lora.cogvlm.checkpoints.hugging_face_writer import make_hugging_face_weights
from sat_lora.cogvlm.checkpoints.quantized_files import KEY
from sat_lora.cogvlm.checkpoints.sat_folder import make_sat_weights
from sat_lora.cogvlm.families import family_of
from sat_lora.cogvlm.network.model import build_cogvlm, parallel_problems
from sat_lora.errors import AdapterError, CheckpointError, ConfigError, MergeError
from sat_lora.files.atomic import replaced_folder
from sat_lora.files.weight_files import Layout
from sat_lora.lora.deltas.kinds import KINDS
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.lora.deltas.merging import merged_weight
from sat_lora.printable import printable
from sat_lora.quantization.config import Quantization
from sat_lora.quantization.select import select_layers
from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.quantized.schemes import Scheme, block_for
from sat_lora.terminal.progress import Progress

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
BASE = "base"
TRAINED = "trained"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "sat",
    model_parallel_size: int = 1,
    dtype: torch.dtype | None = None,
    trust: bool = False,
    any_base: bool = False,
    onto: str = BASE,
    progress: Progress[str] = iter,
) -> list[str]:
    """Write OUT, the base with scale * B A added to each adapted weight; return remarks for whoever uses it.

    The sums are made in float32, and kept in the base's dtype. Remarks say what lies beside the base and was left out,
    and what OUT wants beside it. to: "sat", cut for `model_parallel_size` ranks, or "hf", a Hugging Face folder of
    safetensors. The base may be either, and cut for any number of ranks. dtype: of all of OUT's weights instead. onto:
    "base" takes the base's own weights; "trained" those that the adapter was trained beside, where they were quantised:
    what their codes decode to. progress: goes through the tensors' names, as tqdm does. trust: see `map_weights`.
    any_base: take a base that the adapter was not trained on, if its layers are there. Raises CheckpointError or
    AdapterError if a folder is wrong or cannot be written, or the adapter was trained on another base, ConfigError if
    no run could use a base cut so, and MergeError if a merged weight is not finite. OUT is not there then.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"--out: {out} exists; give a new folder")
    weights = BaseWeights(base, trust=trust)
    if weights.note is not None and onto != TRAINED:
        raise CheckpointError(
            f"--base: {base} is quantised to {weights.note.quantization.scheme}; merge into the base that it was made "
            f"of, {weights.identity.title}, or insist on its decoded weights with --onto trained"
        )
    saved = read_adapter(adapter)
    tensors = decoded_weights(weights, saved, adapter) if onto == TRAINED else weights
    another = None if any_base else base_problem(saved, weights.identity, adapter, base)
    if another:
        raise AdapterError(f"--adapter: {another}")
    refuse_misfits(weights.shapes, saved, adapter)
    if to == "hf" and ROTARY not in weights.layout:
        raise CheckpointError(f"--base: {printable(base)} has no {ROTARY}, of which Hugging Face's layers have copies")
    config = {name: value for name, value in weights.config.items() if name != KEY}
    uneven = parallel_problems(config, model_parallel_size, model_parallel_size)
    if uneven:
        raise ConfigError(f"--model-parallel-size: {'; '.join(uneven)}")
    layouts = [in_dtype(layout, dtype) for layout in weights.layouts_for(model_parallel_size)]
    try:
        with replaced_folder(out) as temporary:
            if to == "hf":
                parts = [
                    make_hugging_face_weights(
                        temporary, config, layouts[0], weights[ROTARY], own_config=weights.hugging_face_config
                    )
                ]
            else:
                parts = make_sat_weights(temporary, config, layouts)
            for name in progress(weights.layout):
                whole = merged_tensor(name, tensors, saved)
                for rank, part in enumerate(parts):
                    if name in part:
                        part[name].copy_(weights.shard(name, whole, rank, len(parts)))
                        _refuse_non_finite(name, part[name], adapter)
            remarks = copy_beside(Path(base), temporary, without={CONFIG} if to == "hf" else set())
            return remarks + (missing_parts(temporary, base, weights) if to == "hf" else [])
    except (OSError, RuntimeError) as error:  # torch meets a full disk with a RuntimeError
        raise CheckpointError(f"--out: {out} cannot be written: {error}") from error


def in_dtype(layout: Layout, dtype: torch.dtype | None) -> Layout:
    """Return the layout with its weights in that dtype, and the rotary frequencies as they are."""
    if dtype is None:
        return layout
    return {
        name: (shape, present if name == ROTARY or not present.is_floating_point else dtype)
        for name, (shape, present) in layout.items()
    }


def missing_parts(folder: Path, base: str | Path, weights: BaseWeights) -> list[str]:
    """Return remarks on what `from_pretrained` wants and is not there, and on prompts that the code does not make."""
    remarks = []
    family = family_of(weights.config)
    version = weights.config.get("text_processor_version")
    if weights.hugging_face_config is None and version == "chat" and family.templates[version] == "base":
        remarks.append(
            "its prompts are ` [INST] QUERY [/INST] `, which the published code makes of no query: write them so "
            '(template_version is "base", which takes a query as it is)'
        )
    if weights.config.get("encoder_args"):
        remarks.append(
            "its second vision encoder has sizes of its own, which stand in config.json as encoder_args: the published "
            "code has those of EVA2-CLIP-L written into it, and does not read them"
        )
    code = [name for name in family.code if not (folder / name).is_file()]
    if code and not any(folder.glob("modeling_*.py")):
        remarks.append(
            f"put {', '.join(code)} beside it, from a Hugging Face {family.title} such as {family.example}: "
            "from_pretrained takes the model's code from there"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        remarks.append(
            f"no tokenizer lies in {printable(base)}: load the base's ({family.title}'s is {family.tokenizer}) from "
            "its own folder"
        )
    return remarks


def decoded_weights(weights: BaseWeights, saved: SavedAdapter, adapter: str | Path) -> Mapping[str, torch.Tensor]:
    """Return the whole tensors of the base as they were while the adapter trained: quantised ones decoded.

    Raises AdapterError where the adapter does not say how they were quantised, as one that trained beside whole ones,
    or they were others than a quantised folder holds.
    """
    rounds = rounds_of(saved, adapter)
    if weights.note is not None and rounds is not None:
        raise AdapterError(
            f"--onto trained: {adapter} was begun by loftq, with other codes than those of a quantised folder; give "
            "the base that it was made of"
        )
    if saved.base_quantization is None:
        own = (
            f"--onto trained: {adapter} names no scheme: it was trained beside the base's own weights, or is combined "
            "of adapters that were trained beside several"
        )
        if weights.note is None:
            raise AdapterError(f"{own}; leave the option out")
        raise AdapterError(
            f"{own}; {weights.folder} is quantised to {weights.note.quantization}; merge into the base that it was "
            f"made of, {weights.identity.title}, without the option"
        )
    if weights.note is not None and saved.base_quantization == weights.note.quantization.to_dict():
        return weights
    try:
        quantization = Quantization.from_dict(dict(saved.base_quantization))
        quantization = dataclasses.replace(quantization, trained=saved.config.modules_to_save)
        layers = select_layers(build_cogvlm(weights.config, device="meta"), quantization)
        layout, *_ = weights.layouts_for(quantization.slices)
    except ConfigError as error:
        raise AdapterError(
            f"--onto trained: {adapter}: how its base was quantised is not known here: {error}"
        ) from error
    shapes = {name: layout[name][0] for name in (f"{layer}.weight" for layer in layers) if name in layout}
    blocks = {name: block for name, shape in shapes.items() if (block := block_for(shape[-1])) is not None}
    if weights.note is not None:
        held = weights.note
        differing = sorted((blocks.keys() ^ set(held.weights)) - set(saved.trained))  # what it brings whole is its own
        is_same = (quantization.scheme, quantization.slices) == (held.quantization.scheme, held.quantization.slices)
        if not is_same or differing:
            where = f"; {printable(differing[0])} is one of {len(differing)} weights that differ" if differing else ""
            raise AdapterError(
                f"--onto trained: {adapter} was trained beside weights quantised to {quantization}, and "
                f"{weights.folder} is quantised to {held.quantization}{where}; merge into the base that it was made "
                f"of, {weights.identity.title}"
            )
        return weights
    return DecodedWeights(weights, quantization.weight_scheme, blocks, saved, rounds)


@dataclasses.dataclass(frozen=True)
class DecodedWeights(Mapping[str, torch.Tensor]):
    """The tensors of a base, of which some are encoded and decoded again when they are asked for.

    blocks: how many elements share a scale in each of these, by name. rounds: of LoftQ, with which the saved adapter
    began; None where it began otherwise.
    """

    weights: BaseWeights
    scheme: Scheme
    blocks: Mapping[str, int]
    saved: SavedAdapter
    rounds: int | None

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.weights[name]
        block = self.blocks.get(name)
        if block is None:
            return tensor
        layer = name.removesuffix(".weight")
        if self.rounds is not None and layer in self.saved.layers:
            return approximated(tensor, layer, self.scheme, block, self.saved, self.rounds)
        return QuantizedWeight.of(tensor, self.scheme, name, block).decoded()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def merged_tensor(name: str, weights: Mapping[str, torch.Tensor], saved: SavedAdapter) -> torch.Tensor:
    """Return a tensor of the base with the adapter in it: in float32 or wider where that changes it, else as it is."""
    layer = name.removesuffix(".weight")
    if name in saved.trained:
        return saved.tensors[name]
    if layer == name or layer not in saved.layers:
        return weights[name]
    entry = saved.layers[layer]
    weight = weights[name]
    kind = KINDS[entry.kind]
    layout = DeltaLayout(entry.rows, kind.matrix(weight).shape[0], entry.kind)
    return merged_weight(weight, kind, layout, saved.delta_of(layer), saved.magnitude_of(layer))


def refuse_misfits(shapes: dict[str, tuple[int, ...]], saved: SavedAdapter, source: str | Path) -> None:
    """Raise AdapterError with every way in which the adapter does not fit a base of these whole shapes."""
    names = [*saved.trained, *(f"{name}.weight" for name in saved.layers)]
    problems = [f"no {printable(name)}" for name in names if name not in shapes]
    problems += [f"{printable(n)}: unknown kind {e.kind!r}" for n, e in saved.layers.items() if e.kind not in KINDS]
    if not problems:
        matrices = {
            name: KINDS[entry.kind].matrix(torch.empty(shapes[f"{name}.weight"], device="meta")).shape
            for name, entry in saved.layers.items()
        }
        expected = saved.expected({name: matrix[1] for name, matrix in matrices.items()})
        expected |= {name: shapes[name] for name in saved.trained}
        problems = tensor_problems(saved.tensors, expected)
        for name, entry in saved.layers.items():
            if any(not 0 <= start < stop <= matrices[name][0] for start, stop in entry.rows):
                problems.append(f"{name}: rows {entry.rows}, the weight has {matrices[name][0]}")
    if problems:
        raise AdapterError(f"{source} does not fit the base: {'; '.join(sorted(problems)[:20])}")


def _refuse_non_finite(name: str, merged: torch.Tensor, source: str | Path) -> None:
    if merged.is_floating_point():
        bad = sum(int((~torch.isfinite(rows)).sum()) for rows in merged.view(-1).split(1 << 24))
        if bad:
            hint = "; --dtype bfloat16 and float32 hold more than 65,504" if merged.dtype == torch.float16 else ""
            raise MergeError(
                f"{source}: {name}: {bad} merged values are not finite in {merged.dtype}; nothing was merged{hint}"
            )

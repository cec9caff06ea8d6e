"""Whether a merged checkpoint is base and adapter together, and what its precision costs.

All is computed in float32, whatever the files hold, so that only the merged weights are measured. Three questions:

    1. Do base and adapter side by side (A) give the logits of the base with the deltas in its weights (X)?
    2. Is each weight of the files (M) the nearest to X that its dtype has?
    3. Does the merged folder, loaded as anyone would, give the logits of those weights?

Yes to all three: the merge is right, and |M - A| / |A - base| is what the dtype of the files rounds away.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from sat_lora.adapters.merge import BASE, TRAINED, decoded_weights
from sat_lora.adapters.read import read_adapter
from sat_lora.adapters.save_load import load_adapter
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.load import load_cogvlm
from sat_lora.cogvlm.families import cross_image_size
from sat_lora.cogvlm.inputs.text import position_ids_for
from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.deltas.delta import Delta
from sat_lora.lora.deltas.merging import merged_weight
from sat_lora.lora.live_base import identity_of_model, remember_base
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.quantized.layers import quantized_weights
from sat_lora.terminal.progress import Progress

UNIT_ROUNDOFF = 2.0**-24  # of float32
DEVIATIONS = 4  # standard ones: a sum of n roundings errs by more than that times sqrt(n) once in 16,000 times


Item = TypeVar("Item")


class NamedProgress(Protocol):
    """A function that goes through a collection and shows how far that is, under what is done with it."""

    def __call__(self, items: Collection[Item], what: str) -> Iterable[Item]:
        """Yield the items; `what` is done with each."""
        ...


@dataclass(frozen=True)
class Verification:
    """What came out of comparing a merged folder with its base and adapter."""

    merge_error: float
    """The share of the adapter's effect that is lost, |merged - (base + adapter)| / |(base + adapter) - base| over the
    logits: 0 where they agree, 1 where nothing was merged."""
    dtype: torch.dtype
    """The dtype of most of the merged weights."""
    is_measurable: bool
    """Whether the adapter changes the logits by more than float32 may err."""
    problems: tuple[str, ...]
    """Why the merge is wrong; nothing where it is right."""


@torch.no_grad()
def verify_merge(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    *,
    trust: bool = False,
    any_base: bool = False,
    onto: str = BASE,
    progress: NamedProgress = lambda items, what: items,
    tell: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Return how a merged folder compares with its base and adapter, on logits and weight by weight.

    The logits are those of one image and a few words. One model at a time is held, in float32.
    trust: of the base, see `map_weights`. any_base: see `load_adapter`. onto: as of `merge_adapter`, the weights that
    the adapter was merged into. progress: goes through modules and names of
    weights under what is done with them. tell: is told what begins.
    """
    init_model_parallel(init_distributed(alone=True))
    tell("1 of 3, base and adapter, in float32")
    model, config = _load(base, trust=trust, progress=partial(progress, what="loading the base"))
    if onto == TRAINED:
        identity = identity_of_model(model)
        weights = BaseWeights(base, trust=trust)
        put_whole_weights(model, decoded_weights(weights, read_adapter(adapter), adapter))
        remember_base(model, identity)
    load_adapter(model, adapter, any_base=any_base)
    batch = sample_batch(config)
    mixins = lora_mixins(model).values()
    beside = _logits(model, batch)
    for mixin in mixins:
        mixin.disable()
    of_base = _logits(model, batch)
    for mixin in mixins:
        mixin.enable()
        mixin.merge(keep_original=False)
    error = float32_error(config) * beside.norm().item()
    problems = []
    in_weights = _logits(model, batch)
    if (in_weights - beside).norm().item() > error:
        problems.append("the deltas in the weights give other logits than beside them")
    tell("2 of 3, the merged weights, each by each")
    files = BaseWeights(merged)
    dtype = dtype_of(files)
    wrong = load_merged_weights(model, files, coarsest_dtype(adapter), partial(progress, what="comparing weights"))
    if wrong:
        some = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        problems.append(f"not base plus adapter, rounded once: {some}")
    of_files = _logits(model, batch)
    del model, mixins
    tell("3 of 3, the merged model as anyone would load it")
    loaded = _logits(_load(merged, progress=partial(progress, what="loading the merged model"))[0], batch)
    if (loaded - of_files).norm().item() > error:
        problems.append("the folder computes something else with its weights, by its config")
    loss = (loaded - beside).norm().item()
    effect = (beside - of_base).norm().item()
    return Verification(loss / effect if effect else float(loss > error), dtype, effect > error, tuple(problems))


def put_whole_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put whole tensors into a model, by their names, in the place of what it has: quantised weights among it."""
    layers = dict(quantized_weights(model))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if owner in layers and leaf == "weight":
            del module._buffers[leaf]
            module.register_parameter(leaf, torch.nn.Parameter(tensor.float(), requires_grad=False))
        else:
            getattr(module, leaf).copy_(tensor)


def coarsest_dtype(adapter: str | Path) -> torch.dtype:
    """Return the dtype of an adapter's tensors; the coarsest where they have several."""
    return max((tensor.dtype for tensor in read_adapter(adapter).tensors.values()), key=lambda d: torch.finfo(d).eps)


def load_merged_weights(
    model: torch.nn.Module,
    files: BaseWeights,
    adapter_dtype: torch.dtype,
    progress: Progress[str] = iter,
) -> list[str]:
    """Put the weights of the files into a float32 model that has the merged ones; return the names of wrong ones.

    Right is the value nearest to the model's in the dtype of the file, but for what two ways to compute the model's
    differ by (`_difference`), which may put them on two sides of the middle between two values.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}
    adapters = adapters_of(model)
    wrong = []
    for name in progress(files.layout):
        file = files[name]
        exact = tensors[name]
        rounded = exact.to(file.dtype).float()
        allowed = (rounded - exact).abs()
        adapter = adapters.get(name.removesuffix(".weight"))
        if adapter is not None and name.endswith(".weight"):
            allowed += _difference(exact, adapter, torch.finfo(adapter_dtype).eps)
        file = file.to(exact)
        if not bool(((file - exact).abs() <= allowed).all()):
            wrong.append(name)
        exact.copy_(file)
    return wrong


def _difference(merged: torch.Tensor, adapter: LoraAdapter, adapter_eps: float) -> torch.Tensor:
    """Return by how much two computations of a merged weight may differ, element by element: a tensor of its shape.

    Two float32 sums of r products and W: 2 (r + 2) u (|W| + |s| |B| |A|). DoRA's factor g is computed in the adapter's
    dtype, here in float32: four roundings of half an eps, in W A, in the norm, in the quotient and in what it is for.
    """
    delta = adapter.delta()
    products = Delta(delta.a.abs(), delta.b.abs(), abs(delta.scale))
    size = merged_weight(torch.zeros_like(merged), adapter.kind, adapter.layout, products)
    size += size + merged.abs()  # |W| is at most |W + s B A| + |s| |B| |A|
    size *= 2 * (adapter.rank + 2) * UNIT_ROUNDOFF
    if adapter.magnitude_or_none is not None:
        size += 2 * adapter_eps * merged.abs()
    return size


def float32_error(config: dict[str, Any]) -> float:
    """Return by how much the logits of a model of these sizes may err in float32, as a share of their norm.

    Each product of matrices sums n products, whose roundings add up to sqrt(n) u (Higham and Mary, SIAM J. Sci. Comput.
    41(5), 2019); a layer has six of them one after the other, and what one errs by is passed on undamped.
    """
    roundings = 0.0
    for sizes in (config, config["eva_args"]):
        widths = 5 * math.sqrt(sizes["hidden_size"]) + math.sqrt(sizes["inner_hidden_size"])
        roundings += sizes["num_layers"] * widths
    return DEVIATIONS * UNIT_ROUNDOFF * roundings


def dtype_of(weights: BaseWeights) -> torch.dtype:
    """Return the dtype of most of a model's weights."""
    sizes: dict[torch.dtype, int] = {}
    for shape, dtype in weights.layout.values():
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def sample_batch(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a batch of one row for a model of these sizes: BOS, a seeded image, eight words."""
    generator = torch.Generator().manual_seed(0)
    places = config["image_length"] + 2
    text_tokens = 8
    ids = torch.randint(1, config["vocab_size"], (1, 1 + places + text_tokens), generator=generator)
    embed, vision, patches = (torch.zeros_like(ids) for _ in range(3))
    embed[0, 1 : places + 1] = 1
    vision[0, 1:places] = 1
    patches[0, 2:places] = 1
    cross_size = cross_image_size(config)
    cross = {} if cross_size is None else {"cross_images": torch.randn(1, 3, *cross_size, generator=generator)}
    return {
        "input_ids": ids,
        "position_ids": position_ids_for(patches[0])[None],
        "images": torch.randn(1, 3, *config["eva_args"]["image_size"], generator=generator),
        "image_embed_mask": embed,
        "vision_expert_mask": vision,
        **cross,
    }


def _load(
    folder: str | Path, *, trust: bool = False, progress: Progress[tuple[str, torch.nn.Module]] = iter
) -> tuple[torch.nn.Module, dict[str, Any]]:
    model, config = load_cogvlm(folder, dtype=torch.float32, trust=trust, progress=progress)
    return model.eval(), config


def _logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = dict(batch)
    return model(inputs.pop("input_ids"), inputs.pop("position_ids"), -1, **inputs)[0]

"""What is adapted and what trains, per tower, as data and as text."""

from typing import TypedDict

from torch import nn

from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.apply import adapters_of, find_all_sites
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.sharding import model_parallel_layout
from sat_lora.quantized.layers import bytes_of, quantized_weights

WHOLE = "trained whole"


class Row(TypedDict):
    """What is adapted and what trains of a part of a model."""

    part: str
    layers: int
    adapted: int  # layers
    ranks: list[int]  # ascending, each once
    trainable: int  # parameters, of the whole model
    base: int  # parameters of the layers


def describe(model: nn.Module) -> list[Row]:
    """Return one row per part of the model and one for the total."""
    _, size = model_parallel_layout()
    names = {path.rpartition(".")[2] for path in lora_mixins(model)}
    adapters: dict[str, list[LoraAdapter]] = {}
    for layer_name, adapter in (pair for name in sorted(names) for pair in adapters_of(model, name).items()):
        adapters.setdefault(layer_name, []).append(adapter)
    rows: dict[str, Row] = {}
    for name, site in find_all_sites(model).items():
        if not site.kind.is_linear and name not in adapters:
            continue
        row = rows.setdefault(site.part, _empty_row(site.part))
        row["layers"] += 1
        row["base"] += site.in_features * site.out_features
        row["adapted"] += name in adapters
        for adapter in adapters.get(name, ()):
            row["ranks"] = sorted({*row["ranks"], adapter.rank})
            for leaf, p in adapter.named_parameters():
                if p.requires_grad:
                    count = getattr(p, "ds_numel", p.numel())
                    row["trainable"] += count * (1 if adapter.shardings[leaf].dim is None else size)
    whole = [(p, m.trained.shardings[n].dim) for m in lora_mixins(model).values() for n, p in m.trained.tensors.items()]
    if whole:
        count = sum(getattr(p, "ds_numel", p.numel()) * (1 if dim is None else size) for p, dim in whole)
        rows[WHOLE] = {**_empty_row(WHOLE), "trainable": count, "base": count}
    total = _empty_row("total")
    for row in rows.values():
        total["layers"] += row["layers"]
        total["adapted"] += row["adapted"]
        total["ranks"] = sorted({*total["ranks"], *row["ranks"]})
        total["trainable"] += row["trainable"]
        total["base"] += row["base"]
    return [*rows.values(), total]


def _empty_row(part: str) -> Row:
    return Row(part=part, layers=0, adapted=0, ranks=[], trainable=0, base=0)


def describe_text(model: nn.Module) -> str:
    """Return `describe` as a table, in lines for a terminal."""
    lines = [f"{'part':<26}{'layers':>8}{'adapted':>9}{'rank':>8}{'trainable':>14}{'of base':>10}"]
    for row in describe(model):
        ranks = ",".join(map(str, row["ranks"])) or "-"
        share = f"{100 * row['trainable'] / row['base']:.2f} %" if row["base"] else "-"
        lines.append(
            f"{row['part']:<26}{row['layers']:>8}{row['adapted']:>9}{ranks:>8}{row['trainable']:>14,}{share:>10}"
        )
    lines += _quantized_lines(model)
    return "\n".join(lines)


def _quantized_lines(model: nn.Module) -> list[str]:
    """Return a line on the weights that are held in few bits, as many as this rank has of them; none without any."""
    weights = [weight for _, weight in quantized_weights(model)]
    if not weights:
        return []
    names = " and ".join(sorted({weight.scheme.name for weight in weights}))
    held = sum(map(bytes_of, weights)) / 1e6
    whole = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    begun = sum(weight.low_rank is not None for weight in weights)
    added = f"; loftq adds a product of low rank to {begun} of them" if begun else ""
    size = f"{held:,.1f} MB in place of {whole:,.1f} on each rank"
    return [f"quantised: {len(weights)} linears to {names}, {size}{added}"]

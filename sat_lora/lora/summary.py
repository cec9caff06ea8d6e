"""What is adapted and what trains, per tower, as data and as text."""

from torch import nn

from sat_lora.lora.adapter import LoraAdapter
from sat_lora.lora.apply import adapters_of, find_all_sites
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.sharding import model_parallel_layout

WHOLE = "trained whole"


def describe(model: nn.Module) -> list[dict]:
    """One row per part of the model and one for the total.

    Keys: part, layers, adapted, ranks, trainable (parameters, of the whole model), base (parameters of the layers).
    """
    _, size = model_parallel_layout()
    names = {path.rpartition(".")[2] for path in lora_mixins(model)}
    adapters: dict[str, list[LoraAdapter]] = {}
    for site, adapter in (pair for name in sorted(names) for pair in adapters_of(model, name).items()):
        adapters.setdefault(site, []).append(adapter)
    rows: dict[str, dict] = {}
    for name, site in find_all_sites(model).items():
        if not site.kind.is_linear and name not in adapters:
            continue
        row = rows.setdefault(site.part, dict(part=site.part, layers=0, adapted=0, ranks=set(), trainable=0, base=0))
        row["layers"] += 1
        row["base"] += site.in_features * site.out_features
        row["adapted"] += name in adapters
        for adapter in adapters.get(name, ()):
            row["ranks"].add(adapter.rank)
            for leaf, p in adapter.named_parameters():
                if p.requires_grad:
                    count = getattr(p, "ds_numel", p.numel())
                    row["trainable"] += count * (1 if adapter.shardings[leaf].dim is None else size)
    whole = [(p, m.trained.shardings[n].dim) for m in lora_mixins(model).values() for n, p in m.trained.tensors.items()]
    if whole:
        count = sum(getattr(p, "ds_numel", p.numel()) * (1 if dim is None else size) for p, dim in whole)
        rows[WHOLE] = dict(part=WHOLE, layers=0, adapted=0, ranks=set(), trainable=count, base=count)
    table = [{**row, "ranks": sorted(row["ranks"])} for row in rows.values()]
    total = {key: sum(row[key] for row in table) for key in ("layers", "adapted", "trainable", "base")}
    return [*table, {"part": "total", "ranks": sorted({r for row in table for r in row["ranks"]}), **total}]


def describe_text(model: nn.Module) -> str:
    """`describe` as a table."""
    lines = [f"{'part':<26}{'layers':>8}{'adapted':>9}{'rank':>8}{'trainable':>14}{'of base':>10}"]
    for row in describe(model):
        ranks = ",".join(map(str, row["ranks"])) or "-"
        share = f"{100 * row['trainable'] / row['base']:.2f} %" if row["base"] else "-"
        lines.append(
            f"{row['part']:<26}{row['layers']:>8}{row['adapted']:>9}{ranks:>8}{row['trainable']:>14,}{share:>10}"
        )
    return "\n".join(lines)

"""What is adapted and what trains, per tower, as data and as text."""

from torch import nn

from sat_lora.mixin import lora_mixins, sat_models
from sat_lora.sharding import model_parallel_layout
from sat_lora.targets import find_linears


def describe(model: nn.Module) -> list[dict]:
    """One row per part of the model and one for the total.

    Keys: part, linears, adapted, ranks, trainable (parameters, of the whole model), base (parameters of the linears).
    """
    _, size = model_parallel_layout()
    adapters = {site: m.adapter_for(site) for m in lora_mixins(model).values() for site in m.sites}
    rows: dict[str, dict] = {}
    for path, inner in sat_models(model).items():
        for name, site in find_linears(inner, path).items():
            row = rows.setdefault(
                site.part, dict(part=site.part, linears=0, adapted=0, ranks=set(), trainable=0, base=0)
            )
            row["linears"] += 1
            row["base"] += site.in_features * site.out_features
            if name in adapters:
                adapter = adapters[name]
                row["adapted"] += 1
                row["ranks"].add(adapter.rank)
                for leaf, p in (("A", adapter.A), ("B", adapter.B)):
                    count = getattr(p, "ds_numel", p.numel())
                    row["trainable"] += count * (1 if adapter.shardings[leaf].dim is None else size)
    table = [{**row, "ranks": sorted(row["ranks"])} for row in rows.values()]
    total = {key: sum(row[key] for row in table) for key in ("linears", "adapted", "trainable", "base")}
    return [*table, {"part": "total", "ranks": sorted({r for row in table for r in row["ranks"]}), **total}]


def describe_text(model: nn.Module) -> str:
    """`describe` as a table."""
    lines = [f"{'part':<26}{'linears':>8}{'adapted':>9}{'rank':>8}{'trainable':>14}{'of base':>10}"]
    for row in describe(model):
        ranks = ",".join(map(str, row["ranks"])) or "-"
        share = f"{100 * row['trainable'] / row['base']:.2f} %" if row["base"] else "-"
        lines.append(
            f"{row['part']:<26}{row['linears']:>8}{row['adapted']:>9}{ranks:>8}{row['trainable']:>14,}{share:>10}"
        )
    return "\n".join(lines)

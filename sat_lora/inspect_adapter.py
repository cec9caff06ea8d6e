"""What an adapter folder holds: ranks, strengths, precision, and how far each delta moves its weight."""

import json
from collections import Counter
from pathlib import Path

import torch

from sat_lora.adapter_format import CONFIG, PAIR, WEIGHTS, SavedAdapter, form_problems, read_adapter
from sat_lora.base_identity import BaseIdentity
from sat_lora.combine_checks import Source
from sat_lora.errors import AdapterError
from sat_lora.foreign import printable
from sat_lora.step_folders import follow
from sat_lora.targets import layer_of, part_of


def inspect_adapter(folder: str | Path) -> dict:
    """What the adapter of an adapter folder, or of a run folder, holds; made of what JSON can hold.

    Keys: path, base_fingerprint, base {name, family, parameters, digest}, bytes, parameters, dtypes {dtype: tensors},
    r, lora_alpha, use_rslora, use_dora,
    layers (a list with name, part, layer, kind, slots, r, alpha, scale, dtype, parameters, delta_norm, zero_b, finite),
    parts {part: layers, parameters, ranks, delta_norm}, trained {name: shape}, zero_b and not_finite (names).
    delta_norm is the Frobenius norm of scale * B A (before DoRA's lengths), None where it is not finite.
    """
    folder = _adapter_folder(Path(folder))
    saved = read_adapter(folder)
    _refuse_disagreement(saved, folder)
    try:
        layers = [_describe_layer(saved, name) for name in sorted(saved.layers)]
        trained = {name: list(saved.tensors[name].shape) for name in sorted(saved.trained)}
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"{folder}: its tensors do not fit its {CONFIG}: {error}") from error
    broken = [key for key, tensor in sorted(saved.tensors.items()) if not bool(torch.isfinite(tensor).all())]
    return {
        "path": str(folder),
        "base_fingerprint": saved.base_fingerprint,
        "base": _describe_base(saved),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "parameters": sum(tensor.numel() for tensor in saved.tensors.values()),
        "dtypes": dict(sorted(Counter(_name(tensor.dtype) for tensor in saved.tensors.values()).items())),
        **{field: getattr(saved.config, field) for field in ("r", "lora_alpha", "use_rslora", "use_dora")},
        "parts": _sum_parts(layers),
        "layers": layers,
        "trained": trained,
        "zero_b": [layer["name"] for layer in layers if layer["zero_b"]],
        "not_finite": broken,
    }


def _adapter_folder(folder: Path) -> Path:
    """The folder that is meant: of an adapter, a run, or a pointer. AdapterError: nobody can say."""
    try:
        if not (folder / CONFIG).is_file() and (folder / "adapter").is_dir():
            folder = folder / "adapter"
        return follow(folder)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error}") from error


def _refuse_disagreement(saved: SavedAdapter, folder: Path) -> None:
    """AdapterError where the config says other tensors than there are; no value is read."""
    inputs = {name: Source(folder, 1.0, saved).in_features(name) for name in saved.layers}
    whole = {name: tuple(saved.tensors[name].shape) for name in saved.trained if name in saved.tensors}
    problems = sorted(form_problems(saved.tensors, saved.expected(inputs) | whole))
    problems += [f"missing {printable(name)}" for name in saved.trained if name not in saved.tensors]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise AdapterError(f"{folder}: its tensors do not fit its {CONFIG}, {len(problems)} problems:\n  {shown}")


def _describe_base(saved: SavedAdapter) -> dict:
    base = saved.base or BaseIdentity(saved.base_fingerprint)
    return {"name": base.name, "family": base.family, "parameters": base.parameters, "digest": base.digest}


def _base_line(report: dict) -> str:
    base = report["base"]
    about = BaseIdentity(report["base_fingerprint"], base["name"], base["family"], base["parameters"])
    return f"{about.title}, {base['digest']}; names and shapes {report['base_fingerprint'][:16]}"


def delta_norm(saved: SavedAdapter, name: str) -> float:
    """The Frobenius norm of scale * B A over all slots of a layer, from r x r products: |B A|^2 = (B^T B, A A^T)."""
    squares = 0.0
    for a, b in zip(*([saved.tensors[key].double() for key in saved.keys(name, leaf)] for leaf in PAIR)):
        squares += float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0))  # nan stays nan
    return abs(saved.layers[name].scale) * squares**0.5


def describe_adapter(report: dict) -> str:
    """The report of `inspect_adapter` as text: a table of the parts, and what looks wrong."""
    lines = [
        f"adapter      {printable(report['path'])}",
        f"base         {_base_line(report)}",
        f"size         {report['bytes']:,} bytes, {report['parameters']:,} parameters, {', '.join(report['dtypes'])}",
        f"config       r {report['r']}, alpha {report['lora_alpha']:g}"
        + "".join(f", {field}" for field in ("use_rslora", "use_dora") if report[field]),
        "",
        f"{'part':<26}{'layers':>8}{'rank':>10}{'alpha':>10}{'parameters':>14}{'|delta|':>12}",
    ]
    for part, row in report["parts"].items():
        ranks, alphas = (",".join(f"{value:g}" for value in row[key]) for key in ("ranks", "alphas"))
        lines.append(
            f"{printable(part):<26}{row['layers']:>8}{ranks:>10}{alphas:>10}{row['parameters']:>14,}{_text(row['delta_norm']):>12}"
        )
    if report["trained"]:
        lines += ["", f"trained whole  {', '.join(map(printable, report['trained']))}"]
    for key, meaning in (("zero_b", "B is zero, no effect"), ("not_finite", "values that are not finite")):
        if report[key]:
            lines += ["", f"{meaning}: {len(report[key])}", *(f"  {printable(name)}" for name in report[key])]
    return "\n".join(lines)


def to_json(report: dict) -> str:
    return json.dumps(report, indent=2, allow_nan=False)


def draw_norms(report: dict, path: str | Path) -> None:
    """Write a bar chart of the delta norms by layer number, a panel for each part, to `path` (a .png)."""
    # Figure and canvas by hand: pyplot would keep global state and might ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = report["parts"]
    if not parts:
        raise AdapterError(f"--plot: {report['path']} adapts no layer, there is nothing to draw")
    figure = Figure(figsize=(10, 1.2 + 1.8 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts):
        by_layer: dict[str, float] = {}
        for layer in (layer for layer in report["layers"] if layer["part"] == part):
            label = layer["name"].rpartition(".")[2] if layer["layer"] is None else str(layer["layer"])
            by_layer[label] = by_layer.get(label, 0.0) + (layer["delta_norm"] or 0.0) ** 2
        labels = sorted(by_layer, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label))
        axes.bar(range(len(labels)), [by_layer[label] ** 0.5 for label in labels], color="#08519c")
        step = -(-len(labels) // 32)
        axes.set_xticks(range(0, len(labels), step), labels[::step])
        axes.set_title(part, loc="left", fontsize=10)
        axes.set_ylabel("‖s B A‖")
        axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("layer")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise AdapterError(f"--plot: {path} cannot be written: {error}") from error


def _describe_layer(saved: SavedAdapter, name: str) -> dict:
    entry, tensors = saved.layers[name], saved.of_layer(name)
    norm = delta_norm(saved, name)
    divisor = entry.r**0.5 if saved.config.use_rslora else entry.r
    return {
        "name": name,
        "part": part_of(name),
        "layer": layer_of(name),
        "kind": entry.kind,
        "slots": list(entry.slots),
        "r": entry.r,
        "alpha": round(entry.scale * divisor, 12),
        "scale": entry.scale,
        "dtype": _name(tensors[PAIR[0]].dtype),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "delta_norm": _finite(norm),
        "zero_b": not bool(tensors[PAIR[1]].any()),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()),
    }


def _sum_parts(layers: list[dict]) -> dict[str, dict]:
    parts = {}
    for part in sorted({layer["part"] for layer in layers}):
        own = [layer for layer in layers if layer["part"] == part]
        norms = [layer["delta_norm"] for layer in own]
        parts[part] = {
            "layers": len(own),
            "parameters": sum(layer["parameters"] for layer in own),
            "ranks": sorted({layer["r"] for layer in own}),
            "alphas": sorted({layer["alpha"] for layer in own}),
            "delta_norm": None if None in norms else sum(norm**2 for norm in norms) ** 0.5,
        }
    return parts


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _text(norm: float | None) -> str:
    return "not finite" if norm is None else f"{norm:.4g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What an adapter folder holds: ranks, strengths, precision, and how far each delta moves its weight."""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sat_lora.adapters.combine_checks import Source
from sat_lora.adapters.format import CONFIG, PAIR, SAT_WEIGHTS, WEIGHTS, SavedAdapter
from sat_lora.adapters.loftq_base import ROUNDS
from sat_lora.adapters.read import form_problems, read_adapter
from sat_lora.errors import AdapterError, ConfigError, SatLoraError
from sat_lora.files.foreign import read_json
from sat_lora.files.step_folders import follow
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.lora.targets import layer_of, part_of
from sat_lora.printable import printable
from sat_lora.quantization.config import Quantization
from sat_lora.terminal.plot_text import families, plot_text
from sat_lora.terminal.progress import Progress

READ_IN_PASSING = 4 << 30  # bytes of a base whose weights are read without being asked for
# Inches of the picture.
TOP = 0.75
BOTTOM = 0.6
PANEL = 0.8
GAP = 0.55
LABEL = 30  # characters of a layer's name below its mark
LOG_RANGE = 50  # from this ratio of largest to smallest norm on, the axis is logarithmic
Report = dict[str, Any]
"""Made of what JSON can hold, see `inspect_adapter`."""


def inspect_adapter(folder: str | Path) -> Report:
    """Return what the adapter of an adapter folder, or of a run folder, holds; made of what JSON can hold.

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
        "bytes": _bytes_of(folder),
        "parameters": sum(tensor.numel() for tensor in saved.tensors.values()),
        "dtypes": dict(sorted(Counter(_name(tensor.dtype) for tensor in saved.tensors.values()).items())),
        **{field: getattr(saved.config, field) for field in ("r", "lora_alpha", "use_rslora", "use_dora")},
        "base_quantization": saved.base_quantization,
        "parts": _sum_parts(layers),
        "layers": layers,
        "trained": trained,
        "zero_b": [layer["name"] for layer in layers if layer["zero_b"]],
        "not_finite": broken,
    }


def _adapter_folder(folder: Path) -> Path:
    """Return the adapter's folder that a run, a pointer or itself means. Raises AdapterError if it is unreadable."""
    try:
        if not (folder / CONFIG).is_file() and (folder / "adapter").is_dir():
            folder = folder / "adapter"
        return follow(folder)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error}") from error


def _bytes_of(folder: Path) -> int:
    """Return the size of the file with the adapter, or of those of the whole model that it is in."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else folder.glob(SAT_WEIGHTS)
    return sum(file.stat().st_size for file in files)


def _refuse_disagreement(saved: SavedAdapter, folder: Path) -> None:
    """Raise AdapterError where the config says other tensors than there are; no value is read."""
    inputs = {name: Source(folder, 1.0, saved).in_features(name) for name in saved.layers}
    whole = {name: tuple(saved.tensors[name].shape) for name in saved.trained if name in saved.tensors}
    problems = sorted(form_problems(saved.tensors, saved.expected(inputs) | whole))
    problems += [f"missing {printable(name)}" for name in saved.trained if name not in saved.tensors]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise AdapterError(f"{folder}: its tensors do not fit its {CONFIG}, {len(problems)} problems:\n  {shown}")


def _describe_base(saved: SavedAdapter) -> Report:
    base = saved.base or BaseIdentity(saved.base_fingerprint)
    return {"name": base.name, "family": base.family, "parameters": base.parameters, "digest": base.digest}


def _base_line(report: Report) -> str:
    base = report["base"]
    about = BaseIdentity(report["base_fingerprint"], base["name"], base["family"], base["parameters"])
    return f"{about.title}, {base['digest']}; names and shapes {report['base_fingerprint'][:16]}"


def _quantization_lines(report: Report) -> list[str]:
    """Return the line that says how the base was held while the adapter was trained; none where it was whole."""
    about = report["base_quantization"]
    if about is None:
        return []
    rounds = about.get(ROUNDS)
    began = "" if rounds is None else f", begun by loftq in {printable(rounds)} rounds"
    try:
        held = Quantization.from_dict(about)
    except ConfigError:  # of a scheme that is not known here
        return [f"trained on    the base quantised to {printable(about.get('scheme'))}{began}"]
    return [f"trained on    the base quantised to {held}{began}"]


def delta_norm(saved: SavedAdapter, name: str) -> float:
    """Return the Frobenius norm of scale * B A over all slots of a layer; NaN where it is none.

    It comes from r x r products: |B A|^2 = (B^T B, A A^T).
    """
    squares = 0.0
    for a, b in zip(*([saved.tensors[key].double() for key in saved.keys(name, leaf)] for leaf in PAIR)):
        squares += float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0))  # nan stays nan
    norm: float = abs(saved.layers[name].scale) * squares**0.5
    return norm


def describe_adapter(report: Report) -> str:
    """Return the report of `inspect_adapter` as text: a table of the parts, and what looks wrong."""
    lines = [
        f"adapter      {printable(report['path'])}",
        f"base         {_base_line(report)}",
        *_quantization_lines(report),
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


def to_json(report: Report) -> str:
    """Return the report as indented JSON."""
    return json.dumps(report, indent=2, allow_nan=False)


def add_weight_norms(report: Report, base: str | Path, progress: Progress[Report] = iter) -> None:
    """Give each layer of a report `weight_norm`, the Frobenius norm of its weight in `base`.

    One tensor at a time is read. Raises AdapterError if the base lacks a layer; CheckpointError if it cannot be read.
    """
    from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights

    weights = BaseWeights(base)
    missing = [layer["name"] for layer in report["layers"] if layer["name"] + ".weight" not in weights]
    if missing:
        raise AdapterError(f"--base: {base} has no {missing[0]}, which {report['path']} adapts; give its own base")
    for layer in progress(report["layers"]):
        layer["weight_norm"] = float(weights[layer["name"] + ".weight"].float().norm())


def base_of_run(report: Report) -> Path | None:
    """Return the base that the run of an adapter was trained on, if it is there and small enough to be read in passing.

    Else it is None.
    """
    from sat_lora.cogvlm.checkpoints.load import weight_files

    for folder in Path(report["path"]).resolve().parents[:2]:  # RUN/adapter, or RUN/adapter/<step>
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, SatLoraError):
            base = Path(read_json(folder / "run.json")["settings"]["from_pretrained"])
            if sum(file.stat().st_size for file in weight_files(base)) <= READ_IN_PASSING:
                return base
    return None


def draw_norms(report: Report, path: str | Path) -> None:
    """Write how far each layer's delta moves its weight, a panel for each part, one scale for all, to `path` (a .png).

    In percent of the weight where `add_weight_norms` has been there, else as it is. What has no effect is marked red.
    Raises AdapterError if there is nothing to draw, or it cannot be written.
    """
    # Figure and canvas by hand: pyplot would keep global state and might ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = report["parts"]
    if not parts:
        raise AdapterError(f"--plot: {report['path']} adapts no layer, there is nothing to draw")
    relative = all("weight_norm" in layer for layer in report["layers"])
    values = {part: _by_layer(report, part, relative) for part in parts}
    shown = [value for norms in values.values() for value in norms.values() if value]
    height = TOP + BOTTOM + PANEL * len(parts) + GAP * (len(parts) - 1)
    figure = Figure(figsize=(9, height))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.09, BOTTOM / height, 0.98, 1 - TOP / height, hspace=GAP / PANEL)
    panels = figure.subplots(len(parts), 1, squeeze=False, sharey=True)[:, 0]
    is_log = bool(shown) and max(shown) / min(shown) > LOG_RANGE
    low = min(shown) / 2 if is_log else 0.0
    for axes, (part, norms) in zip(panels, values.items()):
        if is_log:
            axes.set_yscale("log")
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        places = range(len(norms))
        moved = [(place, value) for place, value in zip(places, norms.values()) if value]
        still = [place for place, value in zip(places, norms.values()) if not value]
        if moved:
            axes.vlines([x for x, _ in moved], low, [y for _, y in moved], color="#9ecae1", linewidth=2)
            axes.plot(*zip(*moved), "o", color="#08519c", markersize=5)
        axes.plot(still, [low] * len(still), "x", color="#de2d26", markersize=8, markeredgewidth=2, clip_on=False)
        step = -(-len(norms) // 32)
        axes.set_xticks(places[::step], [plot_text(label[-LABEL:]) for label in [*norms][::step]], fontsize=8)
        axes.set_xlim(-0.6, max(len(norms), 8) - 0.4)
        zero = f", no effect in {len(still)} (red)" if still else ""
        axes.set_title(f"{part}{zero}", loc="left", fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
        if relative and not is_log:
            axes.yaxis.set_major_formatter("{x:g} %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(low, max(shown, default=1.0) * (2 if is_log else 1.15))
    label = "change of the weight in % of its size" if relative else "size of the change of the weight"
    figure.supylabel(label + (" (logarithmic)" if is_log else ""), fontsize=10, x=0.01)
    figure.supxlabel("layer", fontsize=10, y=0.08 / height)
    formula = "|s·B·A| / |W|" if relative else "|s·B·A|"
    title = f"{printable(report['path'])}: {formula}, Frobenius norms"
    title = plot_text(title if len(title) <= 95 else "..." + title[-92:])
    figure.suptitle(title, fontsize=11, x=0.01, y=1 - 0.1 / height, ha="left", fontfamily=families())
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(draft, dpi=120, format="png")
        os.replace(draft, path)
    except OSError as error:
        raise AdapterError(f"--plot: {path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _by_layer(report: Report, part: str, relative: bool) -> dict[str, float]:
    """Return the norm of a part's deltas by layer number, or by name; those of one number together."""
    squares: dict[str, list[float]] = {}
    for layer in (layer for layer in report["layers"] if layer["part"] == part):
        label = layer["name"].rpartition(".")[2] if layer["layer"] is None else str(layer["layer"])
        delta, weight = squares.setdefault(label, [0.0, 0.0])
        weight_norm = layer["weight_norm"] if relative else 1.0
        squares[label] = [delta + (layer["delta_norm"] or 0.0) ** 2, weight + weight_norm**2]
    labels = sorted(squares, key=lambda label: (not label.isdecimal(), len(label) * label.isdecimal(), label))
    if not relative:
        return {label: squares[label][0] ** 0.5 for label in labels}
    shares = {label: delta / weight if weight else 0.0 for label, (delta, weight) in squares.items()}
    return {label: 100 * shares[label] ** 0.5 for label in labels}


def _describe_layer(saved: SavedAdapter, name: str) -> Report:
    entry = saved.layers[name]
    tensors = saved.of_layer(name)
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


def _sum_parts(layers: list[Report]) -> dict[str, Report]:
    parts = {}
    for part in sorted({layer["part"] for layer in layers}):
        members = [layer for layer in layers if layer["part"] == part]
        norms = [layer["delta_norm"] for layer in members]
        parts[part] = {
            "layers": len(members),
            "parameters": sum(layer["parameters"] for layer in members),
            "ranks": sorted({layer["r"] for layer in members}),
            "alphas": sorted({layer["alpha"] for layer in members}),
            "delta_norm": None if None in norms else sum(norm**2 for norm in norms) ** 0.5,
        }
    return parts


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _text(norm: float | None) -> str:
    return "not finite" if norm is None else f"{norm:.4f}" if norm >= 1e-3 or norm == 0 else f"{norm:.1e}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

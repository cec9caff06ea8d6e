"""Tables and json of benchmark reports."""

import json
from pathlib import Path


def write_json(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Rows of text as a markdown table, or aligned for a terminal."""
    if markdown:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in [header, *rows])


def spread(quartiles: list[float]) -> str:
    """Median and, in brackets, the first and third quartile."""
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def adapter_table(report: dict, markdown: bool) -> str:
    """A line per case: time against the frozen linear and saved bytes per byte of x, for each variant."""
    most = max((case["variants"] for case in report["cases"]), key=len)  # some variants are for some shapes alone
    names = [name for name in most if name != "frozen"]
    header = ["dtype", "linear", "r", "dropout", "frozen ms", *names, *(f"{name} saved" for name in names)]
    rows = []
    for case in report["cases"]:
        variants = case["variants"]
        rows.append(
            [
                case["dtype"],
                case["shape"],
                str(case["rank"]),
                f"{case['dropout']:g}",
                f"{1000 * variants['frozen']['seconds'][1]:.2f}",
                *(spread(variants[name]["ratio"]) if name in variants else "" for name in names),
                *(f"{variants[name]['saved_per_input']:.3f}" if name in variants else "" for name in names),
            ]
        )
    return table(header, rows, markdown)


def step_table(report: dict, markdown: bool) -> str:
    """A line per case and variant: time against the frozen step, saved bytes, trained parameters."""
    header = ["dtype", "r", "dropout", "variant", "ms", "of frozen", "saved MiB", "saved of frozen", "trained"]
    rows = []
    for case in report["cases"]:
        frozen = case["variants"]["frozen"]["saved_bytes"]
        for name, result in case["variants"].items():
            rows.append(
                [
                    case["dtype"],
                    str(case["rank"]),
                    f"{case['dropout']:g}",
                    name,
                    f"{1000 * result['seconds'][1]:.1f}",
                    spread(result["ratio"]),
                    f"{result['saved_bytes'] / 2**20:.1f}",
                    f"{result['saved_bytes'] / frozen:.3f}",
                    f"{result['trained']:,}",
                ]
            )
    return table(header, rows, markdown)

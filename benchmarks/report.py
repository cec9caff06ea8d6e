"""Tables and json of benchmark reports."""

import argparse
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
    """A line per case and variant: time against the frozen step, memory, and the share of a plain product's rate.

    Memory is what a forward pass keeps for backward, where that was counted, and the peak of a step on CUDA.
    """
    header = ["dtype", "r", "dropout", "batch", "checkpointing", "variant", "ms", "of frozen"]
    header += ["saved MiB", "saved of frozen", "peak GiB", "TFLOP/s", "of a product's", "trained"]
    rows = []
    for case in report["cases"]:
        frozen = case["variants"]["frozen"].get("saved_bytes")
        rate = report.get("product", {}).get(case["dtype"], {}).get("flops")
        for name, result in case["variants"].items():
            saved, peak, flops = (result.get(key) for key in ("saved_bytes", "peak_bytes", "flops"))
            rows.append(
                [
                    case["dtype"],
                    str(case["rank"]),
                    f"{case['dropout']:g}",
                    str(case.get("batch", 1)),
                    "yes" if case.get("checkpointing") else "no",
                    name,
                    f"{1000 * result['seconds'][1]:.1f}",
                    spread(result["ratio"]),
                    "" if saved is None else f"{saved / 2**20:.1f}",
                    "" if saved is None else f"{saved / frozen:.3f}",
                    "" if peak is None else f"{peak / 2**30:.1f}",
                    "" if flops is None else f"{flops / 1e12:.2f}",
                    "" if flops is None or rate is None else f"{flops / rate:.2f}",
                    f"{result['trained']:,}",
                ]
            )
    return table(header, rows, markdown)


def wins(report: dict) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(dtype, with or without dropout, rival) -> (cases in which sat_lora's median ratio is lower, cases)."""
    counts: dict[tuple[str, str, str], tuple[int, int]] = {}
    for case in report["cases"]:
        ratios = {name: result["ratio"][1] for name, result in case["variants"].items()}
        for rival in ratios.keys() - {"frozen", "sat_lora"}:
            key = (case["dtype"], "dropout" if case["dropout"] else "no dropout", rival)
            won, cases = counts.get(key, (0, 0))
            counts[key] = (won + (ratios["sat_lora"] < ratios[rival]), cases + 1)
    return dict(sorted(counts.items()))


def main(arguments: list[str] | None = None) -> None:
    """Print the json of either benchmark as markdown."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ranks", nargs="+", type=int, help="only these")
    args = parser.parse_args(arguments)
    report = json.loads(args.file.read_text())
    if args.ranks:
        report["cases"] = [case for case in report["cases"] if case["rank"] in args.ranks]
    if "shape" not in report["cases"][0]:
        print(step_table(report, markdown=True))
        return
    print(adapter_table(report, markdown=True))
    rows = [[*key, f"{won} of {cases}"] for key, (won, cases) in wins(report).items()]
    print("\n" + table(["dtype", "", "rival", "sat_lora is faster in"], rows, markdown=True))


if __name__ == "__main__":
    main()

"""The tables "which GPU do I need" of README.md and docs/families.md, and of their Chinese pages, from the estimate.

    python docs/tools/gpu_table.py               # estimates, and writes the tables anew: minutes, on any machine
    python docs/tools/gpu_table.py families      # those of docs/families.md alone

Estimated on a CPU, without weights: CogVLM-17B's sizes, its images of 490 x 490, rows of --max_length 1288, r 16 on
every linear. Of one card: the settings that `--fit` finds. Of several: layouts with both towers recomputed, and the
smallest cards that have the estimate and a tenth more, as `--fit` wants it.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARDS = (16, 24, 40, 48, 80, 141)  # GB that cards have
FITTED = (16, 24, 48, 80)
SPARE = 1.1
BOTH = "--checkpoint-activations --vit_checkpoint_activations"
HEADS = {
    "README.md": ("| GPUs | cards of | options | GB on each, estimated |", "nothing fits"),
    "README_zh.md": ("| GPU 数 | 显卡 | 选项 | 每张 GPU 的 GB 数（估计） |", "放不下"),
}
LAYOUTS = (
    (2, f"--model-parallel-size 2 {BOTH} --batch-size 4"),
    (4, f"--model-parallel-size 4 {BOTH} --batch-size 4"),
    (4, f"--zero-stage 3 {BOTH} --batch-size 4"),
    (8, f"{BOTH} --batch-size 4"),
    (8, f"--zero-stage 3 {BOTH} --batch-size 4"),
    (8, f"--zero-stage 3 {BOTH} --batch-size 1"),
)
"""(GPUs, options) of the layouts."""
FAMILIES = {"cogvlm2-llama3-chat-19B": 2432, "cogvlm2-video-llama3-chat": 2048, "cogagent-chat": 400}
"""Published models, with the length of a row: an image, or a film of 24 frames, and words."""
FAMILY_LAYOUTS = (
    (1, "--zero-stage 2 --batch-size 1"),
    (1, "--zero-stage 2 --batch-size 1 --quantize nf4"),
    (2, "--model-parallel-size 2 --batch-size 1"),
    (4, "--zero-stage 3 --batch-size 1"),
    (8, "--zero-stage 3 --batch-size 4"),
)
"""(GPUs, options) for each of them, with both towers recomputed; the base is in bf16 where it is not quantised."""
FAMILY_CARDS = (24, 48, 80)
FAMILY_HEADS = {
    "docs/families.md": (
        "| model | GPUs | options | GB on each, estimated | 24 GB | 48 GB | 80 GB |", "fits", "does not fit"
    ),
    "docs/zh/families.md": (
        "| 模型 | GPU 数 | 选项 | 每张 GPU 的 GB 数（估计） | 24 GB | 48 GB | 80 GB |", "放得下", "放不下"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What fits cards of a size."""

    gpus: int
    card: int | None
    """GB that each has; None where no card is large enough."""
    options: str
    """Empty where nothing fits."""
    gigabytes: float
    """What a step takes on each, in 10^9 bytes."""


def fitted(card: int, base: Path | str) -> Row:
    """The settings that `sat-lora estimate --fit` finds for one card."""
    found = json.loads(_estimated(["--fit", str(card)], base))
    given = 6  # --from_pretrained, --max_length, --r
    return Row(1, card, " ".join(found["options"][given:]) if found["fits"] else "", found.get("total", 0) / 1e9)


def laid_out(gpus: int, options: str, base: Path | str, length: int = 1288) -> Row:
    """The smallest cards for a layout."""
    asked = ["--gpus", str(gpus), "--bf16", *options.split()]
    gigabytes = json.loads(_estimated(asked, base, length))["total"] / 1e9
    return Row(gpus, smallest_card(gigabytes), options, gigabytes)


def smallest_card(gigabytes: float) -> int | None:
    """The smallest of CARDS that has a tenth more than that."""
    return next((card for card in CARDS if card >= gigabytes * SPARE), None)


def _estimated(options: Sequence[str], base: Path | str, length: int = 1288) -> str:
    """What `sat-lora estimate` prints for programs."""
    given = ["--from_pretrained", str(base), "--max_length", str(length), "--r", "16"]
    command = [sys.executable, "-m", "sat_lora.cli", "estimate", *given]
    estimated = subprocess.run([*command, "--json", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if estimated.returncode not in (0, 1):
        raise RuntimeError(f"sat-lora estimate ended with {estimated.returncode} for {' '.join(options)}")
    return estimated.stdout


def estimated_rows() -> Iterator[Row]:
    """The rows of the table, estimated one after the other."""
    from benchmarks.models import config_of

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "model_config.json"
        config.write_text(json.dumps(config_of("full")))
        for card in FITTED:
            yield fitted(card, config)
        for gpus, options in LAYOUTS:
            yield laid_out(gpus, options, config)


def table(rows: Sequence[Row], *, nothing: str) -> list[str]:
    """The lines of the table under its head."""
    lines = ["|---|---|---|---|"]
    for row in rows:
        card = "-" if row.card is None else f"{row.card} GB"
        chosen = f"`{row.options}` | {row.gigabytes:.1f}" if row.options else f"{nothing} | -"
        lines.append(f"| {row.gpus} | {card} | {chosen} |")
    return lines


def family_table(rows: Sequence[tuple[str, Row]], *, fits: str, too_large: str) -> list[str]:
    """The lines of the table of the successors under its head."""
    lines = ["|---" * (4 + len(FAMILY_CARDS)) + "|"]
    for model, row in rows:
        verdicts = " | ".join(fits if card >= row.gigabytes * SPARE else too_large for card in FAMILY_CARDS)
        lines.append(f"| {model} | {row.gpus} | `{row.options}` | {row.gigabytes:.1f} | {verdicts} |")
    return lines


def family_rows_in(page: str, head: str) -> list[tuple[str, Row]]:
    """The rows of the table of the successors that a page has."""
    rows = []
    for line in page.split(head + "\n")[1].split("\n\n")[0].split("\n")[1:]:
        model, gpus, options, gigabytes, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        taken = float(gigabytes)
        rows.append((model, Row(int(gpus), smallest_card(taken), options.strip("`"), taken)))
    return rows


def family_row(model: str, gpus: int, options: str) -> tuple[str, Row]:
    """What a layout of FAMILY_LAYOUTS takes for a model of FAMILIES."""
    row = laid_out(gpus, f"{BOTH} {options}", model, FAMILIES[model])
    return model, Row(gpus, row.card, options, row.gigabytes)


def write_families() -> None:
    """Estimate the successors, and write both of their pages."""
    rows = [family_row(model, *layout) for model in FAMILIES for layout in FAMILY_LAYOUTS]
    for name, (head, fits, too_large) in FAMILY_HEADS.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        lines = family_table(rows, fits=fits, too_large=too_large)
        (ROOT / name).write_text(replace_table(page, head, lines), encoding="utf-8")


def rows_in(page: str, head: str, *, nothing: str) -> list[Row]:
    """The rows of the table that a page has."""
    lines = page.split(head + "\n")[1].split("\n\n")[0].split("\n")[1:]
    rows = []
    for line in lines:
        gpus, card, chosen, gigabytes = (cell.strip() for cell in line.strip("|").split("|"))
        size = None if card == "-" else int(card.removesuffix(" GB"))
        options = "" if chosen == nothing else chosen.strip("`")
        rows.append(Row(int(gpus), size, options, 0.0 if gigabytes == "-" else float(gigabytes)))
    return rows


def replace_table(page: str, head: str, lines: Sequence[str]) -> str:
    """The page with the lines under `head` in place of those that are there."""
    pattern = re.compile(re.escape(head) + r"\n(\|.*\n)+")
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page has no table, or several, under {head}")
    return pattern.sub(lambda _: "\n".join([head, *lines, ""]), page)


def main() -> None:
    """Estimate every row, and write the pages."""
    write_families()
    if sys.argv[1:] == ["families"]:
        return
    rows = [*estimated_rows()]
    for name, (head, nothing) in HEADS.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(replace_table(page, head, table(rows, nothing=nothing)), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

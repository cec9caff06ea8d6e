"""The tables "which GPU do I need" of README.md and docs/families.md, and of their Chinese pages, from the estimate.

    python docs/tools/gpu_table.py               # estimates, and writes the tables anew: minutes, on any machine
    python docs/tools/gpu_table.py families      # those of docs/families.md alone

Estimated on a CPU, without weights: CogVLM-17B's sizes, its images of 490 x 490, rows of --max_length 1288, r 16 on
every linear, bf16, both towers recomputed. A card is large enough if it has the estimate and a tenth more.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARDS = (16, 24, 40, 48, 80, 141)  # GB that cards have
SPARE = 1.1
FIXED = "--bf16 --checkpoint-activations --vit_checkpoint_activations --max_length 1288 --r 16"
HEADS = {
    "README.md": ("| GPUs | options | GB on each, estimated | cards of |", "larger than any card"),
    "README_zh.md": ("| GPU 数 | 选项 | 每张 GPU 的 GB 数（估计） | 显卡 |", "没有这样大的显卡"),
}


@dataclass(frozen=True)
class Layout:
    """A number of GPUs and the options that say how they share the work."""

    gpus: int
    options: str


LAYOUTS = (
    Layout(1, "--zero-stage 2 --batch-size 1"),
    Layout(1, "--zero-stage 2 --batch-size 4"),
    Layout(1, "--zero-stage 2 --batch-size 1 --quantize nf4"),
    Layout(1, "--zero-stage 2 --batch-size 4 --quantize nf4"),
    Layout(2, "--zero-stage 2 --batch-size 4 --model-parallel-size 2"),
    Layout(4, "--zero-stage 2 --batch-size 4 --model-parallel-size 4"),
    Layout(4, "--zero-stage 3 --batch-size 4"),
    Layout(8, "--zero-stage 2 --batch-size 4"),
    Layout(8, "--zero-stage 3 --batch-size 4"),
    Layout(8, "--zero-stage 3 --batch-size 1"),
)


FAMILIES = {
    "cogvlm2-llama3-chat-19B": 2432,
    "cogagent-chat": 400,
}  # with the length of a row: an image and a hundred words
FAMILY_LAYOUTS = (
    Layout(1, "--zero-stage 2 --batch-size 1"),
    Layout(1, "--zero-stage 2 --batch-size 1 --quantize nf4"),
)
FAMILY_HEADS = {
    "docs/families.md": ("| model | GPUs | options | GB on each, estimated | cards of |", "larger than any card"),
    "docs/zh/families.md": ("| 模型 | GPU 数 | 选项 | 每张 GPU 的 GB 数（估计） | 显卡 |", "没有这样大的显卡"),
}


def gigabytes(layout: Layout, config: Path | str, fixed: str = FIXED) -> float:
    """What `sat-lora estimate` says that a rank of this layout takes, in 10^9 bytes."""
    options = ["--from_pretrained", str(config), "--gpus", str(layout.gpus), "--json"]
    command = [sys.executable, "-m", "sat_lora.cli", "estimate", *options, *fixed.split(), *layout.options.split()]
    estimated = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if estimated.returncode:
        raise RuntimeError(f"sat-lora estimate ended with {estimated.returncode} for {layout}")
    return json.loads(estimated.stdout)["total"] / 1e9


def rows(sizes: dict[Layout, float], *, too_large: str) -> list[str]:
    """The lines of the table under its head."""
    lines = ["|---|---|---|---|"]
    for layout, size in sizes.items():
        fitting = [card for card in CARDS if card >= size * SPARE]
        card = f"{fitting[0]} GB" if fitting else too_large
        lines.append(f"| {layout.gpus} | `{layout.options}` | {size:.1f} | {card} |")
    return lines


def family_rows(sizes: dict[tuple[str, Layout], float], *, too_large: str) -> list[str]:
    """The lines of the table of the successors under its head."""
    lines = ["|---|---|---|---|---|"]
    for (name, layout), size in sizes.items():
        (row,) = rows({layout: size}, too_large=too_large)[1:]
        lines.append(f"| {name} {row}")
    return lines


def write_families() -> None:
    """Estimate every layout of the successors, and write both of their pages."""
    sizes = {}
    for name, length in FAMILIES.items():
        fixed = FIXED.replace("--max_length 1288", f"--max_length {length}")
        sizes |= {(name, layout): gigabytes(layout, name, fixed) for layout in FAMILY_LAYOUTS}
    for page, (head, too_large) in FAMILY_HEADS.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = family_rows(sizes, too_large=too_large)
        (ROOT / page).write_text(replace_table(text, head, lines), encoding="utf-8")


def replace_table(page: str, head: str, lines: list[str]) -> str:
    """The page with the lines under `head` in place of those that are there."""
    pattern = re.compile(re.escape(head) + r"\n(\|.*\n)+")
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page has no table, or several, under {head}")
    return pattern.sub(lambda _: "\n".join([head, *lines, ""]), page)


def main() -> None:
    """Estimate every layout, and write the pages."""
    write_families()
    if sys.argv[1:] == ["families"]:
        return
    from benchmarks.models import config_of

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "model_config.json"
        config.write_text(json.dumps(config_of("full")))
        sizes = {layout: gigabytes(layout, config) for layout in LAYOUTS}
    for name, (head, too_large) in HEADS.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(replace_table(page, head, rows(sizes, too_large=too_large)), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

"""The table "which GPU do I need" of README.md and README_zh.md, from `sat-lora estimate --fit`.

    python docs/tools/gpu_table.py               # searches, and writes both tables anew: minutes, on any machine

Estimated on a CPU, without weights: CogVLM-17B's sizes, its images of 490 x 490, rows of --max_length 1288, r 16 on
every linear.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIVEN = "--max_length 1288 --r 16"
OFFLOAD = "finetune_demo/offload_optimizer.json"
HEADS = {
    "README.md": ("| GPUs | cards of | options | GB on each, estimated |", "nothing fits"),
    "README_zh.md": ("| GPU 数 | 显卡 | 选项 | 每张 GPU 的 GB 数（估计） |", "放不下"),
}


@dataclass(frozen=True)
class Machine:
    """Cards of one size."""

    gpus: int
    size: int
    """GB that a card has."""


@dataclass(frozen=True)
class Row:
    """What fits a machine."""

    machine: Machine
    options: str
    """The options that the search has chosen; empty where nothing fits."""
    gigabytes: float
    """What a step takes on each card, in 10^9 bytes."""


MACHINES = (*(Machine(1, size) for size in (12, 16, 24, 40, 48, 80)), *(Machine(8, size) for size in (16, 24, 40, 80)))


def searched(machines: Sequence[Machine]) -> list[Row]:
    """What `sat-lora estimate --fit` finds for these machines; no estimate is made twice."""
    from benchmarks.models import config_of
    from sat_lora._sat import quiet_sat
    from sat_lora.memory.fit import SPARE, Estimates, fit
    from sat_lora.training.settings.options import parse_options

    quiet_sat()
    config = parse_options(["--from_pretrained", "cogvlm-base-490", *GIVEN.split()], environ={})
    estimates = Estimates(config_of("full"))
    rows = []
    for machine in machines:
        search = dict(available=machine.size * 1e9 / SPARE, offload=ROOT / OFFLOAD, estimates=estimates)
        found = fit(config, ranks=machine.gpus, **search)
        options = " ".join(found.options).replace(str(ROOT / OFFLOAD), OFFLOAD)
        rows.append(Row(machine, options, 0.0 if found.memory is None else found.memory.total / 1e9))
        print(line_of(rows[-1], nothing="nothing fits"), file=sys.stderr, flush=True)
    return rows


def line_of(row: Row, *, nothing: str) -> str:
    """A line of the table."""
    chosen = f"`{row.options}` | {row.gigabytes:.1f}" if row.options else f"{nothing} | "
    return f"| {row.machine.gpus} | {row.machine.size} GB | {chosen} |"


def table(rows: Sequence[Row], *, nothing: str) -> list[str]:
    """The lines of the table under its head."""
    return ["|---|---|---|---|", *(line_of(row, nothing=nothing) for row in rows)]


def rows_in(page: str, head: str, *, nothing: str) -> list[Row]:
    """The rows of the table that a page has."""
    lines = page.split(head + "\n")[1].split("\n\n")[0].split("\n")[1:]
    rows = []
    for line in lines:
        gpus, size, chosen, gigabytes = (cell.strip() for cell in line.strip("|").split("|"))
        machine = Machine(int(gpus), int(size.removesuffix(" GB")))
        rows.append(Row(machine, "" if chosen == nothing else chosen.strip("`"), float(gigabytes or 0)))
    return rows


def replace_table(page: str, head: str, lines: Sequence[str]) -> str:
    """The page with the lines under `head` in place of those that are there."""
    pattern = re.compile(re.escape(head) + r"\n(\|.*\n)+")
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page has no table, or several, under {head}")
    return pattern.sub(lambda _: "\n".join([head, *lines, ""]), page)


def main() -> None:
    """Search for every machine, and write both pages."""
    rows = searched(MACHINES)
    for name, (head, nothing) in HEADS.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(replace_table(page, head, table(rows, nothing=nothing)), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

"""The matrix of layouts, in every cell of which training has to be what it is in one process on the joined batch.

    python -m tests.distributed.matrix [--only TEXT]    # every cell, or those whose description holds TEXT
    python -m tests.distributed.matrix --markdown       # and writes the table of docs/matrix.md anew
    python -m tests.distributed.matrix --quantize nf4   # on a quantised base, against its decoded weights
    python -m tests.distributed.matrix --family cogagent

A cell is a model-parallel size, a data-parallel size, a ZeRO stage, activation checkpointing or not, a precision, and
what the batches of the ranks hold. What is compared: the losses of five steps, logits, gradients and DeepSpeed's norm
of them in the first, and the adapter after five steps of plain SGD and of Adam. The one process computes in float64
where the ranks do in float32.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy
import torch

from sat_lora.quantization.config import NAMES
from tests.support.paths import ROOT
from tests.support.quantized_layers import decoded_tiny_model, quantized_tiny_model
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.tiny_families import CONFIGS, batch_of_rank, family_model
from tests.support.training_runs import (
    FILES,
    BatchFor,
    image_batch,
    mixed_batch,
    text_batch,
    train_alone,
    train_in_layout,
    worst_error,
)

PAGES = [ROOT / "docs" / folder / "matrix.md" for folder in ("", "zh")]
HEAD = "| precision | model parallel | data parallel | ZeRO | "
BATCHES = {"images": image_batch, "one text-only": mixed_batch, "text-only": text_batch}
WITH_IMAGES = {"images": (0, 1), "one text-only": (0,), "text-only": ()}  # the ranks that have some, of another family
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {"loss": 1e-5, "logits": 1e-5, "gradient": 1e-5, "norm": 1e-5, "SGD": 1e-5, "Adam": 1e-3}
"""In float32, from float64. Adam magnifies rounding where a gradient is near zero."""


@dataclass(frozen=True)
class Cell:
    model_parallel: int
    data_parallel: int
    stage: int
    checkpoint: bool
    precision: str
    batch: str
    scheme: str | None = None
    """That of a quantised base, on which one process trains with the decoded weights."""
    family: str = "cogvlm"
    """Whose tiny base the ranks train on."""

    def __str__(self) -> str:
        checkpoint = "checkpointed" if self.checkpoint else "not checkpointed"
        layout = f"mp {self.model_parallel}, dp {self.data_parallel}, ZeRO-{self.stage}"
        names = [name for name in (self.scheme, self.family) if name not in (None, "cogvlm")]
        return ", ".join([layout, self.precision, checkpoint, self.batch, *names])

    def bound(self, quantity: str) -> float:
        return BOUNDS[quantity] if self.precision == "fp32" else 1.0

    @property
    def batch_for(self) -> BatchFor:
        """What gives the batch of a rank and a step."""
        if self.family == "cogvlm":
            return BATCHES[self.batch]
        return partial(batch_of_rank, self.family, with_images=WITH_IMAGES[self.batch])

    @property
    def model_of(self) -> Callable[..., torch.nn.Module]:
        """What makes the base of the ranks."""
        if self.family != "cogvlm":
            return partial(family_model, self.family)
        return tiny_model if self.scheme is None else partial(quantized_tiny_model, self.scheme)

    @property
    def plain_model_of(self) -> Callable[..., torch.nn.Module]:
        """What makes the base of the one process."""
        return self.model_of if self.scheme is None else partial(decoded_tiny_model, self.scheme)


CELLS = [Cell(*one) for one in itertools.product((1, 2), (1, 2), range(4), (False, True), PRECISIONS, BATCHES)]


def alone(cell: Cell, precision: str) -> dict:
    """What one process finds for the cell, in that precision."""
    return _alone(replace(cell, model_parallel=1, stage=0, checkpoint=False, precision=precision))


@cache
def _alone(cell: Cell) -> dict:
    what = (cell.data_parallel, PRECISIONS[cell.precision], cell.batch_for)
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(train_alone, 1, *what, folder, cell.plain_model_of)[0]


@cache
def errors_of(cell: Cell) -> dict[str, float]:
    """The error of each quantity, the largest over all ranks. AssertionError: a rank failed or hung, or what has to be
    the same bit for bit is not.

    In bf16 it is the overall difference from the bf16 run in one process, in units of that run's own difference from
    float64: at most 1, the layout adds no more than rounding did.
    """
    expected = alone(cell, cell.precision)
    with adapter_folder(expected["file"]) as adapter, tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(
            train_in_layout,
            cell.model_parallel * cell.data_parallel,
            cell.model_parallel,
            cell.stage,
            cell.checkpoint,
            PRECISIONS[cell.precision],
            cell.batch_for,
            adapter,
            folder,
            cell.model_of,
        )
    for name in ("initial file", "file"):
        if any(got[name] != expected[name] for got in ranks):
            raise AssertionError(f"{name}: other bytes than those of one process")
    if not all(got["replicas agree"] for got in ranks):
        raise AssertionError("a replicated parameter is not the same on all model-parallel ranks")
    per_rank = []
    for got in ranks:
        mine = seen_by(got["rank"], expected, cell.data_parallel)
        if cell.precision == "fp32":
            per_rank.append({name: worst_error(got[name], mine[name]) for name in BOUNDS})
            continue
        exact = seen_by(got["rank"], alone(cell, "fp32"), cell.data_parallel)
        rounding = {name: overall_error(mine[name], exact[name]) for name in BOUNDS}
        # The errors in a single number may cancel to nothing by chance: measured by those of what it is made from.
        rounding |= {"norm": rounding["gradient"], "loss": rounding["logits"]}
        per_rank.append({name: overall_error(got[name], mine[name]) / rounding[name] for name in BOUNDS})
    return {name: max(errors[name] for errors in per_rank) for name in BOUNDS}


def seen_by(rank: int, found: dict, data_parallel: int) -> dict:
    """What one process found, with the logits of one data-parallel rank's rows alone."""
    logits = found["logits"]["logits"]
    rows = logits.reshape(data_parallel, -1, *logits.shape[1:])[rank]
    return {**found, "logits": {"logits": rows}}


@contextmanager
def adapter_folder(files: list[bytes]) -> Iterator[str]:
    """A folder that holds an adapter's files, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in zip(FILES, files):
            (Path(folder) / name).write_bytes(content)
        yield folder


def overall_error(got: dict[str, numpy.ndarray], expected: dict[str, numpy.ndarray]) -> float:
    """The norm of all errors, relative to that of all values."""

    def squares(values):
        return sum(float((value.astype(float) ** 2).sum()) for value in values)

    return (squares(got[k] - expected[k] for k in expected) / squares(expected.values())) ** 0.5


def table_lines(table: dict[tuple, dict[str, float]]) -> list[str]:
    """The errors as a table of Markdown, by (precision, model parallel, data parallel, stage)."""
    lines = [f"{HEAD}{' | '.join(BOUNDS)} |", "|---" * (4 + len(BOUNDS)) + "|"]
    for key in sorted(table, key=lambda key: (key[0] != "fp32", key)):
        figures = [f"{table[key][name]:.1e}" if key[0] == "fp32" else f"{table[key][name]:.2f}" for name in BOUNDS]
        lines.append("| " + " | ".join([*map(str, key), *figures]) + " |")
    return lines


def replace_table(page: str, lines: list[str]) -> str:
    """The page with these lines in place of its table. ValueError: it has none."""
    before, head, after = page.partition(HEAD)
    if not head:
        raise ValueError(f"the page has no table under {HEAD}")
    _, _, rest = after.partition("\n\n")
    return "\n\n".join([before + "\n".join(lines), rest] if rest else [before + "\n".join(lines) + "\n"])


def main() -> int:
    """Run the cells and print their errors, the worst of each layout, stage and precision in a line; 1 if any fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose description holds TEXT")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/matrix.md, if nothing fails")
    parser.add_argument("--quantize", choices=NAMES, help="on a base quantised so")
    parser.add_argument("--family", choices=CONFIGS, default="cogvlm", help="on a base of that family")
    options = parser.parse_args()
    is_another = options.quantize or options.family != "cogvlm"
    if options.quantize and options.family != "cogvlm":
        parser.error("--quantize: of CogVLM alone; leave out --family")
    if (options.only or is_another) and options.markdown:
        parser.error(
            "--markdown: the pages show every cell, on CogVLM whole; leave out --only, --quantize and --family"
        )
    only = options.only
    cells = [replace(cell, scheme=options.quantize, family=options.family) for cell in CELLS if only in str(cell)]
    table, failed = {}, 0
    for number, cell in enumerate(cells, 1):
        try:
            errors = errors_of(cell)
        except AssertionError as error:
            failed += 1
            print(f"{number}/{len(cells)} {cell}: FAILED: {error}", file=sys.stderr, flush=True)
            continue
        problems = [name for name in BOUNDS if not errors[name] <= cell.bound(name)]
        failed += bool(problems)
        verdict = f"FAILED ({', '.join(problems)})" if problems else "ok"
        shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"{number}/{len(cells)} {cell}: {verdict}: {shown}", file=sys.stderr, flush=True)
        row = table.setdefault((cell.precision, cell.model_parallel, cell.data_parallel, cell.stage), errors)
        row.update({name: max(row[name], errors[name]) for name in BOUNDS})
    lines = table_lines(table)
    print("\n".join(lines))
    if options.markdown and not failed:
        for page in PAGES:
            page.write_text(replace_table(page.read_text(encoding="utf-8"), lines), encoding="utf-8")
    print(f"\n{len(cells) - failed} of {len(cells)} cells within the bounds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

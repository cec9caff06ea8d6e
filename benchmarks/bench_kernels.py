"""The kernels of a delta for large tensors against what torch has, in microseconds. Needs a GPU.

    python -m benchmarks.bench_kernels --out kernels.json

For linears of CogVLM's shapes in bf16 at r 16: the addition into y, and with dropout S, dS A and dA. `least` is what
the tensors read and written take at `--bandwidth`. The L2 cache is emptied before each call. `host` is what a launch
takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.interleaved import environment
from benchmarks.report import table, write_json
from benchmarks.variants import Shape
from sat_lora.lora.deltas.layout import DeltaLayout
from sat_lora.lora.deltas.low_rank import RandomDropout

SHAPES = "4096x12288/3 4096x11008 1792x15360 1792x5376/3 15360x1792 11008x4096 4096x4096"
TOKENS, RANK = 4904, 16
L2_AND_MORE = 2**26  # float32 elements


def microseconds(work: Callable[[], object], flush: torch.Tensor, repeats: int) -> float:
    """The median between two events around one call, the cache emptied and the device busy before it."""
    work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(300_000)  # so that the launches are ahead of the device
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times)


def launch(work: Callable[[], object], calls: int = 200) -> float:
    """Microseconds of host time per call."""
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * seconds / calls


def works_of(shape: Shape, dropout: float) -> Iterator[tuple[str, int, Callable, Callable]]:
    """(what is computed, bytes that have to move, torch's way, the kernel's) for a linear of that shape."""
    from sat_lora.lora.deltas import delta_kernels

    common = dict(dtype=torch.bfloat16, device="cuda")
    width, ranks = shape.out_features // shape.slots, shape.slots * RANK
    slots = tuple((number * width, (number + 1) * width) for number in range(shape.slots))
    layout = DeltaLayout(slots, shape.out_features)
    x, y = torch.randn(TOKENS, shape.in_features, **common), torch.randn(TOKENS, shape.out_features, **common)
    a, b = torch.randn(ranks, shape.in_features, **common), torch.randn(shape.out_features, RANK, **common)
    s, ds = torch.randn(TOKENS, ranks, **common), torch.randn(ranks, TOKENS, **common).t()
    run, seed = layout.runs[0], torch.tensor(12345, device="cuda")
    dropped = RandomDropout(dropout)._dropped
    mask = torch.native_dropout(x, dropout, True)[1]

    def drop(tensor: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.native_dropout_backward(tensor, mask, 1 / (1 - dropout))

    def add() -> None:
        if layout.is_whole:
            y.addmm_(s, b.t(), alpha=2.0)
        else:
            run.columns(y).baddbmm_(run.ranks(s, RANK), run.rows_transposed(b), alpha=2.0)

    yield "y +=", 2 * y.nbytes, add, lambda: delta_kernels.add_slots(y, s, b, 2.0, layout)
    yield (
        "S",
        x.nbytes,
        lambda: torch.native_dropout(x, dropout, True)[0].mm(a.t()),
        lambda: delta_kernels.project(x, a, seed, dropped),
    )
    yield "dS A", x.nbytes, lambda: drop(ds.mm(a)), lambda: delta_kernels.spread(ds, a, seed, dropped)
    yield (
        "dA",
        x.nbytes,
        lambda: torch.addmm(a, ds.t(), drop(x), beta=0, alpha=2.0),
        lambda: delta_kernels.gradient_of_a(ds, x, seed, dropped, 2.0),
    )


def main(arguments: list[str] | None = None) -> dict:
    """Measure every shape, print and write the results, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in SHAPES.split()])
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes per second of the GPU's memory")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch sees none")
    flush = torch.empty(L2_AND_MORE, device="cuda")
    rows = []
    for shape in args.shapes:
        for what, moved, torchs, ours in works_of(shape, args.dropout):
            device = {
                name: microseconds(work, flush, args.repeats) for name, work in (("torch", torchs), ("own", ours))
            }
            least = 1e6 * moved / args.bandwidth
            rows.append(
                dict(shape=str(shape), what=what, least=least, host=launch(ours), host_torch=launch(torchs), **device)
            )
    report = {"environment": environment(torch.device("cuda"), "wall"), "dropout": args.dropout, "rows": rows}
    names = ("least", "torch", "own", "host_torch", "host")
    cells = [[row["shape"], row["what"], *(f"{row[name]:.1f}" for name in names)] for row in rows]
    print(
        table(
            ["linear", "what", "least us", "torch us", "own us", "host torch us", "host own us"], cells, args.markdown
        )
    )
    if args.out:
        write_json(report, args.out)
    return report


if __name__ == "__main__":
    main()

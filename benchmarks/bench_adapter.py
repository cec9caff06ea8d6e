"""Forward and backward of one adapted linear against the same linear frozen: time and bytes kept for backward.

    python -m benchmarks.bench_adapter --out adapter.json --markdown

Compares sat_lora with PEFT's LoRA and with SAT's own lora2, on linears of CogVLM's shapes (scaled down on a CPU).
"""

import argparse
import itertools
from pathlib import Path

import torch

from benchmarks.interleaved import CLOCKS, DTYPES, environment, join_alone, measure, progress, saved_bytes, summarise
from benchmarks.report import adapter_table, write_json
from benchmarks.variants import Shape, Variant, build, names_for

# On CUDA CogVLM's own: language q/k/v, dense and MLP, then the vision transformer's.
SHAPES = {
    "cpu": "1024x1024 1024x3072/3 2048x2048 2048x6144/3 1024x4096 4096x1024",
    "cuda": "4096x4096 4096x12288/3 4096x11008 11008x4096 1792x5376/3 1792x15360 15360x1792",
}
TOKENS = {"cpu": 1280, "cuda": 4096}  # on the CPU one image of CogVLM, 1,227 places, and a question


def forward_and_backward(variant: Variant, x: torch.Tensor, grad: torch.Tensor):
    """A work: y = variant(x), then the gradients of x (tokens, in), A and B for `grad` (tokens, out)."""

    def work():
        return torch.autograd.grad(variant.call(x), [x, *variant.trained], grad)

    return work


def compare(shape: Shape, dtype: str, rank: int, dropout: float, tokens: int, repeats: int, clock: str, device) -> dict:
    """One case: every variant's quartiles of seconds and of ratios to the frozen linear, and its saved bytes."""
    kind = DTYPES[dtype]
    x = torch.randn(tokens, shape.in_features, device=device).to(kind).requires_grad_()
    grad = torch.randn(tokens, shape.out_features, device=device).to(kind)
    variants = {name: build(name, shape, rank, dropout, kind, device) for name in names_for(shape)}
    works = {name: forward_and_backward(variant, x, grad) for name, variant in variants.items()}
    results = summarise(measure(works, repeats, device, clock), base="frozen")
    for name, variant in variants.items():
        kept = saved_bytes(lambda call=variant.call: call(x), variant.parameters)
        results[name] |= {"saved_bytes": kept, "saved_per_input": kept / (x.numel() * x.element_size())}
    case = {"shape": str(shape), "dtype": dtype, "rank": rank, "dropout": dropout, "tokens": tokens}
    return {**case, "slots": shape.slots, "variants": results}


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="IN x OUT, /3 for fused q/k/v: 1024x3072/3")
    parser.add_argument("--tokens", type=int, help="rows of x; 1280 on a CPU, 4096 on CUDA")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for busy CPU machines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of lines")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Run every case, print and write the results, and return them."""
    args = options(arguments)
    device = torch.device(args.device)
    join_alone(device)
    torch.manual_seed(args.seed)
    shapes = args.shapes or [Shape.parse(text) for text in SHAPES[device.type].split()]
    tokens = args.tokens or TOKENS[device.type]
    cases = list(itertools.product(args.dtypes, shapes, args.ranks, args.dropouts))
    results = []
    for dtype, shape, rank, dropout in progress(cases, "linears"):
        results.append(compare(shape, dtype, rank, dropout, tokens, args.repeats, args.clock, device))
    report = {"environment": environment(device, args.clock), "repeats": args.repeats, "cases": results}
    print(adapter_table(report, markdown=args.markdown))
    if args.out:
        write_json(report, args.out)
    return report


if __name__ == "__main__":
    main()

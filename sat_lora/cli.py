"""The `sat-lora` command."""

import argparse
import sys


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sat-lora", description="Work with LoRA adapters of SAT models.")
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser(
        "merge",
        help="fold an adapter into a base checkpoint",
        epilog="example: sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter --out merged",
    )
    merge.add_argument("--base", required=True, metavar="DIR", help="SAT folder of the base")
    merge.add_argument("--trust-checkpoint", action="store_true", help="unpickle all of it: runs any code in it")
    merge.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    merge.add_argument("--out", required=True, metavar="DIR", help="new SAT folder")
    merge.set_defaults(run=_merge)
    combine = commands.add_parser(
        "combine",
        help="make one adapter of several",
        epilog="example: sat-lora combine runs/a/adapter runs/b/adapter --weights 0.7 0.3 --method cat --out both",
    )
    combine.add_argument("folders", nargs="+", metavar="ADAPTER", help="adapter folders, trained on one base")
    combine.add_argument("--out", required=True, metavar="DIR", help="new adapter folder")
    combine.add_argument(
        "--method",
        required=True,
        help="cat: the exact sum, ranks add up; svd: the best approximation of a given rank; linear: sums of factors, "
        "cheap and rough; ties: linear with values that contradict each other left out",
    )
    combine.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per adapter, by default 1")
    combine.add_argument("--rank", type=int, metavar="R", help="of svd, by default each layer's largest")
    combine.add_argument("--density", type=float, metavar="D", help="share of the values that ties keeps, as 0.5")
    combine.add_argument(
        "--majority-sign", default="total", metavar="total|frequency", help="how ties elects signs, by default total"
    )
    combine.set_defaults(run=_combine)
    return parser


def _merge(options: argparse.Namespace) -> None:
    from sat_lora.merge_checkpoint import merge_adapter

    merge_adapter(options.base, options.adapter, options.out, trust=options.trust_checkpoint)
    print(f"merged model in {options.out}")


def _combine(options: argparse.Namespace) -> None:
    from sat_lora.combine import combine_adapters

    combine_adapters(
        options.folders,
        options.out,
        method=options.method,
        weights=options.weights,
        rank=options.rank,
        density=options.density,
        majority_sign=options.majority_sign,
    )
    print(f"combined adapter in {options.out}")


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from sat_lora.errors import SatLoraError

    try:
        options.run(options)
    except SatLoraError as error:
        print(f"sat-lora {options.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

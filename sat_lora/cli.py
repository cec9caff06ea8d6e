"""The `sat-lora` command."""

import argparse
import sys

from sat_lora.interop.commands import add_commands


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sat-lora", description="Work with LoRA adapters of SAT models.")
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser(
        "merge",
        help="fold an adapter into a base checkpoint",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter --out merged\n"
        "  sat-lora merge --base cogvlm-base-490 --adapter runs/mine/adapter --out merged-hf --to hf --verify",
    )
    merge.add_argument(
        "--base", required=True, metavar="DIR", help="SAT or Hugging Face folder of the base, cut or whole"
    )
    merge.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    merge.add_argument("--out", required=True, metavar="DIR", help="new folder")
    merge.add_argument(
        "--to", default="sat", choices=["sat", "hf"], help="SAT's layout, or safetensors as Hugging Face"
    )
    merge.add_argument("--model-parallel-size", type=int, default=1, metavar="N", help="cut the SAT folder for N ranks")
    merge.add_argument(
        "--verify", action="store_true", help="compare its logits with base and adapter; loads both whole"
    )
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
    add_commands(commands)
    return parser


def _merge(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sat_lora.errors import ConfigError
    from sat_lora.merge_checkpoint import merge_adapter

    if options.model_parallel_size < 1 or (options.to == "hf" and options.model_parallel_size > 1):
        raise ConfigError(
            f"--model-parallel-size: got {options.model_parallel_size}, wanted 1 or more; only SAT folders are cut"
        )
    merge_adapter(
        options.base,
        options.adapter,
        options.out,
        to=options.to,
        model_parallel_size=options.model_parallel_size,
        progress=lambda names, total: tqdm(names, total=total, desc="merging", unit=" tensors", disable=None, delay=1),
    )
    print(f"merged model in {options.out}")
    if not options.verify:
        return 0
    from sat_lora.verify_merge import lost_share

    share, allowed = lost_share(options.base, options.adapter, options.out)
    verdict = "verified" if share <= allowed else "WRONG"
    print(f"{verdict}: merging lost {share:.2%} of the adapter's effect on the logits, {allowed:.2%} is rounding")
    return 0 if share <= allowed else 1


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
        return options.run(options) or 0
    except SatLoraError as error:
        print(f"sat-lora {options.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""`sat-lora combine`."""

import argparse

from sat_lora.commands.parts import bar, examples, refuse_existing
from sat_lora.printable import printable


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    combine = commands.add_parser(
        "combine",
        help="make one adapter of several",
        **examples(
            "sat-lora combine runs/a/adapter runs/b/adapter --weights 0.7 0.3 --method cat --out both",
            "sat-lora combine runs/a/adapter runs/b/adapter --method svd --rank 16 --out both",
            "sat-lora combine runs/a/adapter runs/b/adapter --method ties --density 0.5 --out both",
            "sat-lora combine both --method svd --rank 8 --out smaller",
        ),
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
    combine.add_argument("--any-base", action="store_true", help="take adapters of different bases")
    combine.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> None:
    """Write the combined adapter. Raises a SatLoraError for a user's mistake."""
    refuse_existing(options.out)
    from sat_lora.adapters.combine import combine_adapters

    combine_adapters(
        options.folders,
        options.out,
        method=options.method,
        weights=options.weights,
        rank=options.rank,
        density=options.density,
        majority_sign=options.majority_sign,
        any_base=options.any_base,
        progress=bar("combining", "layers"),
    )
    print(f"combined adapter in {printable(options.out)}")

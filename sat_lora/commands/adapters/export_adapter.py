"""`sat-lora export`."""

import argparse

from sat_lora.commands.parts import ANY_BASE, bar, examples, refuse_existing, refuse_missing
from sat_lora.printable import printable


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    export = commands.add_parser(
        "export",
        help="make a PEFT adapter for Hugging Face's CogVLM",
        **examples(
            "sat-lora export --to peft --adapter runs/mine/adapter --out mine_peft",
            "sat-lora export --to peft --adapter runs/mine/adapter/best --base cogvlm-base-490 --out mine_peft",
        ),
    )
    export.add_argument("--to", required=True, choices=["peft"], help="format to write")
    export.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    export.add_argument("--out", required=True, metavar="DIR", help="new folder")
    export.add_argument(
        "--base",
        metavar="DIR",
        help="model folder of the base; needed for DoRA on some of q, k, v and for modules of which a part was trained",
    )
    export.add_argument("--any-base", action="store_true", help=ANY_BASE)
    export.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> None:
    """Write the PEFT adapter. Raises a SatLoraError for a user's mistake."""
    refuse_existing(options.out)
    refuse_missing(options.adapter, base=options.base)
    from sat_lora.interop.peft_export import export_to_peft

    export_to_peft(
        options.adapter, options.out, base=options.base, any_base=options.any_base, progress=bar("exporting", "layers")
    )
    print(f"PEFT adapter in {printable(options.out)}")

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
    merge.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder")
    merge.add_argument("--out", required=True, metavar="DIR", help="new SAT folder")
    merge.set_defaults(run=_merge)
    return parser


def _merge(options: argparse.Namespace) -> None:
    from sat_lora.merge_checkpoint import merge_adapter

    merge_adapter(options.base, options.adapter, options.out)
    print(f"merged model in {options.out}")


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

"""The `sat-lora` command."""

import argparse
import os
import sys

from sat_lora.commands import combine, doctor, estimate, export_adapter, import_adapter, inspect_adapter, merge

COMMANDS = (doctor, estimate, merge, export_adapter, import_adapter, inspect_adapter, combine)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sat-lora", description="Work with LoRA adapters of SAT models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        module.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 for a bad result, 2 for a mistake of the user."""
    parser = build_parser()
    options, options.more = parser.parse_known_args(argv)
    if options.more and not getattr(options, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(options.more)}")
    from sat_lora.errors import SatLoraError

    try:
        status = options.run_command(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read has heard enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0
    except SatLoraError as error:
        print(f"sat-lora {options.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

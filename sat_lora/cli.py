"""The `sat-lora` command."""


def build_parser():
    """Return the OptionParser of all sub-commands."""
    from sat_lora.commands import chat, data, doctor, estimate, evaluate, pack, quantize, runs, serve, train
    from sat_lora.commands.adapters import combine, export_adapter, import_adapter, inspect_adapter, merge
    from sat_lora.terminal.option_parser import OptionParser

    parser = OptionParser(prog="sat-lora", description="Work with LoRA adapters of SAT models.", takes_more=True)
    commands = parser.add_subparsers(dest="command", required=True)
    of_adapters = (merge, export_adapter, import_adapter, inspect_adapter, combine)
    for module in (data, pack, train, evaluate, chat, serve, runs, doctor, estimate, *of_adapters, quantize):
        module.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 for a bad result, 2 for a mistake of the user, 130 for Ctrl-C.

    argv: its arguments; None takes those of the process.
    """
    from sat_lora.terminal.edge import run_command

    return run_command("sat-lora", lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    """Run the command that the arguments name, and return its exit status."""
    from sat_lora.terminal.edge import run_command

    parser = build_parser()
    options, options.more = parser.parse_known_args(argv)
    if options.more and not getattr(options, "takes_more", False):
        parser.refuse_unknown(options.more)
    return run_command(f"sat-lora {options.command}", lambda: options.run_command(options), may_be_cut=True)


def script() -> None:
    """Run as the installed `sat-lora`, and end the process with the exit status."""
    from sat_lora.terminal.edge import run_script

    run_script("sat-lora", main, prints_its_result=True)


if __name__ == "__main__":
    script()

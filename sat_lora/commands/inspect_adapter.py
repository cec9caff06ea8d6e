"""`sat-lora inspect`."""

import argparse

from sat_lora.commands.parts import examples


def add(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show ranks, sizes and delta norms of an adapter",
        **examples("sat-lora inspect runs/mine", "sat-lora inspect runs/mine/adapter --json --plot norms.png"),
    )
    inspect.add_argument("path", metavar="PATH", help="adapter folder or run folder")
    inspect.add_argument("--json", action="store_true", help="everything, layer by layer, for programs")
    inspect.add_argument("--plot", metavar="PNG", help="bar chart of the delta norm per layer")
    inspect.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> None:
    from sat_lora.inspect_adapter import describe_adapter, draw_norms, inspect_adapter, to_json

    report = inspect_adapter(options.path)
    if options.plot:
        draw_norms(report, options.plot)
    print(to_json(report) if options.json else describe_adapter(report))

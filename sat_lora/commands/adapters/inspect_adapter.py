"""`sat-lora inspect`."""

import argparse
import sys

from sat_lora.commands.parts import bar, examples, refuse_missing


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    inspect = commands.add_parser(
        "inspect",
        help="show ranks, sizes and delta norms of an adapter",
        **examples("sat-lora inspect runs/mine", "sat-lora inspect runs/mine/adapter --json --plot norms.png"),
    )
    inspect.add_argument("path", metavar="PATH", help="adapter folder or run folder")
    inspect.add_argument("--json", action="store_true", help="everything, layer by layer, for programs")
    inspect.add_argument("--plot", metavar="PNG", help="draw how far each layer's delta moves its weight")
    inspect.add_argument(
        "--base", metavar="DIR", help="for --plot: its base, to draw in percent of the weights (default: the run's)"
    )
    inspect.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> None:
    """Print what is known of the adapter, and draw its norms where that is asked for. Raises a SatLoraError for a
    user's mistake.
    """
    from sat_lora.errors import ConfigError

    if options.base and not options.plot:
        raise ConfigError(f"--base {options.base}: it is for --plot")
    refuse_missing(options.path, base=options.base, option="")
    from sat_lora.adapters.inspect import describe_adapter, inspect_adapter, to_json

    report = inspect_adapter(options.path)
    if options.plot:
        print(_plot(report, options), file=sys.stderr)
    print(to_json(report) if options.json else describe_adapter(report))


def _plot(report: dict, options: argparse.Namespace) -> str:
    """Draw the norms, and return a line that says what was drawn. The report is left as it is, without the weights'
    norms.
    """
    from sat_lora.adapters.inspect import add_weight_norms, base_of_run, draw_norms
    from sat_lora.printable import printable

    drawn = {**report, "layers": [{**layer} for layer in report["layers"]]}
    base = options.base or base_of_run(report)
    if base is not None:
        add_weight_norms(drawn, base, bar("reading the base", "layers"))
    draw_norms(drawn, options.plot)
    against = f"in percent of the weights of {base}" if base is not None else "in numbers; --base gives percent"
    return f"norms in {printable(options.plot)}, {printable(against)}"

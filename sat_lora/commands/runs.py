"""`sat-lora runs`: the runs in a folder, with their state, best validation loss and size."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sat_lora.commands.parts import examples, size_text

if TYPE_CHECKING:
    from sat_lora.training.runs.listing import RunState

HEADINGS = ("run", "state", "step", "loss", "best valid (step)", "exact match", "size", "changed")


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    command = commands.add_parser(
        "runs",
        help="list runs with their state, best validation loss and size",
        **examples("sat-lora runs", "sat-lora runs /data/runs --json"),
    )
    command.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="of the runs (default: runs)")
    command.add_argument("--json", action="store_true", help="everything, for programs")
    command.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> None:
    """Print the runs. Raises a SatLoraError for a user's mistake."""
    from sat_lora.errors import ConfigError
    from sat_lora.files.foreign import os_problem
    from sat_lora.printable import printable
    from sat_lora.training.runs.listing import as_json, runs_in

    root = Path(options.folder)
    try:
        runs = runs_in(root)
    except OSError as error:
        raise ConfigError(f"{os_problem(error)}; give the folder that --save of the runs named") from error
    if options.json:
        print(as_json(runs))
    elif runs:
        print(table_of(runs, root))
    else:
        print(f"no runs in {printable(root)}")


def table_of(runs: "list[RunState]", root: Path) -> str:
    """Return the runs as a table of text, the one that changed last at the end."""
    from sat_lora.printable import printable

    rows = [HEADINGS]
    for state in runs:
        name = printable(Path(state.folder).relative_to(root))
        best = "" if state.valid_loss is None else f"{state.valid_loss:.4f} ({state.best_step})"
        rows.append(
            (
                printable(root) if name == "." else name,
                state.state,
                "" if state.step is None else f"{state.step}/{'?' if state.steps is None else state.steps}",
                "" if state.loss is None else f"{state.loss:.4f}",
                best,
                "" if state.exact_match is None else f"{100 * state.exact_match:.1f} %",
                size_text(state.size),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(state.changed)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)

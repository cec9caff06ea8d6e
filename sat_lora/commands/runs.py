"""`sat-lora runs`: the runs in a folder, with their state, best validation, evaluation and size."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sat_lora.commands.parts import examples, size_text

if TYPE_CHECKING:
    from sat_lora.training.runs.listing import RunState

HEADINGS = ("run", "state", "step", "loss", "best valid (step)", "evaluation", "size", "changed")


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    command = commands.add_parser(
        "runs",
        help="list runs with their state, best validation, evaluation and size",
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
        rows.append(
            (
                printable(root) if name == "." else name,
                state.state,
                "" if state.step is None else f"{state.step}/{'?' if state.steps is None else state.steps}",
                "" if state.loss is None else f"{state.loss:.4f}",
                _best(state),
                _score(state),
                size_text(state.size),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(state.changed)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def _best(state: "RunState") -> str:
    """Return what `best` goes by, unless that is the loss, with its value and step."""
    from sat_lora.training.metrics.registry import LOSS

    if state.best_value is None:
        return ""
    name = "" if state.metric == LOSS else f"{_short(state.metric)} "
    return f"{name}{state.best_value:.4f} ({state.best_step})"


def _score(state: "RunState") -> str:
    """Return the first metric of the evaluation, in percent where it is a share."""
    from sat_lora.training.metrics.generated import GENERATED

    if state.score is None or state.score_metric is None:
        return ""
    known = GENERATED.get(state.score_metric)
    value = f"{100 * state.score:.1f} %" if known is not None and known.is_share else f"{state.score:.3f}"
    return f"{_short(state.score_metric)} {value}"


def _short(metric: str) -> str:
    """Return a metric's name, of the user's code the function's."""
    from sat_lora.printable import printable

    return printable(metric.rpartition(":")[2])

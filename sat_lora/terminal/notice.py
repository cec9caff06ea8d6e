"""Warnings that every rank finds and only the first one says, and faults that end nothing but what they happened to."""

import logging
import os
import traceback
from collections.abc import Mapping

from sat_lora.printable import printable_lines
from sat_lora.terminal.edge import is_first_rank

logger = logging.getLogger("sat_lora")


def warn(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Log a warning on rank 0, its control characters escaped; the others, which found the same, are silent."""
    if is_first_rank(environ):
        logger.warning("%s", printable_lines(message))


def log_fault(what: str, error: BaseException) -> None:
    """Log an error that nobody thought of with where it was raised, its control characters escaped. what: had it."""
    trace = "".join(traceback.format_exception(error))
    logger.error("%s", printable_lines(f"{what} ended in an error of the program:\n{trace.rstrip()}"))

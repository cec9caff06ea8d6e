"""Warnings that every rank finds and only the first one says."""

import logging
import os
from collections.abc import Mapping

from sat_lora.printable import printable_lines
from sat_lora.terminal.edge import is_first_rank

logger = logging.getLogger("sat_lora")


def warn(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Log a warning on rank 0, its control characters escaped; the others, which found the same, are silent."""
    if is_first_rank(environ):
        logger.warning("%s", printable_lines(message))

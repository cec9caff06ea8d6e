"""Warnings that every rank finds and only the first one says."""

import logging
import os
from collections.abc import Mapping

logger = logging.getLogger("sat_lora")


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is rank 0, by the RANK that `deepspeed` and `torchrun` set; known before any process group."""
    return environ.get("RANK", "0").strip() in ("", "0")


def warn(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Log a warning on rank 0; silence on the others, which found the same."""
    if is_first_rank(environ):
        logger.warning(message)

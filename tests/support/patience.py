"""How long tests wait for something: what a quiet machine needs several times over, and more on a busy one.

SAT_LORA_TEST_PATIENCE multiplies each limit, pytest's own among them; `make test-matrix` sets it.
"""

import os

PATIENCE = float(os.environ.get("SAT_LORA_TEST_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """A limit in seconds on this machine, from the one of a quiet machine."""
    return seconds * PATIENCE

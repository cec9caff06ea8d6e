import os

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def single_process_group():
    """A process group of one, with SAT's model-parallel groups in it."""
    from sat_lora.training.distributed import arrange, join

    return arrange(join())

"""The adapter that the tests of this folder spoil, and the model that has to survive it."""

import pytest

from tests.support.adapter_folders import write_tiny_adapter
from tests.support.tiny import tiny_model


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, single_process_group):
    return write_tiny_adapter(tmp_path_factory.mktemp("pristine") / "adapter")


@pytest.fixture(scope="module")
def fresh(single_process_group):
    return tiny_model()

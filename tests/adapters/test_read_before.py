"""What reads adapters, under the names that it had before it was a module of its own."""

import importlib
import sys

import pytest

from sat_lora.adapters import read


def test_reading_is_found_where_it_was(monkeypatch):
    monkeypatch.delitem(sys.modules, "sat_lora.adapter_format", raising=False)
    with pytest.deprecated_call():
        before = importlib.import_module("sat_lora.adapter_format")
    assert before.read_adapter is read.read_adapter and before.base_of_adapter is read.base_of_adapter
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        before.nothing  # noqa: B018

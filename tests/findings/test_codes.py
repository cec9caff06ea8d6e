"""docs/doctor.md has an entry for every code, and names tests that exist."""

import ast
import re

import pytest

from sat_lora.findings.codes import CODES
from tests.support.paths import ROOT

PARTS = ["Symptom", "Cause", "Fix", "Test"]


def read_entries():
    """{code: {part: text}} in the order of the page."""
    entries = {}
    for block in (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        code, _, body = block.partition("\n")
        parts = re.findall(r"^- \*\*(\w+)\*\*: ?(.*(?:\n  .*)*)", body, re.MULTILINE)
        entries[code.strip()] = [(name, " ".join(text.split())) for name, text in parts]
    return entries


ENTRIES = read_entries()


def test_every_code_has_its_heading_and_no_other_is_there():
    assert [*ENTRIES] == [*CODES]


@pytest.mark.parametrize("code", CODES)
def test_an_entry_has_four_paragraphs(code):
    assert [name for name, _ in ENTRIES[code]] == PARTS
    assert [name for name, text in ENTRIES[code] if not text] == []


@pytest.mark.parametrize("code", CODES)
def test_the_tests_that_an_entry_names_exist(code):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", dict(ENTRIES[code])["Test"])
    assert named
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{function}"
        assert code in (ROOT / path).read_text(encoding="utf-8")

"""YAML as values: the types of YAML 1.2, and no alias, tag, repeated key or depth."""

import math

import pytest

from sat_lora.files.yaml_text import WHOLE_DIGITS, parse_yaml


@pytest.mark.parametrize(
    "text, value",
    [
        ("a: 1\nb: [x, 2]\nc: {d: {e: -3}}", {"a": 1, "b": ["x", 2], "c": {"d": {"e": -3}}}),
        ("[1e-4, 3., .5, +2.5E2]", [1e-4, 3.0, 0.5, 250.0]),
        ("[.inf, -.INF, +.Inf]", [math.inf, -math.inf, math.inf]),
        ("[true, False, no, on, 2024-01-01, 0x1F, 1_000, 1:30]",
         [True, False, "no", "on", "2024-01-01", "0x1F", "1_000", "1:30"]),
        ("[~, null, '', '1']", [None, None, "", "1"]),
        ("1: one\ntrue: yes", {"1": "one", "true": "yes"}),  # keys are names, as in JSON
        ("", None),
        ("007", 7),
        ("1" * (WHOLE_DIGITS - 1), int("1" * (WHOLE_DIGITS - 1))),
        ("1" * WHOLE_DIGITS, "1" * WHOLE_DIGITS),
    ],
)  # fmt: skip
def test_a_text_has_the_values_of_yaml_1_2(text, value):
    read = parse_yaml(text)
    assert read == value and repr(read) == repr(value)  # True is 1, and 3.0 is 3


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_what_is_no_number_is_a_number_too(text):
    assert math.isnan(parse_yaml(text))


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: &x 1\nb: *x", "line 2: aliases (*name) are not read here; write the value again"),
        ("a: 1\nb: !!python/name:x", "line 2: tags are not read here, got tag:yaml.org,2002:python/name:x"),
        ("!!str 5", "line 1: tags are not read here, got tag:yaml.org,2002:str"),
        ("a: 1\n[b]: 2", "line 2: a key is no name"),
        ("a: 1\nb: 2\na: 3", "'a' stands twice in one place; keep one of them"),
        ("a: {b: 1, b: 1}", "'b' stands twice in one place; keep one of them"),
        ("a:\n\tb: 1", "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: [1, 2\nb: 3", "line 2, column 2: expected ',' or ']', but got ':'"),
        (
            "a: \x00",
            'unacceptable character #x0000: special characters are not allowed in "<unicode string>", position 3',
        ),
        ("[" * 5000, "it is nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_told_with_its_place(text, said):
    with pytest.raises(ValueError) as error:
        parse_yaml(text)
    assert str(error.value) == said

"""Files and names of others: read within limits, shown without harm."""

import json
import os
import time

import pytest

from sat_lora.files.foreign import DEPTH_LIMIT, parse_json, read_bytes, read_json
from sat_lora.printable import printable, printable_lines


@pytest.mark.parametrize(
    "name, shown",
    [("cat 猫 é.png", "cat 猫 é.png"), ("a\x1b]0;owned\x07b", r"a\x1b]0;owned\x07b"), ("a\nerror: b", r"a\nerror: b"),
     ("a\u2028b\u0085c", r"a\u2028b\x85c"), ("\u202egnp", r"\u202egnp"), ("caf\udce9", r"caf\udce9")],
)  # fmt: skip
def test_a_name_is_shown_on_one_line_without_what_a_terminal_obeys(name, shown):
    assert printable(name) == shown
    assert printable(name).encode("utf-8")


def test_of_a_message_the_line_feeds_stay():
    assert printable_lines("one\ntwo\x1b[2J\rthree") == "one\ntwo\\x1b[2J\\rthree"


def test_only_regular_files_are_read_and_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    started = time.monotonic()
    with pytest.raises(OSError, match="a pipe, no file"):
        read_bytes(tmp_path / "pipe", 10)
    with pytest.raises(OSError, match="a device, no file"):
        read_bytes("/dev/zero", 10)
    with pytest.raises(OSError):
        read_bytes(tmp_path, 10)
    assert time.monotonic() - started < 1


def test_of_a_file_no_more_is_read_than_the_limit(tmp_path):
    (tmp_path / "ten").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "ten", 10) == b"0123456789"
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(ValueError, match="larger than"):
        read_bytes(tmp_path / "sparse", 1 << 20)


@pytest.mark.parametrize("opened, closed", [("[", "]"), ('{"a":', "}")])
def test_json_is_read_to_a_depth(opened, closed):
    def nested(depth):
        return opened * depth + "1" + closed * depth

    assert parse_json(nested(DEPTH_LIMIT)) == json.loads(nested(DEPTH_LIMIT))
    for depth in (DEPTH_LIMIT + 1, 500, 100_000):
        with pytest.raises(ValueError, match="nested deeper"):
            parse_json(nested(depth))


def test_json_with_a_byte_order_mark_is_json_and_other_encodings_are_not(tmp_path):
    (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "marked.json") == {"a": 1} == parse_json('\ufeff{"a": 1}')
    with pytest.raises(ValueError):
        parse_json('{"a": 1}'.encode("utf-16"))

"""Files and names of others: read within limits, shown without harm."""

import errno
import json
import os
import time

import pytest

from sat_lora.files.foreign import (
    BEGINNING,
    DEPTH_LIMIT,
    LFS_POINTER,
    kind_of,
    name_problem,
    open_file,
    os_problem,
    parse_json,
    parse_json_at,
    read_bytes,
    read_json,
    stand_in,
)
from sat_lora.printable import printable, printable_lines
from tests.support.patience import patient


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
    assert time.monotonic() - started < patient(1)


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    """To open a device may do something."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "open", lambda *args: pytest.fail("it was opened"))
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match="no file"):
            open_file(path, 10)


def test_a_file_that_becomes_a_pipe_before_it_is_opened_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    status = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda path: status)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="a pipe, no file") as error:
        open_file(tmp_path / "pipe", 10)
    assert len(os.listdir("/proc/self/fd")) == open_files and error.traceback


def test_a_file_that_is_too_large_is_not_opened_for_a_reader(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    with pytest.raises(ValueError, match=r"^larger than 2 MiB$"):
        open_file(tmp_path / "file", 2 << 20)
    with open_file(tmp_path / "file", 3 << 20) as file:
        assert len(file.read()) == 3 << 20


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


def test_json_within_a_text_is_read_to_its_end():
    assert parse_json_at('x = {"a": [1]};', 4) == ({"a": [1]}, 14)
    assert parse_json_at('{"a": 1, "a": 2}', 0, object_pairs_hook=list) == ([("a", 1), ("a", 2)], 16)
    for text in ("[" * (DEPTH_LIMIT + 1) + "]" * (DEPTH_LIMIT + 1), "[" * 100_000):
        with pytest.raises(ValueError, match="nested deeper"):
            parse_json_at(text, 0)


def test_a_pointer_of_git_lfs_is_no_json_and_says_what_to_do():
    with pytest.raises(ValueError, match="git lfs pull"):
        parse_json(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def test_json_with_a_byte_order_mark_is_json_and_other_encodings_are_not(tmp_path):
    (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "marked.json") == {"a": 1} == parse_json('\ufeff{"a": 1}')
    with pytest.raises(ValueError):
        parse_json('{"a": 1}'.encode("utf-16"))
    with pytest.raises(ValueError, match="a second byte-order mark"):
        parse_json('\ufeff\ufeff{"a": 1}')


@pytest.mark.parametrize("inner", ["[]", '"[[[["', '{"a": [{}]}'])
def test_depth_is_counted_of_what_is_nested_and_not_of_brackets(inner):
    """A text of few brackets is not looked through, and one of many is, for nothing."""
    levels = 1 if inner == "[]" else 0 if inner[0] == '"' else 3
    deepest = DEPTH_LIMIT - levels
    assert parse_json("[" * deepest + inner + "]" * deepest)
    assert len(parse_json(f"[{','.join([inner] * 200)}]")) == 200
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json("[" * (deepest + 1) + inner + "]" * (deepest + 1))


def test_a_file_that_tells_no_size_is_read_to_the_limit(tmp_path):
    """As those of /proc are."""
    content = read_bytes("/proc/self/status", 1 << 20)
    assert content.startswith(b"Name:")
    with pytest.raises(ValueError, match=r"^larger than 9.53674e-06 MiB$"):
        read_bytes("/proc/self/status", 10)


def test_a_name_that_weights_cannot_have_is_told():
    assert name_problem("/weights/\u732b.safetensors") is None
    assert name_problem("/weights/caf\udce9.safetensors").startswith("its name is no UTF-8")


@pytest.mark.parametrize(
    "error, words",
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "a\nb"),
            r"a\nb: Permission denied; give the user who runs",
        ),
        (OSError(errno.EPERM, "Operation not permitted", b"x"), "x: Operation not permitted; give the user who runs"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device; make room on that disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "x: Disk quota exceeded; make room within the quota"),
        (
            OSError(errno.EROFS, "Read-only file system", "x"),
            "x: Read-only file system; choose a folder on a disk that",
        ),
        (OSError(errno.EIO, "Input/output error", "x"), "x: Input/output error"),
        (OSError(errno.EIO, None, "x"), "x: OSError"),
    ],
)
def test_an_error_of_the_system_is_one_line_with_what_to_do(error, words):
    line = os_problem(error)
    assert line.startswith(words) and "\n" not in line
    assert (line == words) == (error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", LFS_POINTER),
        (b"\xef\xbb\xbf\r\nversion https://hawser.github.com/spec/v1", LFS_POINTER),
        (b"", "it is empty; if its download"),
        (b"<!DOCTYPE html><p>", "it is a web page"),
        (b" \n<HTML>", "it is a web page"),
        (b"<head>", "it is a web page"),
        (b"Forbidden\xff", "it holds a server's answer, 'Forbidden\ufffd'"),
        (b"Entry not found\nmore", "it holds a server's answer, 'Entry not found', and not the file"),
        (
            b"Access to model x is restricted" + b"." * 100,
            "it holds a server's answer, 'Access to model x is restricted",
        ),
        (b"\0" * 5000, "it begins with zeros"),
        (b"PK\x03\x04content", "it is a zip archive; unpack it"),
        (b"\x1f\x8bcontent", "it is a gzip archive; unpack it"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_told(tmp_path, content, words):
    (tmp_path / "file").write_bytes(content)
    told = stand_in(tmp_path / "file")
    assert told.startswith(words) and len(told) < 200


def test_a_download_that_did_not_end_has_its_own_file_beside_it(tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    assert stand_in(tmp_path / "file") is None
    (tmp_path / "file.part").touch()
    assert stand_in(tmp_path / "file").startswith("file.part lies beside it, so its download did not end")


def test_a_file_that_may_be_what_it_is_stands_for_nothing(tmp_path):
    """A long text may begin like a server's answer, and torch's files are zip archives."""
    (tmp_path / "file").write_bytes(b"not found".ljust(BEGINNING, b"."))
    assert stand_in(tmp_path / "file") is None
    (tmp_path / "file").write_bytes(b"not found".ljust(BEGINNING - 1, b"."))
    assert stand_in(tmp_path / "file") is not None
    (tmp_path / "file").write_bytes(b"PK\x03\x04content")
    assert stand_in(tmp_path / "file", archive=True) is None
    (tmp_path / "file").write_bytes(b"\x1f\x8bcontent")
    assert stand_in(tmp_path / "file", archive=True) is not None


def test_what_is_no_file_or_cannot_be_read_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert stand_in(tmp_path / "pipe") == "it is a pipe, no file"
    assert stand_in(tmp_path / "nothing") == "it cannot be read: No such file or directory"
    assert kind_of(os.stat(tmp_path).st_mode) == "a folder" and kind_of(0) == "something else"

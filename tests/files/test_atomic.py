"""Replacing a folder: the old one or the new one, never a mixture."""

import ctypes
import os
import sys

import pytest

from sat_lora.files import atomic
from sat_lora.files.atomic import replace_text, replaced_folder


def write(target, text):
    with replaced_folder(target) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "b").write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request, monkeypatch):
    """With Linux's renameat2, and as on a file system or a machine without it."""
    if request.param == "two renames":
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    return request.param


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """In their order, ("sync", path) for each fsync, and ("rename", path) for what appears, relative to tmp_path. A
    file that is synced has its content by then.
    """
    calls = []
    fsync = os.fsync

    def note_sync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(("sync", os.path.relpath(path, tmp_path)))
        assert os.path.isdir(path) or os.path.getsize(path) > 0
        fsync(descriptor)

    def noting(rename):
        def note_rename(source, target):
            calls.append(("rename", os.path.relpath(target, tmp_path)))
            rename(source, target)

        return note_rename

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", noting(os.replace))
    monkeypatch.setattr(type(tmp_path), "rename", noting(type(tmp_path).rename))
    return calls


def test_what_is_renamed_is_on_the_disk_before_and_its_name_afterwards(tmp_path, calls):
    open_files = len(os.listdir("/proc/self/fd"))
    with replaced_folder(tmp_path / "x") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("1")
    assert len(os.listdir("/proc/self/fd")) == open_files
    draft = temporary.name
    *before, rename, after = calls
    assert sorted(before) == [("sync", draft), ("sync", f"{draft}/deep"), ("sync", f"{draft}/deep/a")]
    assert (rename, after) == (("rename", "x"), ("sync", "."))


def test_what_takes_the_place_of_a_folder_is_on_the_disk_before(tmp_path, calls, monkeypatch):
    write(tmp_path / "x", "1")
    calls.clear()
    exchange = atomic._exchange

    def note_exchange(new, old):
        calls.append(("exchange", old.name))
        exchange(new, old)

    monkeypatch.setattr(atomic, "_exchange", note_exchange)
    write(tmp_path / "x", "2")
    draft = f".x.tmp-{os.getpid()}"
    *before, swap, after = calls
    assert sorted(before) == [("sync", draft), ("sync", f"{draft}/a"), ("sync", f"{draft}/b")]
    assert (swap, after) == (("exchange", "x"), ("sync", "."))


def test_a_text_is_on_the_disk_before_it_is_renamed_and_its_name_afterwards(tmp_path, calls):
    replace_text(tmp_path / "latest", "400\n")
    assert calls == [("sync", f".latest.tmp-{os.getpid()}"), ("rename", "latest"), ("sync", ".")]
    assert contents(tmp_path) == {"latest": "400\n"}


def test_a_new_folder_appears_with_its_parents(tmp_path):
    write(tmp_path / "deep" / "er" / "x", "1")
    assert contents(tmp_path / "deep" / "er" / "x") == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path / "deep" / "er") == ["x"]


def test_an_existing_folder_is_replaced_whole(tmp_path, exchange):
    target = tmp_path / "x"
    write(target, "1")
    (target / "of the old one").touch()
    write(target, "2")
    assert contents(target) == {"a": "2", "b": "2"}
    assert os.listdir(tmp_path) == ["x"]


def test_nothing_is_seen_at_the_target_before_the_end(tmp_path, exchange):
    with replaced_folder(tmp_path / "x") as temporary:
        assert not (tmp_path / "x").exists() and temporary.parent == tmp_path
    with replaced_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("2")
        assert contents(tmp_path / "x") == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder_and_no_other(tmp_path, error, exchange):
    write(tmp_path / "x", "1")
    with pytest.raises(error), replaced_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("2")
        raise error
    assert contents(tmp_path / "x") == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path) == ["x"]


def test_leftovers_of_a_dead_writer_are_removed_and_neighbours_are_not(tmp_path):
    for name in (".x[1].tmp-99", ".x[1].tmp-old-99", ".x1.tmp-99", ".y.tmp-99", "x[1].tmp-99"):
        (tmp_path / name / "sub").mkdir(parents=True)
    write(tmp_path / "x[1]", "1")
    assert set(os.listdir(tmp_path)) == {"x[1]", ".x1.tmp-99", ".y.tmp-99", "x[1].tmp-99"}
    assert contents(tmp_path / "x[1]") == {"a": "1", "b": "1"}


def test_a_writer_that_died_between_two_renames_costs_nothing(tmp_path):
    write(tmp_path / ".x.tmp-old-99", "1")
    with pytest.raises(ValueError), replaced_folder(tmp_path / "x"):
        raise ValueError
    assert contents(tmp_path / "x") == {"a": "1", "b": "1"}


def test_a_second_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "x", "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    rename = type(tmp_path).rename
    beside = []

    def fails_for_the_new_one(self, target):
        if self.name == f".x.tmp-{os.getpid()}":
            beside.extend(os.listdir(tmp_path))
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fails_for_the_new_one)
    with pytest.raises(PermissionError):
        write(tmp_path / "x", "2")
    assert contents(tmp_path / "x") == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path) == ["x"]
    # Where the next writer finds the old one, if this one dies here.
    assert sorted(beside) == [f".x.tmp-{os.getpid()}", f".x.tmp-old-{os.getpid()}"]


def test_a_link_stays_a_link(tmp_path):
    write(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"a": "2", "b": "2"}
    assert set(os.listdir(tmp_path)) == {"real", "link"}


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(NotADirectoryError, match="x"):
        write(tmp_path / "x", "1")
    assert (tmp_path / "x").read_text() == "mine" and os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a call of Linux")
def test_where_linux_can_exchange_there_is_no_moment_without_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "x", "1")

    def rename(self, target):
        raise AssertionError(f"{self} was moved: readers would find nothing for a moment")

    monkeypatch.setattr(type(tmp_path), "rename", rename)
    write(tmp_path / "x", "2")
    assert contents(tmp_path / "x") == {"a": "2", "b": "2"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_text_that_cannot_be_renamed_leaves_the_old_one_and_no_draft(tmp_path, monkeypatch, error):
    replace_text(tmp_path / "latest", "400\n")

    def fail(*args):
        raise error

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(os, name, fail)
            replace_text(tmp_path / "latest", "500\n")
        assert contents(tmp_path) == {"latest": "400\n"}


def test_where_no_draft_can_be_made_the_error_is_that(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr("builtins.open", refuse)
        replace_text(tmp_path / "latest", "500\n")


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a call of Linux")
def test_an_exchange_that_is_not_allowed_is_an_error_and_moves_nothing(tmp_path, monkeypatch):
    """A file system that has no exchange goes on with two renames; a folder that may not be moved does not."""
    write(tmp_path / "x", "1")
    monkeypatch.setattr(ctypes, "get_errno", lambda: 13)
    monkeypatch.setattr(atomic, "_RENAME_EXCHANGE", 1 << 20)
    monkeypatch.setattr(type(tmp_path), "rename", lambda *args: pytest.fail("it was moved"))
    with pytest.raises(PermissionError, match="x"):
        write(tmp_path / "x", "2")
    assert contents(tmp_path / "x") == {"a": "1", "b": "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a call of Linux")
@pytest.mark.parametrize("number", [None, 38, 95])
def test_where_the_file_system_has_no_exchange_two_renames_do(tmp_path, monkeypatch, number):
    """None: the number that Linux gives for a wish that it does not know."""
    write(tmp_path / "x", "1")
    if number is not None:
        monkeypatch.setattr(ctypes, "get_errno", lambda: number)
    monkeypatch.setattr(atomic, "_RENAME_EXCHANGE", 1 << 20)
    write(tmp_path / "x", "2")
    assert contents(tmp_path / "x") == {"a": "2", "b": "2"} and os.listdir(tmp_path) == ["x"]

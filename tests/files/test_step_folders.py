"""Folders of steps and the pointers to them."""

import os
import shutil

import pytest

from sat_lora.adapters.read import read_adapter
from sat_lora.errors import AdapterError
from sat_lora.files.step_folders import (
    BEST,
    LATEST,
    follow,
    point_to,
    prune,
    read_pointer,
    remove_all,
    set_back,
    steps_in,
)


@pytest.fixture
def root(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / str(step)).mkdir()
    point_to(tmp_path, LATEST, 10)
    point_to(tmp_path, BEST, 4)
    return tmp_path


def test_a_root_and_a_pointer_mean_the_step_they_name(root):
    assert follow(root) == root / "10"
    assert follow(root / BEST) == root / "4"
    assert follow(root / "6") == root / "6"
    assert follow(root / "nowhere") == root / "nowhere"


def test_a_pointer_to_what_is_not_there_names_nothing(root):
    (root / LATEST).write_text("12\n")
    assert read_pointer(root / LATEST) is None
    (root / LATEST).write_bytes(b"\xff")
    assert read_pointer(root / LATEST) is None
    assert read_pointer(root / "other") is None


def test_a_pointer_is_a_short_text_of_one_step(root, tmp_path):
    for content in (b"010", b"4" * 300, "\u0664".encode(), b"../4", b"-4", b"4 6", b"", bytes(100)):
        (root / LATEST).write_bytes(content)
        assert read_pointer(root / LATEST) is None, content
    (root / LATEST).write_bytes(b" 4\r\n")
    assert read_pointer(root / LATEST) == 4


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_pointer_that_is_no_file_is_never_waited_for(root, make):
    (root / LATEST).unlink()
    make(root / LATEST)
    assert read_pointer(root / LATEST) is None
    assert follow(root) == root


def test_a_folder_that_only_looks_like_a_step_is_none(root):
    for name in ("012", "1\u0662", "12.5", "12a"):
        (root / name).mkdir()
    assert steps_in(root) == [2, 4, 6, 8, 10]
    prune(root, newest=10, keep=1)
    assert {"012", "1\u0662"} <= set(os.listdir(root))


def test_the_newest_and_those_pointed_to_are_kept(root):
    prune(root, newest=10, keep=2)
    assert steps_in(root) == [4, 8, 10]
    prune(root, newest=10, keep=0)
    assert steps_in(root) == [4, 8, 10]
    prune(root, newest=10, keep=1, also={8, None})
    assert steps_in(root) == [4, 8, 10]


def test_later_steps_are_of_a_run_that_was_cut_and_go_with_the_next_save(root):
    point_to(root, LATEST, 6)
    prune(root, newest=6, keep=2)
    assert steps_in(root) == [4, 6]


def test_leftovers_of_a_dead_writer_are_no_steps_and_go_with_the_next_save(root):
    (root / ".12.tmp-99").mkdir()
    (root / ".latest.tmp-99").touch()
    assert steps_in(root) == [2, 4, 6, 8, 10]
    prune(root, newest=10, keep=5)
    assert not list(root.glob(".*"))


def test_a_link_to_a_step_goes_and_what_it_names_stays(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").touch()
    (root / "3").symlink_to(elsewhere)
    prune(root, newest=10, keep=1)
    assert steps_in(root) == [4, 10] and (elsewhere / "file").exists()


def test_pointers_go_back_to_where_a_run_goes_on_and_no_folder_goes(root):
    set_back(root, 6, 4)
    assert steps_in(root) == [2, 4, 6, 8, 10]
    assert (read_pointer(root / LATEST), read_pointer(root / BEST)) == (6, 4)
    set_back(root, 7, 6)
    assert (read_pointer(root / LATEST), read_pointer(root / BEST)) == (6, 6)
    set_back(root, 3, None)
    assert (read_pointer(root / LATEST), read_pointer(root / BEST)) == (2, None)
    set_back(root, 1, None)
    assert read_pointer(root / LATEST) == 2  # rather an adapter of later on than none
    set_back(root / "nowhere", 1, None)


def test_all_that_is_a_runs_own_is_removed_and_nothing_else(root):
    (root / ".12.tmp-99").mkdir()
    (root / "notes.txt").touch()
    remove_all(root)
    assert os.listdir(root) == ["notes.txt"]
    (root / "notes.txt").unlink()
    remove_all(root)
    assert not root.exists()


def test_a_best_step_of_later_on_is_named_no_more(root):
    set_back(root, 6, 8)
    assert not (root / BEST).exists() and read_pointer(root / LATEST) == 6


def test_a_pointer_that_says_what_holds_is_not_written_anew(root):
    before = (root / BEST).stat().st_ino, (root / LATEST).stat().st_ino
    set_back(root, 10, 4)
    assert ((root / BEST).stat().st_ino, (root / LATEST).stat().st_ino) == before


def test_a_folder_has_another_name_before_anything_in_it_goes(root, monkeypatch):
    removed = []
    rmtree = shutil.rmtree

    def note(folder, *args, **kwargs):
        removed.append(folder.name)
        rmtree(folder, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", note)
    prune(root, newest=10, keep=2)
    assert removed == [f".{step}.tmp-gone-{os.getpid()}" for step in (2, 6)]


def test_the_first_steps_are_removed_with_the_others(tmp_path):
    root = tmp_path / "root"
    for step in (0, 1, 2):
        (root / str(step)).mkdir(parents=True)
    remove_all(root)
    assert not root.exists()


def test_an_adapter_is_read_by_pointer(root):
    with pytest.raises(AdapterError, match=f"{root / '4'} is not an adapter folder"):
        read_adapter(root / BEST)

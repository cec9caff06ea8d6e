"""Folders of steps and the pointers to them."""

import pytest

from sat_lora.adapter_format import read_adapter
from sat_lora.errors import AdapterError
from sat_lora.step_folders import BEST, LATEST, drop_beyond, follow, keep_newest, point_to, read_pointer, steps_in


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


def test_the_newest_and_those_pointed_to_are_kept(root):
    keep_newest(root, 2)
    assert steps_in(root) == [4, 8, 10]
    keep_newest(root, 0)
    assert steps_in(root) == [4, 8, 10]


def test_leftovers_of_a_dead_writer_are_no_steps_and_go_with_the_next_save(root):
    (root / ".12.tmp-99").mkdir()
    (root / ".latest.tmp-99").touch()
    assert steps_in(root) == [2, 4, 6, 8, 10]
    keep_newest(root, 5)
    assert not list(root.glob(".*"))


def test_later_steps_are_dropped_and_the_pointers_follow(root):
    drop_beyond(root, 6)
    assert steps_in(root) == [2, 4, 6]
    assert (read_pointer(root / LATEST), read_pointer(root / BEST)) == (6, 4)
    drop_beyond(root, 2)
    assert (read_pointer(root / LATEST), read_pointer(root / BEST)) == (2, None)
    drop_beyond(root, 0)
    assert not list(root.iterdir())
    drop_beyond(root / "nowhere", 0)


def test_an_adapter_is_read_by_pointer(root):
    with pytest.raises(AdapterError, match=f"{root / '4'} is not an adapter folder"):
        read_adapter(root / BEST)

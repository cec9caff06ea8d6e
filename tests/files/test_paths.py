"""What a path that leads nowhere may have been meant for."""

import os
from pathlib import Path

import pytest

from sat_lora.files import paths
from sat_lora.files.paths import is_shard, missing_adapter, missing_base, missing_path, names_in, nearest

LONG = "give the folder"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory: data/train/x.json, data/valid, a file `notes`."""
    paths._names_of.cache_clear()
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "valid").mkdir()
    (tmp_path / "data" / "train" / "x.json").touch()
    (tmp_path / "notes").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_there_has_nothing_wrong_and_so_what_cannot_be_seen(here):
    assert missing_path("data/train", LONG) is None
    assert missing_path("notes", LONG) is None
    (here / "loop").symlink_to("loop")
    assert missing_path("loop/x", LONG) is None  # too many links: who reads it says so


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_an_empty_name_may_be_a_variable_that_is_not_set(here, text):
    assert missing_path(text, LONG) == f"got {text!r}, an empty name; a variable of the shell may not be set; {LONG}"


def test_a_link_to_nothing_is_to_be_mended(here):
    (here / "link").symlink_to("gone")
    assert missing_path("link", LONG) == "link is a link to gone, which is not there; mend the link"


@pytest.mark.parametrize(
    "text, meant",
    [
        ("data/trian", "; did you mean 'train'?"),
        ("data/Train", "; its folder has 'train'"),
        ("data/train%20", "; its folder has 'train'"),
        ("data/elsewhere", ""),
        ("a\0b", ""),
        ("notes/x", "; notes is no folder"),
        ("dta/train", "; there is no folder dta, did you mean 'data/train'?"),
        ("dta/trian/x.json", "; there is no folder dta, did you mean 'data/train/x.json'?"),
        ("dta/elsewhere/x.json", "; there is no folder dta, did you mean 'data'?"),
        ("note/x", "; there is no folder note"),
        ("far/off", "; there is no folder far"),
        ("file:///data/train", "; give the path alone, without file://"),
        ("FILE://data", "; give the path alone, without file://"),
        ("https://a.org/data", "; nothing is fetched: download it first"),
        ("s3://bucket/data", "; nothing is fetched: download it first"),
        ("~nobody-here/data", "; the shell has left ~ as it is: give ~nobody-here/data"),
        ("'data/train'", "; its quotes are a part of the name: leave them out"),
        ("“data”", "; its quotes are a part of the name: leave them out"),
        ("'data", "; did you mean 'data'?"),
        ("$HOME/data", "; the shell has left the variable as it is: single quotes keep it from being replaced"),
        ("${X}", "; the shell has left the variable as it is: single quotes keep it from being replaced"),
        ("%USERPROFILE%", "; the shell has left the variable as it is: single quotes keep it from being replaced"),
        ("data/*.json", "; the shell has found nothing for * and ?, or quotes kept them: give the folder itself"),
        ("data/trai?", "; the shell has found nothing for * and ?, or quotes kept them: give the folder itself"),
        ("data/train,data/valid", "; several paths have spaces between them, not commas"),
        ("data/train; data/valid", "; several paths have spaces between them, not semicolons"),
        ("data/train:data/valid", "; several paths have spaces between them, not colons"),
        ("data/train,", "; did you mean 'train'?"),
        ("data/train,elsewhere", ""),
        (r"C:\data", "; it is a path of Windows: under WSL its drive is below /mnt"),
        ("D:/data", "; it is a path of Windows: under WSL its drive is below /mnt"),
        (r"\\server\data", "; it is a path of Windows: under WSL its drive is below /mnt"),
        ("data/train ", "; it begins or ends with a space: leave that out"),
        (" elsewhere", ""),
    ],
)
def test_what_was_meant_is_said(here, text, meant):
    shown = text.replace("\0", r"\x00")
    assert missing_path(text, LONG) == f"{shown} does not exist{meant}; {LONG}"


def test_the_nearest_of_what_is_there_is_nothing(here):
    assert nearest(here / "data") == ""
    assert nearest(here / "data" / "trian") == "; did you mean 'train'?"


def test_a_name_that_is_composed_otherwise_is_the_same(here):
    (here / "caf\u00e9").mkdir()
    assert nearest(here / "cafe\u0301") == "; its folder has 'caf\u00e9'"


def test_the_same_name_comes_before_one_that_is_like_it(here):
    for name in ("xtrain1", "TRAIN1"):
        (here / name).mkdir()
    assert nearest(here / "train1") == "; its folder has 'TRAIN1'"


def test_a_base_that_is_not_there_is_a_name_of_a_hub_or_a_near_one(here):
    assert missing_base("data") is None
    assert "huggingface-cli download THUDM/cogvlm --local-dir cogvlm`" in missing_base("THUDM/cogvlm")
    near = missing_base(here / "dtaa")
    assert near.endswith(f"found: no such folder; did you mean {here / 'data'}?")
    far = missing_base(here / "elsewhere")
    assert far.endswith(f"found: no such folder; give {paths.BASE_WANTED}") and "huggingface" not in far


def test_names_are_sorted_and_of_what_cannot_be_read_there_are_none(here):
    assert names_in(here / "data") == ["train", "valid"]
    assert names_in(here / "elsewhere") == [] == names_in(here / "notes")


@pytest.mark.parametrize("name", ["a/b.tar", "B.TAR", "x.tar.gz", "x.tgz", "x.tar.ZST", "pipe:cat x"])
def test_a_path_of_tar_shards_is_known_by_its_end(name):
    assert is_shard(name)


@pytest.mark.parametrize("name", ["a.tar/b", "tar", "x.gz", "images", "x-pipe:"])
def test_other_paths_are_no_shards(name):
    assert not is_shard(name)


def test_an_adapter_that_is_not_there_is_told_as_any_path(here):
    assert missing_adapter("data") is None
    assert missing_adapter("dat") == f"dat does not exist; did you mean 'data'?; {paths.ADAPTER_WANTED}"


def test_of_a_home_the_path_is_given(here, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of-a-test")
    assert "give /home/of-a-test/x;" in missing_path("~/x", LONG)
    assert not os.path.exists("~")


def test_names_are_remembered_of_a_folder_and_not_of_what_it_is_called(tmp_path, monkeypatch):
    for folder, name in (("first", "images"), ("second", "labels")):
        (tmp_path / folder / name).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        assert nearest(Path(name[:-1])) == f"; did you mean {name!r}?"

"""Kind 8: what git leaves where git LFS did not bring a file is named as that, wherever a file is read."""

import shutil

import pytest

from sat_lora.cogvlm.checkpoints.load import check_files
from sat_lora.data.samples import read_items
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.errors import SatLoraError
from sat_lora.files.foreign import LFS_POINTER, read_json
from sat_lora.training.settings.deepspeed_file import open_deepspeed_file
from sat_lora.training.settings.run_settings import settings_of_run
from sat_lora.training.steps.checkpoint import read_state
from tests.support.paths import TINY_BASE

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    "name, read",
    [
        ("base/latest", lambda folder: check_files(folder / "base")),
        ("base/model_config.json", lambda folder: check_files(folder / "base")),
        ("ds.json", lambda folder: open_deepspeed_file(folder / "ds.json")),
        ("run.json", settings_of_run),
        ("state.json", read_state),
        ("data.jsonl", lambda folder: read_items([folder / "data.jsonl"])),
    ],
)
def test_a_pointer_is_named_wherever_it_lies(tmp_path, name, read):
    shutil.copytree(TINY_BASE, tmp_path / "base")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(SatLoraError, match="(?i)pointer of git lfs"):
        read(tmp_path)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n"])
def test_a_pointer_as_json_or_as_tar_is_one(tmp_path, start):
    (tmp_path / "any.json").write_bytes(start + POINTER)
    with pytest.raises(ValueError, match="pointer of git LFS"):
        read_json(tmp_path / "any.json")
    (tmp_path / "a.tar").write_bytes(start + POINTER)
    (problem,) = problems_with_shards([str(tmp_path / "a.tar")], "--train-data")
    assert LFS_POINTER in problem

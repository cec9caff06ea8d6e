"""Disks that fill up while an adapter is saved: an AdapterError on every rank, and the old adapter as it was.

A limit on the size of a file stands for a full disk: the same writes fail, with EFBIG in place of ENOSPC.
"""

import os
from pathlib import Path

import pytest

from sat_lora import AdapterError, add_lora, load_adapter, save_adapter
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from tests.support.full_disks import largest_file
from tests.support.ranks import run_ranks
from tests.support.tiny import fill_adapters, tiny_model

SIZES = 20


def tiny_lora(**settings):
    model = tiny_model(**settings)
    add_lora(model, r=4, target_modules=["language-attention", "vit-mlp"])
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_on_full_disks(folder: str, model_parallel: int) -> list[str]:
    """The messages of this rank, one per disk size, each below that of a whole file; the old adapter stays."""
    init_model_parallel(init_distributed(), model_parallel)
    model = tiny_lora(model_parallel_size=model_parallel)
    fill_adapters(model, seed=1)
    target = Path(folder) / "adapter"
    save_adapter(model, target)
    old = contents(target)
    fill_adapters(model, seed=2)
    largest = max(map(len, old.values()))
    messages = []
    for step in range(SIZES):
        with largest_file(largest * step // SIZES), pytest.raises(AdapterError) as error:
            save_adapter(model, target)
        messages.append(str(error.value))
        assert contents(target) == old
        assert os.listdir(folder) == ["adapter"]
        load_adapter(model, target)
        fill_adapters(model, seed=2)
    save_adapter(model, target)
    assert contents(target) != old
    return messages


def test_twenty_full_disks_keep_the_old_adapter_and_say_so_on_every_rank(tmp_path):
    first, second = run_ranks(save_on_full_disks, 2, str(tmp_path), 2)
    assert first == second and len(first) == SIZES
    for message in first:
        assert message.startswith(f"{tmp_path}/adapter: the adapter could not be written: ")
        assert "File too large" in message


def test_a_disk_that_is_full_before_there_is_an_adapter_leaves_nothing(tmp_path, single_process_group):
    model = tiny_lora()
    with largest_file(1000), pytest.raises(AdapterError, match="could not be written"):
        save_adapter(model, tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def test_a_folder_of_a_dead_writer_is_never_read(tmp_path, single_process_group):
    """Not even where it is whole: it has no name that anybody asks for, and the next save removes it."""
    model = tiny_lora()
    save_adapter(model, tmp_path / ".adapter.tmp-99")
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(tiny_model(), tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")
    assert os.listdir(tmp_path) == ["adapter"]

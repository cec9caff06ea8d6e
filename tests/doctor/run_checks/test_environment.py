"""The machine: shared memory, disk, and what its ranks do not have in common, each with its fault planted."""

import math
import os
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sat_lora import LoraConfig, add_lora, save_adapter
from sat_lora.cogvlm.checkpoints.load import read_config
from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.doctor.run_checks import environment
from sat_lora.doctor.run_checks.space import disk_findings, shared_memory_findings
from sat_lora.lora.summary import describe
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.prepare import prepare
from tests.support.configs import parse_options
from tests.support.demo_runs import options_for
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(60)


def environment_with_other_versions(arguments):
    """As another machine's rank 1 would be: an older torch, and an edited checkout."""
    options = parse_options(arguments)
    prepared = prepare(options)
    if prepared.world.rank == 1:
        stated = environment.versions
        environment.versions = lambda: {**stated(), "torch": "2.5.0"}
        environment.code_mark = lambda: "0"
    return environment.environment_findings(prepared.config, prepared.world)


def test_ranks_with_other_versions_are_named(captchas, tmp_path):
    for found in run_ranks(environment_with_other_versions, 2, options_for(captchas, tmp_path)):
        assert [(one.code, one.ranks) for one in found] == [("versions", (1,))] * 2
        assert "torch is " in found[0].seen and "2.5.0 on rank 1" in found[0].seen
        assert found[1].seen.startswith("sat_lora's code is ")


# Memory and disk


@contextmanager
def small_disk(path, mebibytes):
    """A file system of that size, mounted at `path`."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "small", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def statvfs_with(free, whole):
    return lambda path: SimpleNamespace(f_frsize=2**20, f_blocks=whole, f_bavail=free)


def test_a_shared_memory_too_small_for_the_workers_is_found(tmp_path):
    with small_disk(tmp_path / "shm", 8) as shm:
        assert shared_memory_findings(2, 2**20, 2, path=shm) == []
        (finding,) = shared_memory_findings(2, 2**20, 4, path=shm)
        (shm / "left_behind").write_bytes(bytes(5 * 2**20))
        (fuller,) = shared_memory_findings(1, 2**20, 2, path=shm)
    assert finding.code == fuller.code == "shared-memory" and "--shm-size 1g" in finding.fix
    words = "8.0 MiB free of 8.0 MiB; 4 ranks x 2 workers x 2 batches of 1.0 MiB take 16.0 MiB"
    assert finding.seen == f"{tmp_path / 'shm'} has {words}"
    assert "3.0 MiB free of 8.0 MiB" in fuller.seen and fuller.fix.startswith("remove what dead processes have left")


def test_a_docker_container_with_its_default_shared_memory_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "statvfs", statvfs_with(free=64, whole=64))
    (finding,) = shared_memory_findings(3, 12 * 2**20, 8)  # 8 GPUs, batches of 4 images of 490 x 490
    assert finding.file == "/dev/shm" and "64.0 MiB free" in finding.seen and "--shm-size 2g" in finding.fix
    assert shared_memory_findings(0, 12 * 2**20, 8) == []


def test_no_shared_memory_at_all_is_found(tmp_path):
    (finding,) = shared_memory_findings(1, 1, 1, path=tmp_path / "nowhere")
    assert finding.code == "shared-memory" and "No such file" in finding.seen


def test_a_full_disk_is_found_before_the_run(tmp_path):
    with small_disk(tmp_path / "disk", 8) as disk:
        run = disk / "runs" / "mine"
        assert disk_findings(run, 2**20, 3, checkpoint_bytes=2**20) == []
        (finding,) = disk_findings(run, 2**20, 4, checkpoint_bytes=2**20)
        assert finding.code == "disk-space" and not run.parent.exists()
        assert finding.seen == (
            f"{disk} has 8.0 MiB free; 6 adapters of 1.0 MiB and three checkpoints of 1.0 MiB take 9.0 MiB"
        )
        assert disk_findings(run, 2**20, 0, saves=7)  # --keep 0 keeps all
        run.mkdir(parents=True)
        (run / "old").write_bytes(bytes(2**20))
        assert disk_findings(run, 2**20, 3, checkpoint_bytes=2**20) == []  # what it holds is replaced


def test_little_space_on_any_disk_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "statvfs", statvfs_with(free=1, whole=100))
    (finding,) = disk_findings(tmp_path / "run", 2**20, 1)
    assert finding.code == "disk-space" and "has 1.0 MiB free; 3 adapters" in finding.seen


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = disk_findings(tmp_path / "file" / "run", 1, 1)
    assert finding.code == "disk-space" and "nothing can be written" in finding.seen
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        try:
            if user == 0:  # whom rights do not bind
                os.seteuid(65534)
            (finding,) = disk_findings(Path(folder) / "run", 1, 1)
        finally:
            os.seteuid(user)
        assert "Permission denied" in finding.seen and finding.option == "--save"


def sizes_told_and_saved(arguments, fields, folder):
    """What the doctor says of the files of a run, and what they take."""
    options = parse_options(arguments)
    init_model_parallel(init_distributed(), options.parallel.model_parallel_size)
    config = LoraConfig(r=4, **fields)
    told = environment.saved_sizes(replace(options, lora=config))
    sizes = read_config(options.model.from_pretrained)
    model = build_cogvlm(sizes, model_parallel_size=options.parallel.model_parallel_size)
    add_lora(model, config)
    save_adapter(model, folder)
    (file,) = [path for path in Path(folder).iterdir() if path.suffix == ".safetensors"]
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return told, (file.stat().st_size - header, describe(model)[-1]["trainable"])


@pytest.mark.parametrize(
    "parts, fields",
    [
        (1, dict(use_dora=True, qkv_slots="qv")),
        (1, dict(init_lora_weights="pissa", freeze_a=True)),
        (2, dict(modules_to_save=("boi", "linear_proj"), bias="lora_only", adapter_dtype="bfloat16")),
    ],
)
def test_the_sizes_of_saves_are_those_of_the_files(parts, fields, captchas, tmp_path):
    arguments = options_for(captchas, tmp_path, "--model-parallel-size", str(parts))
    for told, real in run_ranks(sizes_told_and_saved, parts, arguments, fields, str(tmp_path / "adapter")):
        assert told == real


def test_the_batches_that_workers_hold_are_those_of_the_options(captchas, tmp_path):
    options = parse_options(options_for(captchas, tmp_path, "--batch-size", "3", "--max_length", "40"))
    height, width = read_config(options.model.from_pretrained)["eva_args"]["image_size"]
    assert environment.batch_bytes(options) == 3 * (math.prod((3, height, width, 4)) + 5 * 40 * 8)

"""What a save takes on the disk, known before the base is loaded."""

import math
import os
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.load import read_config
from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.errors import ConfigError
from sat_lora.files.foreign import MEBIBYTE
from sat_lora.lora.apply import find_all_parameters, find_all_sites
from sat_lora.lora.targets import plan
from sat_lora.parallel.sharding import model_parallel_layout, sharding_of
from sat_lora.printable import printable
from sat_lora.training.settings.config import TrainConfig
from sat_lora.training.settings.deepspeed_config import base_dtype

BESIDE = MEBIBYTE // 4  # the JSON files of a save, and those of the run
OPTIMIZER = 12  # bytes of each element that trains: master, mean and variance, in float32


def check_space(config: TrainConfig, *, freed: int = 0) -> None:
    """Raise ConfigError where the disk of the run folder has no room for one adapter and one checkpoint.

    The folder has to be there. freed: bytes that come free before the first save.
    """
    adapter, trained = saved_sizes(config)
    needed = adapter + OPTIMIZER * trained + BESIDE
    try:
        disk = os.statvfs(config.run_folder)
    except OSError:
        return
    free = disk.f_bavail * disk.f_frsize + freed
    if needed > free:
        raise ConfigError(
            f"--save: {printable(config.run_folder)}: the disk has {_mebibytes(free)} free, one save takes "
            f"{_mebibytes(needed)} (adapter {_mebibytes(adapter)}, checkpoint {_mebibytes(OPTIMIZER * trained)}); free "
            "some, or name a folder on another disk"
        )


def size_of(folder: str | Path) -> int:
    """Return the bytes of all files in and below a folder."""
    return sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())


def _mebibytes(count: int) -> str:
    """Return a number of bytes as text in MiB."""
    return f"{count / MEBIBYTE:.1f} MiB"


def saved_sizes(config: TrainConfig) -> tuple[int, int]:
    """Return (bytes of an adapter's tensors in its file, elements that train) of the model, however it is cut."""
    _, mp_size = model_parallel_layout()
    lora = config.lora
    sizes = read_config(config.model.base)
    model = build_cogvlm(sizes, device="meta", model_parallel_size=mp_size, seed=max(1, config.schedule.seed))
    chosen = plan(find_all_sites(model), find_all_parameters(model), lora)
    stored = 0  # elements of the adapter's file
    trained = 0  # elements of A, B and magnitudes that train
    whole = 0  # elements of parameters that train whole
    for target in chosen.targets.values():
        rows = sum(stop - start for start, stop in target.rows)
        a_size = target.slots_count * target.rank * target.site.in_features
        b_size = target.rank * rows
        magnitude = rows if lora.use_dora else 0
        stored += (a_size + b_size) * (2 if lora.takes_from_base else 1) + magnitude
        trained += (0 if lora.freeze_a else a_size) + b_size + magnitude
    for parameter in chosen.trained.values():
        sharding = sharding_of(parameter.module, parameter.leaf)
        whole += math.prod(sharding.full_shape(parameter.tensor.shape, mp_size))
    base = base_dtype(config.precision)
    dtype = getattr(torch, lora.adapter_dtype) if lora.adapter_dtype else base
    return stored * dtype.itemsize + whole * base.itemsize, trained + whole

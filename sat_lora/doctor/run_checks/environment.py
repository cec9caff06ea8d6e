"""The machine that a run would have: its packages, its memory for data workers, its disk, and its network."""

import math
import os

from sat_lora.cogvlm.checkpoints.load import read_config
from sat_lora.doctor.run_checks.collectives import TIMEOUT, collective_findings
from sat_lora.doctor.run_checks.packages import compare_versions, package_findings
from sat_lora.doctor.run_checks.space import disk_findings, shared_memory_findings
from sat_lora.findings.finding import Finding, joined
from sat_lora.parallel.agreement import code_mark
from sat_lora.parallel.distributed import World, gather_lists
from sat_lora.parallel.launch import ranks_on_this_machine
from sat_lora.training.runs.run_folder import versions
from sat_lora.training.runs.space import saved_sizes
from sat_lora.training.settings.config import TrainConfig


def environment_findings(config: TrainConfig, world: World, timeout: float = TIMEOUT) -> list[Finding]:
    """Return what is wrong with the machines, the same on every rank; each has to call it, after `prepare`.

    It is `collective` alone where a group does not work, since everything else would wait for it.
    timeout: seconds, see `collective_findings`.
    """
    broken = collective_findings(timeout)
    if broken:
        return broken
    findings = package_findings()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        # One worker more reads validation data, with its own batches.
        workers = config.data.num_workers + (config.data.num_workers > 0)
        findings += shared_memory_findings(workers, batch_bytes(config), ranks_on_this_machine(world.size))
    if world.is_main:
        adapter, trained = saved_sizes(config)
        # --save-interval 0 saves once, at the end. Of each element master, mean and variance, in float32.
        saving = config.saving
        saves = math.ceil((config.schedule.train_iters or 1) / saving.save_interval) if saving.save_interval else 1
        findings += disk_findings(config.run_folder, adapter, saving.keep, checkpoint_bytes=12 * trained, saves=saves)
    rank_versions = {**versions(), "sat_lora's code": code_mark()}
    return [*joined(gather_lists([findings])), *compare_versions(gather_lists([rank_versions]))]


def batch_bytes(config: TrainConfig) -> int:
    """Return the bytes of the largest collated batch: an image per sample, five numbers of 8 bytes per token."""
    height, width = read_config(config.model.base)["eva_args"]["image_size"]
    size = max(config.schedule.batch_size, config.saving.eval_batch_size or 0)
    return size * (3 * height * width * 4 + 5 * config.model.max_length * 8)

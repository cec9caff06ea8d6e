"""The machine that a run would have: its packages, its memory for data workers, its disk, and its network."""

import math
import os
from argparse import Namespace

from sat_lora.cogvlm.checkpoints.load import read_config
from sat_lora.doctor.run_checks.collectives import TIMEOUT, collective_findings
from sat_lora.doctor.run_checks.packages import compare_versions, package_findings
from sat_lora.doctor.run_checks.space import disk_findings, shared_memory_findings
from sat_lora.findings.finding import Finding, joined
from sat_lora.lora.config import LoraConfig
from sat_lora.parallel.agreement import code_mark
from sat_lora.parallel.distributed import World, gather_lists
from sat_lora.parallel.launch import ranks_on_this_machine
from sat_lora.training.runs.run_folder import versions
from sat_lora.training.runs.space import saved_sizes


def environment_findings(options: Namespace, world: World, lora: LoraConfig, timeout: float = TIMEOUT) -> list[Finding]:
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
        workers = options.num_workers + (options.num_workers > 0)
        findings += shared_memory_findings(workers, batch_bytes(options), ranks_on_this_machine(world.size))
    if world.is_main:
        adapter, trained = saved_sizes(options, lora)
        # --save-interval 0 saves once, at the end. Of each element master, mean and variance, in float32.
        saves = math.ceil((options.train_iters or 1) / options.save_interval) if options.save_interval else 1
        findings += disk_findings(options.run_folder, adapter, options.keep, checkpoint_bytes=12 * trained, saves=saves)
    rank_versions = {**versions(), "sat_lora's code": code_mark()}
    return [*joined(gather_lists([findings])), *compare_versions(gather_lists([rank_versions]))]


def batch_bytes(options: Namespace) -> int:
    """Return the bytes of the largest collated batch: an image per sample, five numbers of 8 bytes per token."""
    height, width = read_config(options.from_pretrained)["eva_args"]["image_size"]
    size = max(options.batch_size, options.eval_batch_size or 0)
    return size * (3 * height * width * 4 + 5 * options.max_length * 8)

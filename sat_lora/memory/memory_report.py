"""The doctor's table of memory: this run's ranks, their activations measured where the model is there as a whole."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sat_lora.cogvlm.checkpoints.quantized_files import KEY
from sat_lora.errors import ConfigError
from sat_lora.findings.finding import Finding, joined
from sat_lora.memory.components import Memory, device_memory, memory_findings, memory_of, memory_table
from sat_lora.memory.estimate_run import sizes_of
from sat_lora.memory.live_memory import peak_of
from sat_lora.parallel.distributed import gather_lists, run_on_all_ranks
from sat_lora.parallel.launch import ranks_on_this_machine
from sat_lora.training.prepare import PreparedRun
from sat_lora.training.settings.config import KNOWN, NONE, TrainConfig

ADVISED = "nf4"  # the scheme that takes least


def memory_report(prepared: PreparedRun, model: nn.Module, step: Callable[[], None]) -> tuple[str, list[Finding]]:
    """Return (table, findings) of all ranks; every rank has to call it.

    step: runs forward and backward on one micro-batch. Under ZeRO-3, whose gathers would be counted too, activations
    are estimated; with --shrink what is measured is extrapolated by what `estimate` gives for both sizes.
    """
    config = prepared.config
    device = prepared.world.device
    ranks = prepared.world.size
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    measured = 0 if partitioned else peak_of(step, model, device)
    model.zero_grad(set_to_none=True)
    memory = memory_of(
        model,
        prepared.engine,
        data_parallel_size=prepared.world.data_parallel_size,
        activations=measured,
        on_device=device.type == "cuda",
    )
    if partitioned or config.start.shrink:
        whole = _estimated(config, ranks, device.type)
        if not partitioned:
            small = _estimated(config, ranks, device.type, config.start.shrink)
            whole = dataclasses.replace(whole, activations=whole.activations * memory.activations / small.activations)
        memory = whole
    available = device_memory(device, ranks_on_this_machine(ranks))
    table = memory_table(gather_lists([memory]), gather_lists([available]))
    return table, _advised(joined(gather_lists([memory_findings(memory, available)])), prepared)


def estimated_findings(prepared: PreparedRun) -> list[Finding]:
    """Return a finding, before anything is loaded, if a step does not fit by the estimate; on GPUs alone.

    Every rank has to call it.
    """
    config = prepared.config
    world = prepared.world
    if world.device.type != "cuda" or config.start.shrink:
        return []
    memory = _estimated(config, world.size, world.device.type)
    available = device_memory(world.device, ranks_on_this_machine(world.size))
    return _advised(joined(gather_lists([memory_findings(memory, available)])), prepared)


def _advised(findings: list[Finding], prepared: PreparedRun) -> list[Finding]:
    """Return the findings; those on memory name what a quantised base would take, where that fits on every rank.

    Every rank has to call it, with the same findings.
    """
    config = prepared.config
    if (
        not findings
        or config.quantization.quantize != NONE
        or config.start.shrink
        or not _may_be_quantized(config.model.base)
    ):
        return findings
    world = prepared.world
    available = gather_lists([device_memory(world.device, ranks_on_this_machine(world.size))])
    smallest = min((size for size in available if size is not None), default=0.0)
    recomputed = dict(checkpoint_activations=True, vit_checkpoint_activations=True)
    variants: list[dict[str, Any]] = [{}, recomputed]
    for more in variants:
        quantized = config.replaced(quantize=ADVISED, **more)
        try:
            memory = _estimated(quantized, world.size, world.device.type)
        except ConfigError:  # nothing of this base can be quantised
            return findings
        if memory.total <= smallest:
            options = " ".join([f"--quantize {ADVISED}", *(KNOWN[name].options[0] for name in more)])
            fix = f"{options}: a step then takes {memory.total / 2**30:.2f} GiB, which fits (docs/quantized.md)"
            return [dataclasses.replace(finding, fix=fix) for finding in findings]  # of memory alone
    return findings


def _may_be_quantized(base: str) -> bool:
    """Return whether the base is whole, as far as its sizes say."""
    return KEY not in sizes_of(base)


def estimate_elsewhere(config: TrainConfig, ranks: int, device: str, layers: int | None = None) -> Memory:
    """Return `estimate_run` of a process of its own: this one has a process group.

    Raises ConfigError with what that process says.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    request = dict(settings=config.flat(), given=sorted(config.given), ranks=ranks, device=device, layers=layers)
    process = subprocess.run(
        [sys.executable, "-m", "sat_lora.memory.estimate_run"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if process.returncode:
        raise ConfigError(f"the memory could not be estimated: {process.stderr.strip().splitlines()[-1:]}")
    return Memory(**json.loads(process.stdout.splitlines()[-1]))


def _estimated(*args) -> Memory:
    """Return `estimate_elsewhere` of rank 0 on every rank. Raises ConfigError on every rank."""
    first = torch.distributed.get_rank() == 0
    estimates = run_on_all_ranks(lambda: [estimate_elsewhere(*args)] if first else [])
    (memory,) = gather_lists(estimates)
    return memory

"""What a rank's device holds while it trains, in bytes: weights, adapters, gradients, optimizer, buffers, activations.

All but the activations follow from the number of elements and DeepSpeed 0.19.8's ways, which
`tests/memory/test_memory_of_steps.py` compares with all tensors that its engines make:

    stage  frozen weights  adapters  their gradients  master and moments           buffers
    0      W               T         T                8 T, no master               none
    1      W               T         T                12 T / n                     itemsize x bucket
    2      W               T         T / n            12 T / n                     itemsize x bucket
    3      W / n           T / n     T / n            12 T / n                     bucket, and gathered weights

W and T in bytes of their own precision but where bytes per element are given, n data-parallel ranks. Quantised weights
are whole on each rank at every stage, unless they are partitioned as well, and count beside W in their own few bits. In
half precision DeepSpeed makes the adapters half too, whatever `adapter_dtype` says.

What ZeRO-3 gathers comes flat, a prefetch bucket at a time, and is copied out when its first weight is used: a bucket
takes its size twice. On a CPU gloo gathers into buffers of its own and copies out of those as well, with two threads:
up to two buckets more, for as long as the other ranks let it wait.

Beside them a step takes the largest of what its parts take one after the other: activations; at stage 0 all gradients
once more, where they are summed over the ranks; at the others 12 T / n while Adam moves, for the gradients in float32
and two temporaries (8 T / n on CUDA, where torch's fused loops make one).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from sat_lora.findings.finding import Finding, looks_for
from sat_lora.quantized.layers import bytes_of, quantized_weights

BUCKET = 500_000_000  # elements, DeepSpeed's own default; deepspeed_config sets a lower one
LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered: stage3_max_live_parameters
REUSE = 1_000_000_000  # elements that pass before a weight's next use, if it is kept: stage3_max_reuse_distance
PREFETCH = 50_000_000  # elements that it gathers at once, and copies out of the buffer: stage3_prefetch_bucket_size
SMALL = 100_000  # elements of a parameter that it gathers once and then keeps: stage3_param_persistence_threshold
GLOO_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device of one rank, at the peak of a step."""

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    """Master weights and Adam's moments, in float32."""
    buffers: float
    """What DeepSpeed reduces in and, under ZeRO-3, gathers into."""
    activations: float = 0.0
    """What the peak takes beside the other columns: most gradients come when activations have gone, unless they are
    accumulated. If a step's own temporaries take more, those."""

    @property
    def total(self) -> float:
        """All of them together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """Return the table of `memory_table` for this rank alone, without what the device has."""
        return memory_table([self])


def memory_of(
    model: nn.Module,
    engine: dict,
    *,
    data_parallel_size: int,
    activations: float = 0.0,
    on_device: bool = True,
    partition_quantized: bool = False,
) -> Memory:
    """Return the memory of a rank's part of a model, whole over the data-parallel ranks; its parameters need no memory.

    engine: DeepSpeed's config. activations: bytes of a micro-batch at their peak, with the gradients that have come
    by then, unless they are added to others. on_device: False on a CPU run: what is offloaded to the CPU counts too.
    partition_quantized: ZeRO-3 shares quantised weights as well, and gathers one at a time.
    """
    frozen, trained = ([p for p in model.parameters() if p.requires_grad is trains] for trains in (False, True))
    zero = engine.get("zero_optimization", {})
    stage = max(zero.get("stage", 0), 1 if _is_half(engine) else 0)
    widest = 2 if _is_half(engine) else 8
    count = sum(map(_elements, trained))
    size = min(widest, max((p.element_size() for p in trained), default=4))
    frozen_size = max((p.element_size() for p in frozen), default=4)
    first = {"optimizer": 1, "gradients": 2, "parameters": 3}  # the stages that share it
    shares = {what: data_parallel_size if stage >= number else 1 for what, number in first.items()}
    bucket = size * zero.get("reduce_bucket_size", BUCKET) if stage else 0
    bucket *= 2 if stage < 3 and zero.get("overlap_comm") else 1
    gathered = _gathered([*frozen, *trained], zero, by_gloo=not on_device) if shares["parameters"] > 1 else 0
    offloads = [zero.get(f"offload_{what}", {}).get("device") for what in ("param", "optimizer")]
    offloaded = [on_device and place in ("cpu", "nvme") for place in offloads]
    gradients = count * size / shares["gradients"]
    whole = sum(map(bytes_of, model.buffers()))  # PiSSA's origins and quantised weights among them
    quantized = [bytes_of(weight) for _, weight in quantized_weights(model)] if partition_quantized else []
    shared = sum(quantized) * (1 - 1 / shares["parameters"])
    one_gathered = max(quantized, default=0) if shared else 0
    adam = 0 if offloaded[1] else count * (8 if on_device else 12) / shares["optimizer"]  # with the gradients
    gone = gradients + (bucket if stage < 3 else 0)  # by the time that Adam moves
    temporaries = max(adam - gone, 0) if stage else gradients
    # There while activations are: gradients that are accumulated, and ZeRO-3's memory for them.
    stays = stage == 3 or engine.get("gradient_accumulation_steps", 1) > 1
    return Memory(
        weights=whole - shared + (0.0 if offloaded[0] else _bytes(frozen) / shares["parameters"]),
        adapters=count * size / shares["parameters"],
        gradients=gradients,
        optimizer=0.0 if offloaded[1] else count * (12 / shares["optimizer"] if stage else 8),
        buffers=bucket + gathered * frozen_size + one_gathered,
        activations=max(activations - (0 if stays else gradients), temporaries),
    )


@looks_for("memory")
def memory_findings(memory: Memory, available: float | None) -> list[Finding]:
    """Return a finding if a step takes more than the device has, else none.

    available: bytes that the device has for this rank; None where nobody knows.
    """
    if available is None or memory.total <= available:
        return []
    items = sorted(((getattr(memory, f.name), f.name) for f in fields(memory)), reverse=True)
    largest = ", ".join(f"{name} {_gib(size)}" for size, name in items[:3])
    seen = f"a step takes {_gib(memory.total)}, the device has {_gib(available)}; the most of it {largest}"
    return [Finding(code="memory", seen=seen)]


def memory_table(memories: Sequence[Memory], available: Sequence[float | None] | None = None) -> str:
    """Return a table with a line per rank, in GiB or, for small models, MiB; ranks that are alike share one.

    available: bytes that each device has; None leaves the column out.
    """
    with_devices = available is not None
    available = available or [None] * len(memories)
    names = [field.name for field in fields(Memory)]
    unit, scale = ("GiB", 1) if max(memory.total for memory in memories) >= 2**30 else ("MiB", 1024)
    rows: dict[tuple[str, ...], list[int]] = {}
    for rank, (memory, size_of_device) in enumerate(zip(memories, available)):
        sizes = [*(getattr(memory, name) for name in names), memory.total]
        device = ["?" if size_of_device is None else _number(size_of_device * scale)] if with_devices else []
        cells = (*(_number(size * scale) for size in sizes), *device)
        rows.setdefault(cells, []).append(rank)
    header = ("rank", *names, "in all", *(["device has"] if with_devices else []))
    lines = [header, *((_ranks(ranks), *cells) for cells, ranks in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    return "\n".join([f"memory in {unit} at the peak of a step", *table])


def device_memory(device: torch.device, ranks_here: int) -> float | None:
    """Return the bytes that a rank of `ranks_here` on this machine may have; None where the system does not say.

    On a CPU they are those that are free, and those that this process has already.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return _kib("/proc/meminfo", "MemAvailable") * 1024 / ranks_here + _kib("/proc/self/status", "RssAnon") * 1024
    except (OSError, KeyError):
        return None


def _gathered(parameters: Sequence[nn.Parameter], zero: dict, *, by_gloo: bool) -> int:
    """Return how many elements ZeRO-3 holds whole: those kept between uses, and buffers for the next large ones."""
    counts = [_elements(parameter) for parameter in parameters]
    large = sum(count for count in counts if count > zero.get("stage3_param_persistence_threshold", SMALL))
    small = sum(counts) - large
    reused = zero.get("stage3_max_reuse_distance", REUSE) // 2  # once on the way forward and once back
    kept = max(zero.get("stage3_max_live_parameters", LIVE), reused, small)
    buffers = 1 + (GLOO_THREADS if by_gloo else 0)
    return min(kept, sum(counts)) + min(buffers * zero.get("stage3_prefetch_bucket_size", PREFETCH), large)


def _kib(path: str, name: str) -> int:
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0])


def _is_half(engine: dict) -> bool:
    return any(engine.get(name, {}).get("enabled") for name in ("bf16", "fp16"))


def _elements(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(_elements(parameter) * parameter.element_size() for parameter in parameters)


def _ranks(ranks: Sequence[int]) -> str:
    whole = len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def _number(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.2f}" if gib < 100 else f"{gib:.0f}"


def _gib(size: float) -> str:
    return f"{_number(size)} GiB"

"""Timing several variants of the same work against each other, and counting what each keeps for backward.

Variants are called in turn within every repetition, so that a clock that drifts or a busy neighbour hits all alike.
Times are in seconds, sizes in bytes.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata

import torch
from tqdm import tqdm

from sat_lora._sat import mpu

PACKAGES = ("torch", "SwissArmyTransformer", "peft", "deepspeed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Work = Callable[[], object]


def join_alone(device: torch.device) -> None:
    """A process group of one with SAT's model-parallel groups in it, if there is none; no port is opened."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(1)


@contextmanager
def described_as_alone() -> Iterator[None]:
    """Inside, the environment says what a launcher would: one process. DeepSpeed asks for LOCAL_RANK."""
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def seconds_of(work: Work, device: torch.device, clock: str = "wall") -> float:
    """Time of one call. On CUDA between two events in the stream, so the launch of the first kernel is not in it.

    clock: on the CPU one of CLOCKS. "cpu" is processor time: with one thread it leaves out the time in which
    a busy machine runs somebody else, and with several it is their sum.
    """
    if device.type != "cuda":
        now = CLOCKS[clock]
        start = now()
        work()
        return now() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000  # elapsed_time is in milliseconds


def measure(
    works: dict[str, Work],
    repeats: int,
    device: torch.device,
    clock: str = "wall",
    warmup: int = 2,
    before: dict[str, Work] | None = None,
) -> dict[str, list[float]]:
    """`repeats` times of every work, in turn; the order moves on by one each time, so that nobody is always first.

    before: what is called ahead of each call of a work, and not timed.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-warmup, repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            if before is not None:
                before[name]()
            seconds = seconds_of(works[name], device, clock)
            if repetition >= 0:
                times[name].append(seconds)
    return times


def quartiles(values: list[float]) -> list[float]:
    """[first quartile, median, third quartile]; of a single value, that value three times."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def summarise(times: dict[str, list[float]], base: str) -> dict[str, dict]:
    """For each variant: quartiles of its seconds, and of its ratio to `base` in the same repetition."""
    return {
        name: {
            "seconds": quartiles(own),
            "ratio": quartiles([a / b for a, b in zip(own, times[base])]),
        }
        for name, own in times.items()
    }


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that `forward` keeps for backward, each storage once, those of `parameters` not at all."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of a product of two square matrices, the best of several."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = min(seconds_of(lambda: left @ right, device) for _ in range(8))
    return 2 * size**3 / seconds


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """The most memory that torch held on a CUDA device during a call; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


KERNELS = {
    "product": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm", "bmm"),
    "attention": ("flash", "fmha", "sdpa", "scaled_dot", "cudnn"),
    "norm": ("layer_norm", "layernorm", "rms_norm"),
    "index": ("index", "gather", "scatter"),
    "copy": ("copy", "memcpy", "cat"),
    "reduction": ("reduce", "isfinite", "norm"),
    "optimizer": ("multi_tensor", "adam"),
    "elementwise": ("elementwise", "vectorized", "::mul", "::add"),
}


def kernel_times(work: Work, device: torch.device, longest: int = 15) -> dict:
    """Where the device's time goes in one call.

    Returns {"busy_ms", "kernels": their number, "kinds": {kind: [ms, number]}, "longest": [[name, ms, number]]}; on
    the CPU operators stand for kernels. The kinds are told by words in the kernels' names.
    """
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
        work()
        if on_cuda:
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if microseconds > 0 and event.device_type.name == device.type.upper():
            rows.append([event.key, microseconds / 1000, event.count])
    rows.sort(key=lambda row: -row[1])
    kinds: dict[str, list] = {}
    for name, milliseconds, count in rows:
        own = kinds.setdefault(_kind(name), [0.0, 0])
        own[0] += milliseconds
        own[1] += count
    return {
        "busy_ms": sum(row[1] for row in rows),
        "kernels": sum(row[2] for row in rows),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1][0])),
        "longest": [[name[:120], milliseconds, count] for name, milliseconds, count in rows[:longest]],
    }


def _kind(kernel: str) -> str:
    lower = kernel.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in lower for part in parts)), "other")


def environment(device: torch.device, clock: str) -> dict:
    """What the numbers depend on besides the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "kind": device.type,
        "clock": "events" if device.type == "cuda" else clock,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def _cpu_name() -> str:
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def progress(cases: list, what: str) -> Iterable:
    """`cases` with a bar on a terminal."""
    return tqdm(cases, desc=what, disable=None, dynamic_ncols=True)

"""Loading a checkpoint: seconds, and anonymous memory of each rank, against `torch.load` of the whole.

    python -m benchmarks.bench_loading --gigabytes 1 --markdown

Makes a CogVLM of that size in bfloat16, as a SAT file and as Hugging Face shards, and removes it afterwards. The page
cache is warm. A mapped file counts as RssFile in /proc/self/status, not as RssAnon, which is sampled here.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.model_folders import config_of, state_of, write_hugging_face
from benchmarks.report import table, write_json
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights, weight_files
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.quantization.config import Quantization
from sat_lora.quantized.layers import bytes_of
from sat_lora.training.steps.engine import set_up_deepspeed

INTERVAL = 0.002  # seconds between samples


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def peak_growth(work: Callable) -> tuple[object, int, float]:
    """(what work() returns, bytes of anonymous memory at the peak above the start, seconds)."""
    start, peak, done = anonymous_bytes(), [0], threading.Event()

    def sample():
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    before = time.monotonic()
    try:
        result = work()
    finally:
        seconds = time.monotonic() - before
        done.set()
        sampler.join()
    return result, max(peak[0], anonymous_bytes()) - start, seconds


def load_on_a_rank(folder: str, model_parallel: int, zero: bool = False, scheme: str | None = None) -> dict:
    """Bytes of the rank's own weights, peak growth of its anonymous memory, seconds.

    scheme: that to which the linears are quantised.
    """
    init_model_parallel(init_distributed(), model_parallel)
    config = None
    if zero:
        set_up_deepspeed()
        config = dict(train_micro_batch_size_per_gpu=1, zero_optimization=dict(stage=3), bf16=dict(enabled=True))
    load = lambda: load_cogvlm(  # noqa: E731
        folder, dtype=torch.bfloat16, model_parallel_size=model_parallel, zero_config=config,
        quantize=None if scheme is None else Quantization(scheme=scheme),
    )  # fmt: skip
    (model, _), peak, seconds = peak_growth(load)
    own = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in model.parameters())
    own += sum(map(bytes_of, model.buffers()))
    return {"own": own, "peak": peak, "seconds": seconds}


def torch_load_on_a_rank(folder: str) -> dict:
    """The same numbers of reading a whole file, as SAT's own loading does on each rank."""
    (file,) = weight_files(folder)
    state, peak, seconds = peak_growth(lambda: torch.load(file, map_location="cpu", weights_only=True)["module"])
    return {"own": sum(t.numel() * t.element_size() for t in state.values()), "peak": peak, "seconds": seconds}


def _rank_main(results, rank: int, size: int, port: int, target: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    results.put(target(*arguments))
    results.close()
    results.join_thread()
    os._exit(0)  # without waiting for the others in a destructor


def on_ranks(size: int, target: Callable, *arguments) -> dict:
    """The worst of each number over `size` processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank_main, args=(results, rank, size, port, target, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return {key: max(result[key] for result in found) for key in found[0]}


def main(arguments: list[str] | None = None) -> list[dict]:
    """Make, load, print, and return one row per way to load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3, help="of each, the fastest counts")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints; the system's temporary folder")
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    args = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        sat, hugging_face = f"{home}/sat", f"{home}/hf"
        config = config_of(args.gigabytes)
        state = state_of(config)
        save_weights(sat, config, state)
        write_hugging_face(Path(hugging_face), config, state, shards=4)
        del state
        for way, size, target, settings in (
            ("torch.load, whole", 1, torch_load_on_a_rank, (sat,)),
            ("SAT file, model-parallel size 1", 1, load_on_a_rank, (sat, 1)),
            ("SAT file, model-parallel size 2", 2, load_on_a_rank, (sat, 2)),
            ("Hugging Face shards, model-parallel size 2", 2, load_on_a_rank, (hugging_face, 2)),
            ("SAT file, ZeRO-3 on 2 ranks", 2, load_on_a_rank, (sat, 1, True)),
        ):
            runs = [on_ranks(size, target, *settings) for _ in range(args.repeats)]
            rows.append({"way": way, "ranks": size, **min(runs, key=lambda run: run["seconds"])})
    header = ["", "ranks", "own weights MB", "peak RssAnon MB", "seconds"]
    cells = [
        [row["way"], str(row["ranks"]), f"{row['own'] / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}", f"{row['seconds']:.2f}"]
        for row in rows
    ]
    print(table(header, cells, args.markdown))
    if args.out:
        write_json({"gigabytes": args.gigabytes, "rows": rows}, args.out)
    return rows


if __name__ == "__main__":
    main()

"""A run's own step against the bare one: what DeepSpeed, the gradient watch, the watchdog and the log take of it.

    python -m benchmarks.bench_loop --size full --out loop.json      # CogVLM-17B in bf16: 45 GB of a GPU

`bare` is forward, loss, backward and AdamW. `loop` is `train_step` under DeepSpeed's engine with the gradient watch and
the watchdog's trace, a batch that comes from the CPU's memory and a line in the log: a run without reading its images.
The bare steps are taken first, on the same weights: the engine's hooks stay.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_step import training_step
from benchmarks.interleaved import DTYPES, Work, environment, join_alone, quartiles
from benchmarks.models import SIZES, allow_checkpointing, batch_of, config_of, random_model
from benchmarks.report import table, write_json
from benchmarks.run_step import WATCHDOG_LIMIT, run_step
from benchmarks.variants import randomise
from sat_lora import LoraConfig, add_lora
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.observers import Observers
from sat_lora.training.steps.step import to_device
from sat_lora.watchdog.watchdog import watched_trace

ROUNDS = 3
STEPS_AT_MOST = 10**6  # of the progress bar


def rounds_of(work: Work, repeats: int, device: torch.device, warmup: int) -> list[float]:
    """Mean wall seconds of a call in each of ROUNDS rounds of `repeats` calls.

    As in a run nobody waits for the device between the calls; what a work itself waits for counts.
    """
    rounds = []
    for _ in range(warmup):
        work()
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        rounds.append((time.perf_counter() - start) / repeats)
    return rounds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(config: dict, args: argparse.Namespace, device: torch.device) -> dict:
    """Seconds per step and samples per second of both."""
    dtype = DTYPES[args.dtype]
    allow_checkpointing(device)
    model = random_model(config, dtype, device, checkpointing=args.checkpointing)
    add_lora(model, LoraConfig(r=args.rank))
    trained = randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    words = args.words or SIZES[args.size]["words"]
    batch = batch_of(config, words, torch.device("cpu"), dtype, args.batch)
    on_device = to_device(batch, device)
    rounds = {"bare": rounds_of(training_step(model, on_device, trained), args.repeats, device, warmup=2)}
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder, is_writer=True)
        loop = run_step(model, batch, stage=args.zero_stage, trace_folder=Path(folder), logs=run.observers)
        with Observers(run.observers, run.say) as logs:
            logs.on_start(STEPS_AT_MOST, 0)
            with watched_trace(loop.trace, WATCHDOG_LIMIT):
                rounds["loop"] = rounds_of(loop.work, args.repeats, device, warmup=3)
    return {name: summary(own, args.batch) for name, own in rounds.items()}


def summary(seconds: list[float], batch: int) -> dict:
    """Quartiles of the rounds' seconds per step, and the samples per second of the fastest round."""
    return {"seconds": quartiles(seconds), "samples_per_second": batch / min(seconds)}


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full" if on_cuda else "tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_cuda else "fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="samples")
    parser.add_argument("--words", type=int, help="tokens of text in each, beside the image's")
    parser.add_argument("--zero-stage", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--repeats", type=int, default=5, help="steps in each of three rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Measure both, print and write the results, and return them."""
    args = options(arguments)
    device = torch.device(args.device)
    join_alone(device)
    torch.manual_seed(args.seed)
    steps = compare(config_of(args.size), args, device)
    settings = dict(size=args.size, dtype=args.dtype, batch=args.batch, zero_stage=args.zero_stage)
    report = {
        "environment": environment(device, "wall"),
        **settings,
        "checkpointing": args.checkpointing,
        "steps": steps,
        "loop_of_bare": min(steps["loop"]["seconds"]) / min(steps["bare"]["seconds"]),
    }
    cells = [
        [name, f"{1000 * own['seconds'][0]:.1f}", f"{own['samples_per_second']:.2f}"] for name, own in steps.items()
    ]
    print(table(["step", "ms", "samples/s"], cells, args.markdown))
    if args.out:
        write_json(report, args.out)
    return report


if __name__ == "__main__":
    main()

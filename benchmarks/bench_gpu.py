"""Everything that needs a GPU, in stages, each with a time limit of its own; what fails or hangs stops no other.

    make bench-gpu                          # under eight minutes on an H200 or an H100 of 80 GB
    make bench-gpu STAGES="adapter step"    # some of them
    python -m benchmarks.bench_gpu --dry-run --out /tmp/bench      # every stage, tiny and on the CPU

Needs no installation, only packages that Python finds (PYTHONPATH). A line of json per result goes to stdout; OUT has
results.jsonl, with the stages' whole reports, and log.txt, with their output.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

HOME = Path(__file__).parents[1]
MINUTES = 7.9
LAST_WORDS = 1500  # characters of a failed stage's output that are shown
ON_CPU = ["--device", "cpu"]


@dataclass(frozen=True)
class Stage:
    """`command` is for the GPU, `dry` for a CPU; both write a report to the file after --out, unless `report` is None.

    limit: seconds. report: short results out of the report.
    """

    limit: float
    command: list[str]
    dry: list[str]
    report: Callable[[dict], Iterator[dict]] | None


def adapter_results(report: dict) -> Iterator[dict]:
    """For every linear the time of each variant as a multiple of the frozen linear's."""
    for case in report["cases"]:
        variants = case["variants"]
        ratios = {name: round(own["ratio"][1], 3) for name, own in variants.items() if name != "frozen"}
        frozen = round(1e3 * variants["frozen"]["seconds"][1], 3)
        yield {"linear": case["shape"], "dropout": case["dropout"], "frozen_ms": frozen, **ratios}


def step_results(report: dict) -> Iterator[dict]:
    """For every case and variant the step's seconds, and where the device's time goes."""
    rates = {dtype: product["flops"] for dtype, product in report["product"].items()}
    yield {"product_tflops": {dtype: round(rate / 1e12, 1) for dtype, rate in rates.items()}}
    for case in report["cases"]:
        what = {key: case[key] for key in ("batch", "dropout", "checkpointing")}
        for name, own in case["variants"].items():
            figures = {"s": round(own["seconds"][1], 4), "of_frozen": round(own["ratio"][1], 4)}
            figures["of_product"] = round(own["flops"] / rates[case["dtype"]], 3)
            if "peak_bytes" in own:
                figures["peak_gib"] = round(own["peak_bytes"] / 2**30, 2)
            if "estimated_bytes" in own:
                figures["estimated_gib"] = round(own["estimated_bytes"] / 2**30, 2)
            yield {"variant": name, **what, **figures}
            if "kernels" in own:
                kernels = own["kernels"]
                kinds = {kind: [round(ms, 1), count] for kind, (ms, count) in kernels["kinds"].items()}
                yield {"busy_ms": round(kernels["busy_ms"], 1), "kernels": kernels["kernels"], "kinds": kinds}
    for case in report.get("too_large", []):
        yield {"too_large": case["names"], "batch": case["batch"], "error": case["error"][:200]}


def decode_results(report: dict) -> Iterator[dict]:
    """For every state of the adapters tokens per second."""
    for row in report["rows"]:
        figures = {key: row[key] for key in ("adapters", "batch", "prompt", "tokens")}
        first, later = (round(1e3 * row[key], 2) for key in ("first_seconds", "token_seconds"))
        yield {**figures, "first_ms": first, "token_ms": later, "tokens_per_s": round(row["tokens_per_second"], 1)}


def loop_results(report: dict) -> Iterator[dict]:
    """Samples per second of the bare step and of a run's."""
    rates = {name: round(own["samples_per_second"], 3) for name, own in report["steps"].items()}
    yield {"samples_per_s": rates, "loop_of_bare": round(report["loop_of_bare"], 4)}


def run_results(report: dict) -> Iterator[dict]:
    """The figures as they are."""
    yield {name: value if value is None else round(value, 4) for name, value in report["run"].items()}


def module(name: str, *arguments: str) -> list[str]:
    """The command of a benchmark."""
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


PYTEST = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations", "5"]  # the log names each test
# Most of these tests wait for Triton to compile, on one core each.
SIDE_BY_SIDE = ["--numprocesses", str(min(14, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
STEP = "batch=4 checkpointing"
STEP_CASES = [
    f"all-linear {STEP} profile",
    "all-linear batch=1",
    f"all-linear {STEP} dropout=0.05",
    f"attention {STEP}",
    f"lora2 {STEP}",
]
NF4 = ["--quantize", "nf4"]
NF4_CASES = [f"all-linear {STEP}", "all-linear batch=1 checkpointing"]
BF16 = ["--dtypes", "bf16", "--ranks", "16"]
STAGES = {
    "tests": Stage(180, [*PYTEST, *SIDE_BY_SIDE, "-m", "cuda", "tests/cuda"], [*PYTEST, "tests/cuda"], None),
    "adapter": Stage(
        70,
        module("bench_adapter", *BF16),
        module("bench_adapter", *ON_CPU, *BF16, "--shapes", "64x64", "64x192/3", "--tokens", "8", "--repeats", "2"),
        adapter_results,
    ),
    "step": Stage(
        150,
        module("bench_step", "--size", "full", *BF16, "--repeats", "5", "--cases", *STEP_CASES),
        module("bench_step", "--size", "tiny", *ON_CPU, *BF16, "--repeats", "1", "--cases", *STEP_CASES),
        step_results,
    ),
    "nf4-step": Stage(
        100,
        module("bench_step", "--size", "full", *NF4, *BF16, "--repeats", "5", "--cases", *NF4_CASES),
        module("bench_step", "--size", "tiny", *ON_CPU, *NF4, *BF16, "--repeats", "1", "--cases", *NF4_CASES),
        step_results,
    ),
    "nf4-decode": Stage(
        60,
        module("bench_decode", "--size", "full", *NF4),
        module("bench_decode", "--size", "tiny", *ON_CPU, *NF4, "--tokens", "3", "--repeats", "1"),
        decode_results,
    ),
    "decode": Stage(
        60,
        module("bench_decode", "--size", "full"),
        module("bench_decode", "--size", "tiny", *ON_CPU, "--tokens", "3", "--repeats", "1"),
        decode_results,
    ),
    "loop": Stage(
        80,
        module("bench_loop", "--size", "full"),
        module("bench_loop", "--size", "tiny", *ON_CPU, "--repeats", "1"),
        loop_results,
    ),
    "run": Stage(
        110,
        module("bench_run", "--size", "large", "--steps", "12"),
        module("bench_run", "--size", "tiny", *ON_CPU, "--steps", "8", "--batch", "1"),
        run_results,
    ),
}


@dataclass
class Ending:
    """How a stage ended. status: of the process, None if it was ended at its limit."""

    status: int | None
    seconds: float
    report: dict | None
    output: str


def run_stage(stage: Stage, *, dry: bool, limit: float) -> Ending:
    """Run a stage's command, with all that it starts, for at most `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = stage.dry if dry else stage.command
        command = [*command, "--out", str(out)] if stage.report else command
        log = Path(folder) / "log.txt"
        start = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=HOME,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        seconds = time.monotonic() - start
        report = json.loads(out.read_text()) if out.exists() else None
        return Ending(status, seconds, report, log.read_text(errors="replace"))


def environment() -> dict[str, str]:
    """This process's, with this checkout found first."""
    path = os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def device_name(dry: bool) -> str:
    """What the figures are of. SystemExit: there is no GPU, and this is no dry run."""
    if dry:
        return "cpu, dry run"
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu needs a GPU, and torch sees none; --dry-run runs every stage small on the CPU")
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of them together")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the stages' limits: a busy machine")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: to see that it runs")
    parser.add_argument("--out", type=Path, default=HOME / "runs" / "bench-gpu", help="folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages in order and return 0, or 1 if one of them failed."""
    args = options(arguments)
    device = device_name(args.dry_run)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    failed = []

    def tell(**line) -> None:
        print(json.dumps(line), flush=True)

    tell(device=device)
    with open(args.out / "results.jsonl", "w") as results, open(args.out / "log.txt", "w") as log:
        for name in args.stages:
            stage = STAGES[name]
            limit = min(stage.limit * args.patience, deadline - time.monotonic())
            if limit <= 0:
                failed.append(name)
                tell(stage=name, status="no time was left")
                continue
            ending = run_stage(stage, dry=args.dry_run, limit=limit)
            log.write(f"==== {name}\n{ending.output}\n")
            log.flush()
            if ending.report is not None:
                results.write(json.dumps({"stage": name, "device": device, **ending.report}) + "\n")
                results.flush()
                for line in stage.report(ending.report):
                    tell(stage=name, **line)
            status = "ok" if ending.status == 0 else "ran out of time" if ending.status is None else "failed"
            last = ending.output.strip().splitlines()[-1:] if stage.report is None else []
            tell(stage=name, status=status, seconds=round(ending.seconds, 1), **({"said": last[0]} if last else {}))
            if ending.status != 0:
                failed.append(name)
                print(ending.output[-LAST_WORDS:], flush=True)
    tell(failed=failed, seconds=round(time.monotonic() - deadline + 60 * args.minutes, 1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

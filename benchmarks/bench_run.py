"""A whole run by its command: samples per second, what a save holds up, and memory with and without --test-data.

    python -m benchmarks.bench_run --size quarter --out run.json

Writes a base of random weights and a folder of noise images, starts finetune_demo/finetune_cogvlm.py on them, and reads
its train.jsonl while it grows: the time from a line to the next is that of a step, longer after a step that saves.
Memory is the most that torch held on CUDA, or that the process held beside files on a CPU.
"""

import argparse
import itertools
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks.bench_loading import peak_growth
from benchmarks.interleaved import DTYPES, environment, join_alone
from benchmarks.models import SIZES, config_of, random_model
from benchmarks.report import table, write_json
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.training.runs.step_progress import peak_memory_mib

DEMO = Path(__file__).parents[1] / "finetune_demo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PICTURE = (640, 480)
WARM = 3  # steps before a step's time counts


def write_base(folder: Path, size: str, dtype: torch.dtype, device: torch.device) -> None:
    """A SAT folder of that size with random weights and the demo's tokenizer, of single characters."""
    join_alone(device)
    torch.manual_seed(0)
    torch.serialization.set_crc32_options(False)  # a third of the time, for a file that lives for a minute
    config = {**config_of(size), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = random_model(config, dtype, device)
    save_weights(folder, config, {name: tensor.cpu() for name, tensor in model.state_dict().items()})
    for name in TOKENIZER:
        shutil.copy(DEMO / "tiny_cogvlm" / name, folder / name)


def write_images(folder: Path, number: int, words: int) -> tuple[Path, Path]:
    """(train, test): .jsonl files of noise images with a prompt of `words` characters; the test has four of them."""
    folder.mkdir(parents=True)
    lines = []
    for image in range(number):
        Image.effect_noise(PICTURE, 60).convert("RGB").save(folder / f"{image}.jpg")
        lines.append(json.dumps({"image": f"{image}.jpg", "prompt": "x" * words, "answer": f"{image:04}"}) + "\n")
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    train.write_text("".join(lines))
    test.write_text("".join(lines[:4]))
    return train, test


def child(arguments: list[str], out: Path) -> None:
    """Run the script in this process and write its status, its seconds and the most memory that it held.

    peak_mib: that memory as train.jsonl tells it, files included.
    """
    main = runpy.run_path(str(DEMO / "finetune_cogvlm.py"))["main"]
    status, peak, seconds = peak_growth(lambda: main(arguments))
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    write_json({"status": status, "peak_bytes": peak, "peak_mib": peak_memory_mib(), "seconds": seconds}, out)
    sys.exit(status)


def run(options: list[str], home: Path, name: str) -> dict:
    """What `child` writes, and `arrivals`: seconds at which each step's line appeared in train.jsonl.

    RuntimeError: the run failed; its output is in the message.
    """
    out, log = home / f"{name}.json", home / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks.bench_run", "--child", str(out), "--"]
    command += [*options, "--save", str(home / "runs"), "--experiment-name", name, "--log-interval", "1"]
    lines, arrivals = home / "runs" / name / "train.jsonl", []
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=alone())
        while process.poll() is None:
            time.sleep(0.002)
            steps = lines.read_text().count('"loss"') if lines.exists() else 0
            arrivals += [time.perf_counter()] * (steps - len(arrivals))
    if process.returncode:
        raise RuntimeError(f"the run failed:\n{log.read_text()[-3000:]}")
    return {**json.loads(out.read_text()), "arrivals": arrivals}


def alone() -> dict[str, str]:
    """The environment without what a launcher would have said, in which `benchmarks` and `sat_lora` are found."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    path = os.pathsep.join([str(DEMO.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {name: value for name, value in os.environ.items() if name not in launcher} | {"PYTHONPATH": path}


def step_times(arrivals: list[float], save_interval: int) -> dict:
    """Medians of the seconds from a step's line to the next: `step`, and `save`, what a step that saves adds."""
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    numbered = [(step, gap) for step, gap in enumerate(gaps, start=1) if step >= WARM]  # from the line of `step` on
    usual = statistics.median(gap for step, gap in numbered if step % save_interval)
    after_saves = [gap for step, gap in numbered if step % save_interval == 0]
    return {"step_seconds": usual, "save_seconds": statistics.median(after_saves) - usual if after_saves else None}


def measure(args: argparse.Namespace, home: Path) -> dict:
    """The figures of two runs, one with --test-data."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    write_base(home / "base", args.size, dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    words = args.words or SIZES[args.size]["words"]
    train, test = write_images(home / "images", 12 * args.batch, words)
    length = config_of(args.size)["image_length"] + 2 + words + 16
    options = ["--from_pretrained", str(home / "base"), "--train-data", str(train), "--version", "base"]
    options += ["--max_length", str(length), "--batch-size", str(args.batch), "--lora-rank", str(args.rank)]
    options += ["--zero-stage", "2", "--checkpoint-activations", "--vit_checkpoint_activations", "--eval-interval", "0"]
    options += [] if args.dtype == "fp32" else [f"--{args.dtype}"]
    saves = ["--save-interval", str(args.save_interval), "--train-iters", str(args.steps)]
    training = run([*options, *saves], home, "training")
    tested = run([*options, "--train-iters", "2", "--test-data", str(test)], home, "tested")
    times = step_times(training.pop("arrivals"), args.save_interval)
    return {
        **times,
        "samples_per_second": args.batch / times["step_seconds"],
        "peak_bytes": training["peak_bytes"],
        "peak_bytes_with_test_data": tested["peak_bytes"],
        "memory_ratio": tested["peak_bytes"] / training["peak_bytes"],
        "seconds": training["seconds"],
        "seconds_with_test_data": tested["seconds"],
    }


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--size", choices=SIZES, default="quarter" if on_cuda else "tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_cuda else "fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="samples")
    parser.add_argument("--words", type=int, help="characters of the prompt")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--save-interval", type=int, default=4)
    shared = "/dev/shm"
    parser.add_argument("--folder", type=Path, default=shared if os.path.isdir(shared) else None, help="for the base")
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Run both, print and write the figures, and return them."""
    args = options(arguments)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_run.") as home:
        figures = measure(args, Path(home))
    report = {
        "environment": environment(torch.device(args.device), "wall"),
        "size": args.size,
        "dtype": args.dtype,
        "batch": args.batch,
        "run": figures,
    }
    cells = [[name, "" if value is None else f"{value:,.3f}"] for name, value in figures.items()]
    print(table(["", "value"], cells, args.markdown))
    if args.out:
        write_json(report, args.out)
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[4:], Path(sys.argv[2]))
    else:
        main()

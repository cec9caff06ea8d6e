"""A run by its command: it saves, goes on from there as if it had not stopped, and evaluates without a second model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bench_run import alone, write_base, write_images
from tests.cuda.processes import run_alone

SIZE = {"cpu": "tiny", "cuda": "small"}  # on CUDA weights that count beside DeepSpeed's buffers
LIMIT = 100


def write_base_alone(folder: Path, device: str) -> None:
    """A base of random weights, written by a process of its own."""
    write_base(folder, SIZE[device], torch.float32, torch.device(device))


def start(device: str, home: Path, name: str, *options: str) -> subprocess.Popen:
    """A run in the folder home/runs/<name>."""
    environment = alone()
    if device == "cpu":
        environment |= dict(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    command = [sys.executable, "-m", "benchmarks.bench_run", "--child", str(home / f"{name}.json"), "--", *options]
    return subprocess.Popen(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> None:
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]


def records(run: Path) -> dict[int, dict]:
    """What train.jsonl says of each step."""
    lines = map(json.loads, (run / "train.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.mark.timeout(300)
def test_a_run_saves_resumes_and_evaluates_within_the_memory_of_training(device_of_long_test, tmp_path):
    device = device_of_long_test
    kind = device.type
    run_alone(kind, write_base_alone, tmp_path / "base", kind)
    train, test = write_images(tmp_path / "images", 8, words=8)
    options = ["--from_pretrained", tmp_path / "base", "--train-data", train, "--version", "base", "--batch-size", 2]
    options += ["--max_length", 320, "--lora-rank", 4, "--lr-decay-style", "constant", "--warmup", 0, "--lr", 1e-3]
    options += ["--checkpoint-activations", "--vit_checkpoint_activations", "--log-interval", 1, "--num-workers", 0]
    options = [*map(str, options), "--save", str(tmp_path / "runs")]
    whole = start(kind, tmp_path, "whole", *options, "--train-iters", "4", "--experiment-name", "whole")
    finish(start(kind, tmp_path, "half", *options, "--train-iters", "2", "--experiment-name", "half"))
    half = tmp_path / "runs" / "half"
    resumed = ["--resume", str(half), "--train-iters", "4", "--test-data", str(test)]
    finish(start(kind, tmp_path, "resumed", *resumed))
    finish(whole)
    expected, steps = records(tmp_path / "runs" / "whole"), records(half)
    assert list(steps) == list(expected) == [1, 2, 3, 4]
    tolerance = 0 if kind == "cpu" else 1e-2
    losses = [steps[step]["loss"] for step in steps]
    assert losses == pytest.approx([expected[step]["loss"] for step in expected], rel=tolerance, abs=0)
    assert json.loads((half / "evaluation.json").read_text())["images"] == 4
    peak = json.loads((tmp_path / "resumed.json").read_text())["peak_mib"]
    assert peak <= 1.1 * steps[4]["peak_memory_mib"]

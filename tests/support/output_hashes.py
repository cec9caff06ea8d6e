"""What a checkout writes, as hashes: to be equal before and after a change that is to change nothing.

    python -m tests.support.output_hashes                    # of this checkout
    python -m tests.support.output_hashes --checkout ../old  # of another one, with this interpreter

A run of the demo's base on a few captchas with dropout, cut in its middle and resumed; then the adapter merged into
folders for one and for two model-parallel ranks, and exported for PEFT. Hashed are adapters, checkpoints, merged
and exported files; what tells a time or a place (logs, run.json, state.json) is not.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.paths import ROOT

STEPS, CUT = 6, 3


def outputs(checkout: Path, folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that counts, by its path below `folder`, where they are written."""
    demo, base = checkout / "finetune_demo", checkout / "finetune_demo" / "tiny_cogvlm"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def start(*arguments: object) -> None:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stdout[-2000:] + done.stderr[-2000:]
            raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{said}")

    start(demo / "make_captchas.py", "--out", "captchas", "--train", 48, "--valid", 8, "--test", 8, "--seed", 3)
    settings = ("--train-data", "captchas/train", "--valid-data", "captchas/valid", "--save", "runs", "--seed", 5)
    settings += ("--version", "base", "--max_length", 64, "--batch-size", 4, "--lr", 3e-3, "--lora_dropout", 0.2)
    settings += ("--train-iters", STEPS, "--save-interval", CUT, "--eval-interval", CUT, "--keep", 0)
    start(demo / "finetune_cogvlm.py", *settings, "--experiment-name", "whole")
    cut = shutil.copytree(folder / "runs" / "whole", folder / "runs" / "cut")  # as if it had been killed on its way
    shutil.rmtree(cut / "checkpoints" / str(STEPS))
    (cut / "checkpoints" / "latest").write_text(f"{CUT}\n")
    shutil.rmtree(cut / "adapter" / str(STEPS))
    start(demo / "finetune_cogvlm.py", "--resume", "runs/cut")
    sat_lora = ("-m", "sat_lora.cli")
    merge = (*sat_lora, "merge", "--base", base, "--adapter", "runs/whole/adapter")
    start(*merge, "--out", "merged")
    start(*merge, "--out", "merged_for_two", "--model-parallel-size", 2)
    start(*sat_lora, "export", "--to", "peft", "--adapter", "runs/whole/adapter", "--out", "exported")

    places = ["runs/whole/adapter", "runs/cut/adapter", "runs/whole/checkpoints", "runs/cut/checkpoints"]
    places += ["merged", "merged_for_two", "exported"]
    files = [path for place in places for path in sorted((folder / place).rglob("*")) if path.is_file()]
    files = [path for path in files if path.name != "state.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose code runs (default: this one's)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name, digest in outputs(options.checkout.resolve(), Path(folder)).items():
            print(digest, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""finetune_cogvlm.py on a few captchas: its options, its launchers, and what a run of it leaves.

A run is waited for (`launch`, `run_to_end`), or `started` as a group of processes to be killed or stopped.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import BIN, DEMO, ROOT
from tests.support.patience import patient
from tests.support.ranks import free_port

SCRIPT = DEMO / "finetune_cogvlm.py"


def options_for(captchas, runs, *more):
    """The options of a run in RUNS/run that logs each step."""
    return [
        *("--train-data", str(captchas / "train"), "--valid-data", str(captchas / "valid")),
        *("--save", str(runs), "--experiment-name", "run", "--batch-size", "8", "--log-interval", "1"),
        *("--num-workers", "0", "--version", "base", "--max_length", "64", "--lr", "3e-3", *more),
    ]


def options_that_save(captchas, runs, *more):
    """The options of a run in RUNS/run with dropout, two data workers, a validation, and a save every second step."""
    settings = ("--batch-size", "4", "--num-workers", "2", "--lora_dropout", "0.2")
    settings += ("--save-interval", "2", "--eval-interval", "5", "--keep", "0")
    return options_for(captchas, runs, *settings, *more)


def command(launcher, options, ranks=2, script=SCRIPT):
    """The command line; launcher: None for plain python, or `deepspeed` or `torchrun`."""
    port, call = str(free_port()), [str(script), *options]
    if launcher == "deepspeed":
        # `deepspeed` itself does not start in a path with a space: pip writes its interpreter into its first line.
        program = [sys.executable, "-m", "deepspeed.launcher.runner"] if " " in str(BIN) else [str(BIN / "deepspeed")]
        return [*program, "--num_gpus", str(ranks), "--master_port", port, *call]
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port, *call]
    return [sys.executable, *call]


def environment():
    """The variables of a process that finds this interpreter's programs and this checkout."""
    found = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **found, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def copied_demo(folder):
    """A function that runs a script of a copy of finetune_demo/ in `folder`, which has to end with 0, and returns what
    that prints: for the demo as it stands, which makes its captchas beside itself.
    """
    shutil.copytree(DEMO, folder / "finetune_demo", ignore=shutil.ignore_patterns("__pycache__", "captchas"))

    def output_of(script, *arguments):
        command = [sys.executable, f"finetune_demo/{script}", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=patient(700)
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return output_of


def launch(launcher, options, ranks=2, script=SCRIPT, timeout=100):
    """The CompletedProcess of a run that has ended, with its output as text."""
    return subprocess.run(
        command(launcher, options, ranks, script),
        capture_output=True, text=True, timeout=patient(timeout), env=environment(), cwd=ROOT,
    )  # fmt: skip


@contextmanager
def started(launcher, options, log):
    """The process, first of a group of its own that does not outlive the block; its output goes to the file `log`."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            command(launcher, options), stdout=output, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT,
            start_new_session=True, preexec_fn=heed_ctrl_c,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_group(process)


def heed_ctrl_c():
    """Undo what a shell gives to all that it starts in the background: DeepSpeed's launcher keeps ignoring SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_group(process):
    """SIGKILL for the process and its ranks: torchrun gives each a process group of its own."""
    ranks = children_of(process.pid)
    for group in (process.pid, *ranks):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


def children_of(parent):
    """Process ids of the children of `parent`, none once it has ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            found += [int(stat.parent.name)] if int(fields[1]) == parent else []
    return found


def run_to_end(launcher, options, log, timeout=100):
    with started(launcher, options, log) as process:
        status = process.wait(patient(timeout))
    if status:
        raise AssertionError(f"status {status}: {log.read_text()[-3000:]}")


def wait_for(condition, process, log, timeout=80):
    """Until `condition` holds; an AssertionError with the log if the process ends before, or time runs out."""
    deadline = time.monotonic() + patient(timeout)
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"status {process.poll()}: {log.read_text()[-3000:]}")
        time.sleep(0.02)


def losses_of(run):
    """The training losses of a run that has ended, in the order of its steps."""
    records = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def records_of(run):
    """The whole lines of train.jsonl so far; none where the run has not begun it."""
    path = run / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run):
    return max((record["step"] for record in records_of(run)), default=0)


def outcome(run):
    """What two runs of the same settings share: losses by step, and the bytes of every adapter and checkpoint."""
    losses = {(r["step"], name): r[name] for r in records_of(run) for name in ("loss", "valid_loss") if name in r}
    files = [path for folder in ("adapter", "checkpoints") for path in (run / folder).rglob("*") if path.is_file()]
    return losses, {str(path.relative_to(run)): path.read_bytes() for path in files}


def last_line(log):
    lines = [line for line in re.split(r"[\r\n]+", log.read_text()) if line.strip()]
    return lines[-1]

"""`sat-lora doctor` from the command line: before a run, after one that hung, and that step once more."""

import json
import os
import re
import subprocess

import pytest

from sat_lora.cli import main
from tests.support.demo_runs import launch, options_for
from tests.support.faulty_runs import LIMIT, STEP, published_branching, run_faulty
from tests.support.paths import BIN, ROOT
from tests.support.patience import patient
from tests.support.picture_files import write_images

BRANCHING = ROOT / "tests" / "support" / "branching_script.py"


def sat_lora(*arguments, timeout=100):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(BIN / "sat-lora"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=patient(timeout), env=environment)


def mixed_data(folder):
    """A .jsonl of images and texts in turn."""
    images = write_images(folder / "images", [f"{number:03}.png" for number in range(16)])
    lines = [{"image": f"images/{path.name}", "answer": path.stem} for path in sorted(images.iterdir())]
    lines += [{"prompt": "Which number?", "answer": f"{number:03}"} for number in range(16)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "data.jsonl")


def run_that_hangs(captchas, tmp_path):
    options = [*options_for(captchas, tmp_path, "--train-iters", "8", "--watchdog-limit", "2", "--zero-stage", "2")]
    options += ["--train-data", mixed_data(tmp_path), "--batch-size", "1"]
    assert launch("torchrun", options, script=BRANCHING).returncode != 0


def check_that_it_is_explained_and_drawn(run, picture):
    """What the command says of the run."""
    told = sat_lora("doctor", "--run", run, "--plot", picture)
    assert told.returncode == 1, told.stderr
    assert told.stdout.startswith("error: gradients-differ") and "vision" in told.stdout, told.stdout
    assert picture.read_bytes()[1:4] == b"PNG"
    return told.stdout


def test_a_run_that_hung_is_explained_and_drawn(captchas, tmp_path):
    """The published branching, which no launcher ends."""
    options = options_for(captchas, tmp_path, "--train-iters", "8", "--watchdog-limit", str(LIMIT), "--zero-stage", "2")
    statuses, outputs, _ = run_faulty(published_branching, options, tmp_path)
    assert statuses[0] != 0, outputs
    text = check_that_it_is_explained_and_drawn(tmp_path / "run", tmp_path / "gradients.png")
    assert re.search("gradients arrived on rank 0 and not on rank 1: .*vision", text), text
    assert f"of step {STEP}" in text


@pytest.mark.matrix
def test_a_run_that_hung_is_explained_and_fails_again_in_the_replay(captchas, tmp_path):
    run_that_hangs(captchas, tmp_path)
    check_that_it_is_explained_and_drawn(tmp_path / "run", tmp_path / "gradients.png")
    again = sat_lora("doctor", "--run", tmp_path / "run", "--replay")
    assert again.returncode == 1 and "fails on 2 gloo ranks as well" in again.stdout, again.stdout + again.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("more", [(), ("--shrink", "1")])
def test_a_healthy_step_runs_through_in_the_replay(captchas, tmp_path, more):
    done = launch("torchrun", options_for(captchas, tmp_path, "--train-iters", "3"))
    assert done.returncode == 0, done.stderr
    before = sorted(tmp_path.rglob("*"))
    told = sat_lora("doctor", "--run", tmp_path / "run")
    assert (told.returncode, "Nothing is wrong" in told.stdout) == (0, True), told.stdout
    again = sat_lora("doctor", "--run", tmp_path / "run", "--replay", *more)
    assert again.returncode == 0 and "step 3 ran through on 2 gloo ranks" in again.stdout, again.stdout + again.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.matrix
def test_two_ranks_are_examined_from_the_command_line(captchas, tmp_path):
    arguments = options_for(captchas, tmp_path, "--lr", "1e-7", "--shrink", "1")
    told = sat_lora("doctor", "--ranks", "2", "--json", *arguments)
    assert told.returncode == 0, told.stderr
    (finding,) = json.loads(told.stdout[told.stdout.index("[\n") :])
    assert (finding["code"], finding["level"], finding["ranks"]) == ("learning-rate", "warning", [0, 1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--run", "nowhere"], "--run: nowhere does not exist; give the folder of a run"),
        (["--plot", "a.png"], "--plot: needs --run"),
        (["--run", "nowhere", "--batch-size", "4"], "--run: takes no options of a run, got --batch-size 4"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"sat-lora doctor: error: {message}")

"""`sat-lora train` and `sat-lora evaluate`: the scripts of finetune_demo/ as commands, under every launcher."""

import json
import shlex
import signal
import subprocess
import sys

import pytest

from sat_lora.cli import main
from sat_lora.commands.train import run_training
from sat_lora.errors import ConfigError
from sat_lora.parallel.launch import SAT_LORA
from sat_lora.parallel.stop_signals import Stopped
from sat_lora.watchdog import replay
from tests.support.demo_runs import environment, options_for
from tests.support.paths import ROOT, TINY_BASE
from tests.support.patience import patient
from tests.support.ranks import free_port

LAUNCHERS = {
    None: [],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}


def output_of(line):
    """What a command prints that ends with 0; it is started in the checkout."""
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=patient(200), env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_by_command(launcher, captchas, tmp_path):
    """The lines that a run of two steps prints at its end, as words by their first one."""
    start = LAUNCHERS[launcher]
    port = [str(free_port())] if start else []
    module = ["--module" if launcher == "deepspeed" else "-m", "sat_lora.cli", "train"]
    options = options_for(captchas, tmp_path, "--train-iters", "2", "--test-data", str(captchas / "test"))
    printed = output_of([sys.executable, *start, *port, *module, *options])
    lines = (line.partition(" ") for line in printed.splitlines())
    return {name: shlex.split(rest) for name, _, rest in lines if name in ("adapter", "evaluate", "resume", "chat")}


def test_a_run_by_the_command_ends_with_lines_that_go_on_with_it(captchas, tmp_path):
    lines = run_by_command(None, captchas, tmp_path)
    run = str(tmp_path / "run")
    assert lines["adapter"] == [f"{run}/adapter"]
    assert lines["evaluate"] == [sys.executable, *SAT_LORA, "evaluate", "--run", run]
    assert lines["resume"] == [sys.executable, *SAT_LORA, "train", "--resume", run, "--train-iters", "4"]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 12


@pytest.mark.parametrize("is_first", [True, False])
def test_one_rank_says_how_a_stopped_run_goes_on(is_first, captchas, tmp_path, monkeypatch, capsys):
    def stopped(config, demo):
        raise Stopped(signal.SIGTERM, 4)

    monkeypatch.setattr("sat_lora.training.finetune.finetune", stopped)
    monkeypatch.setattr("sat_lora.terminal.notice.is_first_rank", lambda: is_first)
    options = options_for(captchas, tmp_path, "--from_pretrained", str(TINY_BASE))
    assert run_training(options) == 128 + signal.SIGTERM
    line = shlex.join([sys.executable, *SAT_LORA, "train", "--resume", f"{tmp_path}/run"])
    said = f"stopped by SIGTERM after step 4; resume with: {line}\n"
    assert capsys.readouterr().out == (said if is_first else "")


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_its_lines_do_what_they_say(launcher, captchas, tmp_path):
    lines = run_by_command(launcher, captchas, tmp_path)
    (tmp_path / "run" / "evaluation.json").unlink()
    assert "base + adapter" in output_of(lines["evaluate"])
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 12
    assert "adapter     " in output_of(lines["resume"])
    assert (tmp_path / "run" / "adapter" / "latest").read_text().strip() == "4"


@pytest.mark.parametrize("command", ["train", "evaluate", "pack"])
def test_a_mistake_is_told_in_the_name_of_the_command(command, capsys):
    for argv in (["--no-such-option", "3"], ["--max-pixels", "x"]):
        with pytest.raises(SystemExit) as stop:
            main([command, *argv])
        printed = capsys.readouterr().err
        assert (stop.value.code == 2 and printed.startswith(f"sat-lora {command}: error: ")) or "usage" in printed
    if command != "pack":
        assert main([command, "--from_pretrained", "no/base", "--test-data", "x", "--train-data", "x"]) == 2
        assert capsys.readouterr().err.startswith(f"sat-lora {command}: error: ")


def test_the_help_of_the_command_is_that_of_a_run(capsys):
    for command, option in (("train", "--lora_dropout"), ("evaluate", "--eval-batch-size")):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert stop.value.code == 0 and option in printed and printed.startswith(f"usage: sat-lora {command}")


@pytest.mark.parametrize("path", ["/venv/bin/sat-lora", "sat_lora/cli.py", "/a b/sat_lora/cli.py"])
def test_a_replay_starts_the_command_again(path, tmp_path):
    assert replay._program(["python", path, "train", "--lr", "3"], str(tmp_path)) == [*SAT_LORA, "train"]


def test_a_replay_refuses_what_is_no_script_here(tmp_path):
    (tmp_path / "mine.py").touch()
    assert replay._program(["python", "mine.py"], str(tmp_path)) == [str(tmp_path / "mine.py")]
    for argv in (["python"], ["python", "other.py"], ["python", "sat_lora/other_cli.py"]):
        with pytest.raises(ConfigError, match="is no script here"):
            replay._program(argv, str(tmp_path))

"""The launch scripts, on a PATH where `deepspeed`, `srun` and `scontrol` only write down how they were called."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sat_lora.cogvlm.families import published_config
from tests.support.configs import parse_options
from tests.support.paths import DEMO, TINY_BASE

LAUNCH = DEMO / "launch"
SCONTROL = """#!/usr/bin/env bash
case "$2" in
    job) printf 'JobId=%s JobName=sat_lora\\n   Command={launch}/slurm.sh base data\\n   WorkDir=/\\n' "$3" ;;
    hostnames) seq -f 'node%03g' 0 511 ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """start(script, arguments, **environment) in a folder of its own: (status, argv of the launcher, stderr)."""
    programs, calls, here = tmp_path / "bin", tmp_path / "argv", tmp_path / "here"
    programs.mkdir()
    here.mkdir()
    for name in ("deepspeed", "srun"):
        (programs / name).write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' {name} \"$@\" > '{calls}'\n")
    (programs / "scontrol").write_text(SCONTROL.format(launch=LAUNCH))
    (here / "hosts").write_text("node0 slots=8\nnode1 slots=8\n")
    # slurmd runs a copy in a folder of its own
    spooled = tmp_path / "slurm_script"
    shutil.copy(LAUNCH / "slurm.sh", spooled)
    for program in (*programs.iterdir(), spooled):
        program.chmod(0o755)

    def run(script, *arguments, **environment):
        calls.unlink(missing_ok=True)
        path = spooled if script == "slurm.sh" else LAUNCH / script
        done = subprocess.run(
            [str(path), *arguments], capture_output=True, text=True, cwd=here, timeout=20,
            env={"PATH": f"{programs}:{os.environ['PATH']}", **environment},
        )  # fmt: skip
        return done.returncode, calls.read_text().split("\0")[:-1] if calls.exists() else None, done.stderr

    run.here = here
    return run


@pytest.mark.parametrize("script, first", [("one_machine.sh", []), ("hostfile.sh", ["hosts"])])
def test_deepspeed_starts_in_a_path_with_a_space(start, tmp_path, script, first):
    """`deepspeed` itself does not: pip writes its interpreter into its first line."""
    programs = tmp_path / "my bin"
    shutil.copytree(tmp_path / "bin", programs)
    calls = tmp_path / "python_argv"
    (programs / "python").write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" > '{calls}'\n")
    (programs / "python").chmod(0o755)
    status, _, errors = start(script, *first, "base", "data", PATH=f"{programs}:{os.environ['PATH']}")
    assert status == 0, errors
    assert calls.read_text().split("\0")[:2] == ["-m", "deepspeed.launcher.runner"]


JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[000-511]", "SLURM_NNODES": "512", "SLURM_GPUS_ON_NODE": "4"}
SCRIPTS = {"one_machine.sh": ((), {}), "hostfile.sh": (("hosts",), {}), "slurm.sh": ((), JOB)}


def test_a_job_finds_its_scripts_in_a_path_with_spaces(start, tmp_path):
    launch = tmp_path / "my own demo" / "launch"
    shutil.copytree(LAUNCH, launch)
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL.format(launch=launch))
    status, argv, errors = start("slurm.sh", "my base", "my data", **JOB)
    assert status == 0, errors
    assert str(launch.parent / "finetune_cogvlm.py") in argv and argv[argv.index("--from_pretrained") + 1] == "my base"


def split(argv):
    """(what the launcher gets, what finetune_cogvlm.py gets)."""
    argv = [word for word in argv if word != "--"]
    script = argv.index(str(DEMO / "finetune_cogvlm.py"))
    return argv[:script], argv[script + 1 :]


def test_each_script_has_its_launcher(start):
    launchers = {}
    for script, (first, environment) in SCRIPTS.items():
        status, argv, errors = start(script, *first, "base", "data", **environment)
        assert status == 0, errors
        launchers[script] = " ".join(split(argv)[0])
    assert launchers == {
        "one_machine.sh": "deepspeed --num_gpus 8",
        "hostfile.sh": "deepspeed --hostfile hosts",
        "slurm.sh": "srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun --nnodes 512 --nproc_per_node 4 "
        "--rdzv_id 4711 --rdzv_backend c10d --rdzv_endpoint node000:24711",
    }


def test_all_pass_the_same_options_and_those_that_are_added(start):
    added = ("--r", "32", "--prompt", "two words", "--save-interval", "50")
    commands = []
    for script, (first, environment) in SCRIPTS.items():
        _, argv, _ = start(script, *first, "my base", "my data", *added, RUN="shared/a run", **environment)
        commands.append(split(argv)[1])
    assert commands[0] == commands[1] == commands[2]
    assert tuple(commands[0][-len(added) :]) == added
    options = parse_options(commands[0])
    assert (options.model.from_pretrained, options.model.local_tokenizer) == ("my base", "my base")
    assert options.data.train_data == ("my data",)
    assert (options.lora.r, options.data.prompt, options.saving.save_interval) == (32, "two words", 50)
    assert options.run_folder == "shared/a run"
    assert Path(options.parallel.deepspeed_config).is_file()


@pytest.mark.parametrize(
    ("base", "says", "version", "length"),
    [
        ("cogagent-chat", {}, "chat", 400),
        ("cogagent-chat", {"text_processor_version": "chat_old"}, "chat_old", 400),
        ("cogvlm2-llama3-chat-19B", {}, "chat_old", 2432),
        ("cogvlm2-video-llama3-chat", {}, "base", 2048),
        (TINY_BASE, {"text_processor_version": "base"}, "base", 1288),
        (TINY_BASE, {}, "chat", 1288),
    ],
)
def test_the_base_says_its_prompt_format_and_length(start, base, says, version, length):
    """A base of any family trains by the same script; options that are added have the last word."""
    folder = start.here / "a base"
    folder.mkdir()
    config = published_config(base) if isinstance(base, str) else json.loads((base / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps({**config, **says}))
    for added, expected in (((), (version, length)), (("--version", "vqa", "--max_length", "77"), ("vqa", 77))):
        _, argv, _ = start("one_machine.sh", str(folder), "data", *added)
        model = parse_options(split(argv)[1]).model
        assert (model.version, model.max_length) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launchers_leave_the_options_of_the_script_alone(script, start):
    """Read by their own parsers, which know abbreviations: torchrun takes a bare `--r` for `--rdzv_...`."""
    from deepspeed.launcher import runner
    from torch.distributed import run as torchrun

    first, environment = SCRIPTS[script]
    _, argv, _ = start(script, *first, "base", "data", "--seed", "3", **environment)
    if script == "slurm.sh":
        read = torchrun.parse_args(argv[argv.index("torchrun") + 1 :])
        name, options = read.training_script, read.training_script_args
        assert (read.nnodes, read.nproc_per_node, read.rdzv_endpoint) == ("512", "4", "node000:24711")
    else:
        read = runner.parse_args(argv[1:])
        name, options = read.user_script, read.user_args
    assert (name, options) == (str(DEMO / "finetune_cogvlm.py"), split(argv)[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_a_checkpoint_is_gone_on_with(script, start):
    first, environment = SCRIPTS[script]
    run = start.here / "runs" / "finetune"
    run.mkdir(parents=True)
    assert "--resume" not in start(script, *first, "base", "data", **environment)[1]
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("200")
    command = split(start(script, *first, "base", "data", **environment)[1])[1]
    assert command[-2:] == ["--resume", "runs/finetune"]


def test_a_job_that_was_requeued_before_its_first_save_starts_over_and_nothing_else_does(start):
    run = start.here / "runs" / "finetune"
    run.mkdir(parents=True)
    (run / "train.jsonl").write_text("a line")
    requeued = {**JOB, "SLURM_RESTART_COUNT": "1"}
    assert "--overwrite" not in start("slurm.sh", "base", "data", **JOB)[1]
    assert split(start("slurm.sh", "base", "data", **requeued)[1])[1][-1] == "--overwrite"
    (run / "adapter").mkdir()
    (run / "adapter" / "latest").write_text("200")
    assert "--overwrite" not in start("slurm.sh", "base", "data", **requeued)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_arguments_are_answered_with_the_usage(script, start):
    first, environment = SCRIPTS[script]
    for arguments in ((), (*first, "base")):
        status, argv, errors = start(script, *arguments, **environment)
        assert (status, argv) == (2, None)
        assert "Usage: " in errors and script in errors and "BASE TRAIN_DATA [option ...]" in errors


def test_a_hostfile_that_is_not_there_is_refused(start):
    """DeepSpeed would say so in passing, and train on one machine."""
    status, argv, errors = start("hostfile.sh", "nowhere", "base", "data")
    assert (status, argv) == (2, None)
    assert "nowhere is no file that can be read" in errors


def test_slurm_outside_of_a_job_is_refused(start):
    status, argv, errors = start("slurm.sh", "base", "data")
    assert (status, argv) == (2, None)
    assert "there is no Slurm job here" in errors


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_bash_can_read_it(script):
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], timeout=20).returncode == 0

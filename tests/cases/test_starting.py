"""Kind 11, starting: the environment that launchers and platforms leave, ports, folders that may not be read."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from sat_lora.commands import train
from sat_lora.errors import ConfigError, SatLoraError
from sat_lora.parallel import rendezvous
from sat_lora.parallel.distributed import run_on_all_ranks
from sat_lora.parallel.launch import (
    Program,
    announce,
    command_program,
    find_place,
    ranks_on_this_machine,
    relaunch,
    sat_lora_line,
)
from sat_lora.terminal.edge import run_command
from sat_lora.terminal.notice import is_first_rank
from tests.support.configs import config_of, parse_options
from tests.support.paths import ROOT, TINY_BASE

FULL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"RANK": "abc"}, "RANK: got 'abc' from the environment, wanted a whole number of at least 0"),
        ({"RANK": "-1"}, "RANK: got '-1'"),
        ({"RANK": "²"}, "RANK: got '²'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0' from the environment, wanted a whole number of at least 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE: got '2.0'"),
        ({"WORLD_SIZE": "9" * 400}, "WORLD_SIZE: got '999"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK: got 'gpu0'"),
        ({"LOCAL_WORLD_SIZE": "eight"}, "LOCAL_WORLD_SIZE: got 'eight'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT: got 'abc' from the environment, wanted a whole number from 0 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: got '70000'"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT: got 'tcp://10.0.0.1:80'"),
        ({"MASTER_PORT": "29500\x1b[2J"}, r"MASTER_PORT: got '29500\\x1b[2J'"),
        ({**FULL, "MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({**FULL, "RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2 in the environment: ranks are 0 to WORLD_SIZE - 1"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment and RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT missing"),
        ({**FULL, "MASTER_ADDR": " "}, "MASTER_ADDR missing"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started 4 tasks and none knows its rank"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpiexec has started 2 tasks"),
        ({"SLURM_STEP_NUM_TASKS": "16", "WORLD_SIZE": "16"}, "srun has started 16 tasks"),
    ],
)
def test_a_wrong_environment_is_one_error_that_names_the_variable(environ, words, capsys):
    with pytest.raises(ConfigError) as caught:
        find_place(environ)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        parse_options([], environ=environ)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "environ, rank, size",
    [
        ({}, 0, 1),
        ({"RANK": "", "WORLD_SIZE": " "}, 0, 1),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500"}, 0, 1),
        ({"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "abc"}, 0, 1),
        ({**FULL, "SLURM_STEP_NUM_TASKS": "2"}, 1, 2),
    ],
)
def test_an_environment_of_one_or_of_a_launcher_is_taken(environ, rank, size):
    place = find_place(environ)
    assert (place.rank, place.size) == (rank, size)


def test_a_process_alone_with_a_platforms_world_says_at_once_whom_it_waits_for(capsys):
    announce(find_place({name: text for name, text in FULL.items() if name != "LOCAL_RANK"}))
    words = capsys.readouterr().err
    assert "rank 1 waits for 1 more process at 127.0.0.1:29500 (WORLD_SIZE=2 in the environment)" in words
    assert "gives up after 120 s" in words and "env -u RANK -u WORLD_SIZE" in words
    announce(find_place(FULL))
    announce(find_place({}))
    assert capsys.readouterr().err == ""


def test_it_gives_up_and_names_the_ranks_that_did_not_come(monkeypatch):
    from sat_lora.parallel import launch

    monkeypatch.setattr(launch, "BY_HAND_LIMIT", 0.3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.raises(ConfigError, match="rank 0 waited 0.3 s at .* and rank 1, 2 did not come: WORLD_SIZE=3"):
        rendezvous.meet(find_place(alone))
    with pytest.raises(ConfigError, match="rank 1 waited 0.3 s at 127.0.0.1:1 and rank 0 did not come"):
        rendezvous.meet(find_place({**alone, "RANK": "1", "MASTER_PORT": "1"}))


def test_a_port_that_another_job_has_is_named_with_what_the_launchers_want():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(ConfigError) as caught:
            rendezvous.meet(find_place(environ))
        with pytest.raises(ConfigError) as at_once:
            announce(find_place(environ), environ)
        announce(find_place(environ), {**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"})  # then it is the agent's
    for error in (caught, at_once):
        words = str(error.value)
        assert f"rank 0 cannot listen at port {port}: " in words and "ddress already in use" in words
        assert all(f"{name} --master_port {port + 1}" in words for name in ("deepspeed", "torchrun"))


def test_one_process_alone_does_not_care_for_the_port_of_another():
    with socket.create_server(("", 0)) as other:
        environ = {"WORLD_SIZE": "1", "MASTER_PORT": str(other.getsockname()[1])}
        store = rendezvous.meet(find_place(environ))
    store.set("a", "b")
    assert store.get("a") == b"b"


def test_a_machine_that_is_not_known_is_named():
    environ = {**FULL, "MASTER_ADDR": "no-such-host.invalid"}
    with pytest.raises(ConfigError, match="MASTER_ADDR: no-such-host.invalid is no name of a machine"):
        rendezvous.meet(find_place(environ))


def test_a_rank_that_is_no_number_speaks_for_itself():
    assert is_first_rank({"RANK": "abc"}) and is_first_rank({}) and is_first_rank({"RANK": " 0 "})
    assert not is_first_rank({"RANK": "3"})


def refused(*args, **kwargs):
    raise PermissionError(13, "Permission denied", "/data/im\x1b[2Jages")


def test_what_may_not_be_read_is_one_line_with_its_name(capsys, single_process_group):
    with pytest.raises(SatLoraError, match=r"/data/im\\x1b\[2Jages: Permission denied; give the user"):
        run_on_all_ranks(refused)
    assert run_command("sat-lora x", refused) == 2
    assert capsys.readouterr().err.startswith(r"sat-lora x: error: /data/im\x1b[2Jages: Permission denied; ")


def test_an_error_that_names_no_file_is_no_mistake_of_the_user(single_process_group):
    for run in (run_on_all_ranks, lambda action: run_command("x", action)):
        with pytest.raises(OSError, match="broken"):
            run(lambda: (_ for _ in ()).throw(OSError("the network is broken")))


@pytest.mark.parametrize("option", ["--train-data", "--from_pretrained", "--test-data"])
def test_folders_that_may_not_be_entered_are_problems_of_their_options(option, image_folder, base_folder, monkeypatch):
    from sat_lora.training.preflight import check_options

    closed = "/closed/folder"
    options = ["--train-data", str(image_folder), "--from_pretrained", str(base_folder), "--max_length", "64"]
    parsed = parse_options([*options, option, closed])
    stat = os.stat

    def guarded(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(closed):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", guarded)
    with pytest.raises(SatLoraError, match=f"{option}: /closed/folder.*: Permission denied"):
        check_options(parsed, environ={}, device="cpu")


def test_lines_to_paste_are_quoted_and_name_the_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/home/me/my project/.venv/bin/python")
    assert sat_lora_line("doctor", "--run", "runs/a b").startswith(
        "'/home/me/my project/.venv/bin/python' -m sat_lora.cli"
    )
    line = relaunch(Program("it", ("/x/it's here.py",)), "--resume", "runs/a $b", environ={})
    assert line == """'/home/me/my project/.venv/bin/python' '/x/it'"'"'s here.py' --resume 'runs/a $b'"""


def test_a_run_is_started_again_under_its_own_launcher():
    deepspeed = {**FULL, "CROSS_RANK": "0", "LOCAL_SIZE": "2", "MASTER_PORT": "16666"}
    torchrun = {**FULL, "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    script, command = Program("s.py", ("/s.py",)), command_program("train")
    start = "-m deepspeed.launcher.runner --num_gpus 2 --master_port 16666"
    assert relaunch(script, environ=deepspeed).endswith(f"{start} /s.py")
    assert relaunch(command, environ=deepspeed).endswith(f"{start} --module sat_lora.cli train")
    start = "-m torch.distributed.run --standalone --nproc_per_node 2"
    assert relaunch(script, environ=torchrun).endswith(f"{start} -- /s.py")
    assert relaunch(command, environ=torchrun).endswith(f"{start} -m -- sat_lora.cli train")
    assert relaunch(command, "--resume", "x", environ={}).endswith(" -m sat_lora.cli train --resume x")
    assert relaunch(script, environ={**torchrun, "LOCAL_WORLD_SIZE": "1"}) is None  # several machines
    assert relaunch(script, environ=FULL) is None  # rank by rank
    assert ranks_on_this_machine(4, {}) == 4


def what_next(run, **settings):
    own = {"train_iters": 4, "from_pretrained": "base", "save": str(run.parent), "experiment_name": run.name}
    lines = train.what_next(config_of(**own | settings), train.TRAIN, train.EVALUATE)
    return {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines.splitlines()}


def test_only_what_will_work_is_printed_and_the_best_adapter_where_it_is_better(tmp_path, monkeypatch):
    for name in FULL:
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "a run"
    (run / "adapter").mkdir(parents=True)
    (run / "merged").mkdir()
    lines = what_next(run)
    assert lines.keys() == {"adapter", "chat", "merge", "resume"}
    assert shlex.split(lines["merge"])[-4:] == ["--adapter", f"{run}/adapter", "--out", f"{run}/merged-2"]
    assert shlex.split(lines["resume"])[1:] == [*train.TRAIN.start, "--resume", str(run), "--train-iters", "8"]
    for name, step in (("latest", "4"), ("best", "2")):
        (run / "adapter" / step).mkdir()
        (run / "adapter" / name).write_text(f"{step}\n")
    lines = what_next(run, test_data=["x"], trust_checkpoint=True)
    best = ["--adapter", f"{run}/adapter/best"]
    assert shlex.split(lines["evaluate"])[1:] == [*train.EVALUATE.start, "--run", str(run), *best, "--trust-checkpoint"]
    assert lines["evaluation"] == f"{run}/evaluation.json" and lines["adapter"] == best[1]
    assert "--trust-checkpoint" in shlex.split(lines["merge"]) and best[1] in shlex.split(lines["merge"])
    assert shlex.split(lines["resume"])[6] == "--trust-checkpoint"
    assert what_next(run)["resume"].startswith(shlex.quote(sys.executable))


def test_the_line_for_merging_says_onto_what_where_the_base_is_quantised(tmp_path):
    for name, note in (("whole", {}), ("nf4", {"quantization": {"scheme": "nf4"}})):
        base = shutil.copytree(TINY_BASE, tmp_path / name)
        config = json.loads((base / "model_config.json").read_text())
        (base / "model_config.json").write_text(json.dumps({**config, **note}))
        merge = shlex.split(what_next(tmp_path / "run", from_pretrained=str(base))["merge"])
        assert merge[-4:] == (
            ["--out", f"{tmp_path}/run/merged", "--onto", "trained"]
            if note
            else ["--adapter", f"{tmp_path}/run/adapter", "--out", f"{tmp_path}/run/merged"]
        )


def test_a_model_that_ranks_share_is_evaluated_by_as_many(tmp_path, monkeypatch):
    for name, text in {**FULL, "RANK": "0", "CROSS_RANK": "0", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, text)
    lines = what_next(tmp_path, test_data=["x"], model_parallel_size=2)
    assert "-m deepspeed.launcher.runner --num_gpus 2" in lines["evaluate"]
    assert "--num_gpus" not in what_next(tmp_path, test_data=["x"])["evaluate"]
    monkeypatch.setenv("LOCAL_SIZE", "1")  # of two machines: no single line starts them
    lines = what_next(tmp_path, test_data=["x"], model_parallel_size=2)
    assert "evaluate" not in lines and lines["resume"].startswith("the launcher and the ranks that the run had, and ")


def test_options_are_parsed_before_anything_heavy_is_imported():
    code = (
        "import contextlib, io, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'finetune_demo')!r})\n"
        "import evaluate_cogvlm, finetune_cogvlm, pack_shards\n"
        "from sat_lora import cli\n"
        "commands = 'merge train evaluate pack doctor estimate export import inspect combine'.split()\n"
        "calls = [(cli.main, [name, '--help']) for name in commands]\n"
        "calls += [(cli.main, ['--help']), (cli.main, ['merge', '--x'])]\n"
        "for main in (finetune_cogvlm.main, evaluate_cogvlm.main, pack_shards.main):\n"
        "    calls += [(main, ['--help']), (main, ['--no-such-option', '3'])]\n"
        "calls += [(finetune_cogvlm.main, ['--lr', 'abc']), (finetune_cogvlm.main, ['--doctor', '--lr', 'abc'])]\n"
        "for main, argv in calls:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try:\n"
        "            main(argv)\n"
        "        except SystemExit as stop:\n"
        "            assert stop.code == (0 if '--help' in argv else 2), (argv, stop.code)\n"
        "        else:\n"
        "            raise AssertionError(argv)\n"
        "for words in ('merge --base b --adapter', 'export --to peft --adapter', 'import --from peft --base b'):\n"
        "    assert cli.main([*words.split(), 'a', '--out', '/']) == 2\n"  # the folder is there
        "heavy = {'torch', 'sat', 'deepspeed', 'transformers', 'numpy', 'webdataset', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_run_remembers_where_its_files_are(tmp_path, monkeypatch):
    from sat_lora.training.runs.run_folder import RunFolder

    (tmp_path / "my images").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ["--train-data", "my images", "gone.jsonl", "--valid-data", "s-{0..3}.tar", "pipe:cat a.tar"]
    options = parse_options([*given, "--local_tokenizer", "lmsys/vicuna"], environ={})
    RunFolder("run", is_writer=True).write_settings(options, world={})
    monkeypatch.chdir("/")
    resumed = parse_options(["--resume", str(tmp_path / "run")], environ={})
    assert resumed.data.train_data == (
        str(tmp_path / "my images"),
        "gone.jsonl",
    )  # not there: as given
    assert resumed.data.valid_data == (str(tmp_path / "s-{0..3}.tar"), "pipe:cat a.tar")
    assert resumed.model.local_tokenizer == "lmsys/vicuna"

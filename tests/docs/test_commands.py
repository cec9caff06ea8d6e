"""Every command of README and Quickstart is run: by the program that reads it, and whole in the matrix."""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from sat_lora.commands.evaluate import build_parser as evaluation_parser
from tests.support.paths import DEMO, ROOT
from tests.support.patience import patient
from tests.support.ranks import free_port

PAGES = (
    "README.md",
    "README_zh.md",
    "docs/quickstart.md",
    "docs/zh/quickstart.md",
    "docs/chat.md",
    "docs/zh/chat.md",
    "docs/serving.md",
    "docs/zh/serving.md",
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(page: str, *, kind: str = "sh") -> list[list[str]]:
    """The commands in a page's blocks of shell, as words; comments are left out and continued lines joined."""
    blocks = [body for name, body in FENCED.findall((ROOT / page).read_text(encoding="utf-8")) if name == kind]
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command]


ALL = list(dict.fromkeys(tuple(command) for page in PAGES for command in commands_of(page)))
MAKE = [command for command in ALL if command[0] == "make"]
BY_HAND = [command for command in ALL if command[0].startswith(".venv/bin/") or command[0] == "python3"]
LAUNCHED = [command for command in ALL if command[0] == "deepspeed"]
EVALUATE = [command for command in ALL if command[:2] == ("python", "finetune_demo/evaluate_cogvlm.py")]
MAKE_DATA = [command for command in ALL if command[:2] == ("python", "finetune_demo/make_conversations.py")]
TOOL = [command for command in ALL if command[0] == "sat-lora"]
INSTALLED = [command for command in ALL if command[:2] == ("pip", "install")]  # tests/test_package.py has the extras


def without_make(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a make is not the child of another, which may have started these tests."""
    return {name: value for name, value in environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def recipe(target: str, venv: str = ".no-such-environment") -> list[list[str]]:
    """What `make target` would run where nothing is set up yet, with the environment's folder called .venv."""
    command = ["make", "-n", target, f"VENV={venv}"]
    made = subprocess.run(
        command, cwd=ROOT, env=without_make(os.environ), capture_output=True, text=True, check=True, timeout=20
    )
    return [shlex.split(line.replace(venv, ".venv"), comments=True) for line in made.stdout.splitlines()]


def test_every_command_is_of_a_kind_that_is_run_here():
    known = [*MAKE, *BY_HAND, *LAUNCHED, *EVALUATE, *MAKE_DATA, *TOOL, *INSTALLED]
    assert sorted(known) == sorted(ALL)
    assert min(map(len, (MAKE, BY_HAND, LAUNCHED, EVALUATE, MAKE_DATA, TOOL))) > 0


@pytest.mark.parametrize("command", MAKE, ids=shlex.join)
def test_make_sets_up_and_runs_what_is_told(command):
    _, target = command
    last = {
        "demo": [".venv/bin/python", "-m", "deepspeed.launcher.runner", "finetune_demo/finetune_cogvlm.py"],
        "test": [".venv/bin/python", "-m", "pytest"],
    }
    assert recipe(target)[-1][: len(last[target])] == last[target]


def test_the_way_without_make_is_that_of_make():
    by_make = [command for target in ("demo", "test") for command in recipe(target) if command[0] != "touch"]
    # What `make test` gives pytest to be faster does not matter.
    by_make = [command[:3] if command[1:3] == ["-m", "pytest"] else command for command in by_make]
    by_make = [tuple(word for word in command if word != "-q") for command in by_make]
    assert list(dict.fromkeys([*by_make[:2], *by_make])) == BY_HAND


def test_a_check_takes_no_test_that_starts_ranks_or_programs():
    lint, rules, types, tests = recipe("check")[-4:]
    assert [command[1:4] for command in (lint, rules, types)] == [
        ["-m", "ruff", "format"],
        ["-m", "ruff", "check"],
        ["-m", "mypy", "sat_lora"],
    ]
    left_out = {ROOT / word.removeprefix("--ignore=") for word in tests if word.startswith("--ignore=")}
    chosen = [ROOT / word for word in tests if word.startswith("tests/")]
    assert all(path.exists() for path in (*chosen, *left_out)) and ROOT / "tests" / "test_layers.py" in chosen
    files = {file for path in chosen for file in (path.rglob("test_*.py") if path.is_dir() else [path])}
    starts = re.compile(
        r"^(?:from|import) (?:subprocess|multiprocessing|tests\.support\.(?:ranks|demo_runs|faulty_runs))\b", re.M
    )
    slow = {file for file in files if starts.search(file.read_text(encoding="utf-8"))}
    assert slow == left_out


def launched_options(command) -> list[str]:
    """The options of the script, as DeepSpeed's launcher hands them on."""
    from deepspeed.launcher.runner import parse_args

    arguments = parse_args(list(command[1:]))
    assert (ROOT / arguments.user_script).is_file()
    return arguments.user_args


@pytest.mark.parametrize("command", LAUNCHED, ids=shlex.join)
def test_launched_options_are_options(command, tmp_path, monkeypatch):
    from sat_lora.training.settings import options as module

    monkeypatch.setattr(module, "settings_of_run", lambda folder: {"given": [], "from_pretrained": str(tmp_path)})
    options = module.parse_options(launched_options(command), environ={})
    assert options.start.resume or options.data.train_data == ("my_images",)
    assert options.parallel.deepspeed_config is None or (ROOT / options.parallel.deepspeed_config).is_file()


@pytest.mark.parametrize("command", EVALUATE, ids=shlex.join)
def test_an_evaluation_takes_its_options(command):
    assert (ROOT / command[1]).is_file()
    options = evaluation_parser(command[1]).parse_args(command[2:])
    assert (options.run, options.test_data, options.no_effect) == ("runs/finetune", ["held_out"], [])


@pytest.mark.parametrize("command", TOOL, ids=shlex.join)
def test_sat_lora_takes_its_options(command, monkeypatch):
    from sat_lora.cli import build_parser
    from tests.support.configs import parse_options

    monkeypatch.chdir(ROOT)
    options, more = build_parser().parse_known_args(command[1:])
    assert options.command == command[1]
    if command[1] == "data":
        assert parse_options(["--train-data", *more], environ={}).model.version == "chat_old"
    elif command[1] == "train":
        config = parse_options(more, environ={})
        assert (config.model.version, config.run_folder) == ("chat_old", "runs/mine")
    elif command[1] == "evaluate":
        assert evaluation_parser().parse_args(more).run == "runs/mine"
    elif command[1] == "estimate":
        assert parse_options(more, environ={}).model.from_pretrained == "cogvlm-base-490"
    else:
        assert more == []


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_python_of_the_readme_runs(page, single_process_group):
    from sat_lora.cogvlm import load_cogvlm

    model, _ = load_cogvlm(DEMO / "tiny_cogvlm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (code,) = (body for kind, body in FENCED.findall((ROOT / page).read_text(encoding="utf-8")) if kind == "python")
    adapting, restoring = code.split("\n...\n")
    names = {"model": model}
    exec(adapting, names)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    exec(restoring, names)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("page", ["docs/chat.md", "docs/zh/chat.md"])
def test_the_python_of_a_conversation_runs(page, single_process_group, tmp_path, monkeypatch, capsys):
    noise = numpy.random.default_rng(0).integers(0, 256, (42, 42, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "cat.png")
    (tmp_path / "finetune_demo").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    (code,) = (body for kind, body in FENCED.findall((ROOT / page).read_text(encoding="utf-8")) if kind == "python")
    exec(code, {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first


def example_of_contributing(name):
    """The block of Python in CONTRIBUTING.md that has that word."""
    (code,) = (
        body
        for kind, body in FENCED.findall((ROOT / "CONTRIBUTING.md").read_text())
        if kind == "python" and name in body
    )
    return code


def test_the_metric_of_contributing_is_an_option(monkeypatch):
    from sat_lora.training.metrics.answers import Answers
    from sat_lora.training.metrics.registry import METRICS, metrics_named
    from tests.support.configs import parse_options

    monkeypatch.setitem(METRICS, "certainty", None)  # taken out again after the test
    exec(example_of_contributing("METRICS"), {})
    (metric,) = metrics_named(parse_options(["--valid-metrics", "certainty"]).saving.valid_metrics).values()
    chances = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    ratio = metric(Answers(chances.log(), torch.tensor([1, 0]), torch.tensor([0, 0]), 1))
    assert (float(ratio.total), ratio.count) == (pytest.approx(1.25), 2)


def test_the_metric_of_answers_of_contributing_is_one(monkeypatch):
    from sat_lora.training.metrics.generated import GENERATED, load_metric, name_problem
    from sat_lora.training.metrics.scores import Answered

    monkeypatch.setitem(GENERATED, "starts-right", None)  # taken out again after the test
    exec(example_of_contributing("GENERATED"), {})
    assert name_problem("starts-right") is None
    measured = load_metric("starts-right").measure(Answered(["a cat", "cat"], [["a"], ["a", "c"]]))
    assert measured.samples == [1, 1]


@pytest.mark.parametrize("page", ["docs/evaluation.md"])
def test_a_metric_of_ones_own_as_the_page_has_it(page, tmp_path, monkeypatch):
    from sat_lora.training.metrics.generated import load_metric
    from sat_lora.training.metrics.scores import Answered

    (code,) = (body for kind, body in FENCED.findall((ROOT / page).read_text(encoding="utf-8")) if kind == "python")
    (tmp_path / "my_metrics.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    metric = load_metric("my_metrics.py:length_error")
    assert metric.lower_is_better and metric.measure(Answered(["abc"], [["a"]])).value == 2


def test_the_kind_of_layer_of_contributing_takes_a_delta(monkeypatch, single_process_group):
    from sat_lora.lora.deltas.kinds import KINDS
    from sat_lora.lora.targets import find_sites

    monkeypatch.setitem(KINDS, "transposed", None)  # taken out again after the test
    names: dict = {}
    exec(example_of_contributing("KINDS"), names)
    site = find_sites(torch.nn.Sequential(names["Conv1D"](10, 6)))["0"]
    assert (site.kind.name, site.in_features, site.out_features) == ("transposed", 6, 10)


def test_the_schedule_of_contributing_is_an_option(monkeypatch):
    from sat_lora.training.settings import schedule
    from tests.support.configs import parse_options

    monkeypatch.setitem(schedule.DECAY_STYLES, "root", None)  # taken out again after the test
    exec(example_of_contributing("DECAY_STYLES"), {})
    assert parse_options(["--lr-decay-style", "root"]).schedule.lr_decay_style == "root"
    factors = [schedule.learning_rate_factor(step, total_steps=8, warmup_steps=2, style="root") for step in (0, 2, 7)]
    assert factors == pytest.approx([0.5, 1, 1 - (5 / 6) ** 0.5])


def test_the_layout_of_contributing_is_recognised_and_an_option(monkeypatch, tmp_path):
    from sat_lora.data.records.registry import RECORDS
    from sat_lora.data.samples import read_items
    from tests.support.configs import parse_options

    monkeypatch.setitem(RECORDS, "cards", RECORDS["prompt-answer"])  # taken out again after the test
    exec(example_of_contributing("RECORDS"), {})
    (tmp_path / "d.jsonl").write_text('{"front": "2+2?", "back": "4"}\n{"prompt": "2?", "answer": "2"}\n')
    assert [(item.prompt, item.answer) for item in read_items([tmp_path / "d.jsonl"])] == [("2+2?", "4"), ("2?", "2")]
    assert parse_options(["--data-format", "cards"]).data.data_format == "cards"


# The commands as they stand, from first to last, on the demo's base in place of CogVLM-17B, one process in place of 8.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, captchas):
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("a workplace")
    for name in ("cogvlm-base-490", "vicuna-7b-v1.5"):
        shutil.copytree(DEMO / "tiny_cogvlm", folder / name)
    shutil.copytree(captchas / "train", folder / "my_images")
    shutil.copytree(captchas / "test", folder / "held_out")
    (folder / "finetune_demo").symlink_to(DEMO)
    Image.effect_noise((42, 42), 60).convert("RGB").save(folder / "cat.png")
    return folder


def run_in(folder: Path, *command: str, status: int = 0) -> str:
    """What the command prints in that folder; it has to end with `status`."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=patient(280), env=environment())
    assert done.returncode == status, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    """This process's, with the checkout to import from."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.matrix
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_real_run_and_what_comes_after_it(page, workplace, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(workplace, folder, symlinks=True)
    for command in (command for command in commands_of(page) if command not in NEWCOMERS.values()):
        if command[0] == "deepspeed":
            script = [sys.executable, "finetune_demo/finetune_cogvlm.py"]
            options = ["64" if word == "1288" else word for word in launched_options(command)]
            if "--resume" not in options:
                run_in(folder, *script, *options)
                assert (folder / "runs" / "finetune" / "adapter" / "latest").is_file()
                for name in ("a", "b"):  # two runs to combine, and an old one of SAT's own LoRA
                    shutil.copytree(folder / "runs" / "finetune", folder / "runs" / name)
            else:
                assert "already at step" in run_in(folder, *script, *options)
        elif command[0] == "python":
            assert "12 images" in run_in(folder, sys.executable, *command[1:])
        elif command[:4] == ["sat-lora", "import", "--from", "lora2"]:
            continue  # tests/interop/test_lora2_import.py makes such a checkpoint
        elif command[0] == "sat-lora":
            refused = "hf" in command  # the demo's rotary base is one that the published code cannot run
            said = run_in(folder, sys.executable, "-m", "sat_lora.cli", *command[1:], status=2 if refused else 0)
            assert not refused or "rotary" in said


def newcomers_section(page: str) -> str:
    """The part of a quickstart that goes from data to a model that one talks to."""
    (text,) = (part for part in (ROOT / page).read_text().split("\n## ") if "make_conversations.py" in part)
    return text


QUICKSTARTS = ("docs/quickstart.md", "docs/zh/quickstart.md")
NEWCOMERS = {
    command[1]: command
    for kind, body in FENCED.findall(newcomers_section(QUICKSTARTS[0]) + "\n")
    if kind == "sh"
    for line in body.replace("\\\n", " ").splitlines()
    if (command := shlex.split(line, comments=True))
}
"""The lines of that way, by what they start."""
PICTURE = NEWCOMERS["chat"][NEWCOMERS["chat"].index("--image") + 1]


def code_of_newcomers(page: str) -> str:
    """The client of the server, in Python."""
    (code,) = (body for kind, body in FENCED.findall(newcomers_section(page) + "\n") if kind == "python")
    return code


def shortened(command: list[str]) -> list[str]:
    """The command with the options that the page has for those who want to see the way, and no right answers."""
    (sentence,) = (line for line in newcomers_section(QUICKSTARTS[0]).split("\n") if line.startswith("`--train "))
    short = dict(re.findall(r"`(--[\w-]+) (\d+)`", sentence))
    assert short.keys() == {"--train", "--train-iters"}
    return [short.get(before, word) for before, word in zip(["", *command], command)]


def test_a_newcomers_way_names_what_its_first_line_makes(monkeypatch):
    from sat_lora.commands.chat import names_of

    monkeypatch.syspath_prepend(str(DEMO))
    from make_captchas import IMAGES, plan

    assert list(NEWCOMERS) == [
        "finetune_demo/make_conversations.py", *("data", "train", "evaluate", "chat", "serve")
    ]  # fmt: skip
    assert PICTURE in {f"mine/images/{path}" for path, _ in plan("test", IMAGES["test"], 0)}
    first, second = map(code_of_newcomers, QUICKSTARTS)
    (name,) = names_of([f"{NEWCOMERS['serve'][-3]}/adapter"])
    assert first == second and f'open("{PICTURE}"' in first and first.count(f'model="{name}"') == 2
    assert f"127.0.0.1:{NEWCOMERS['serve'][-1]}/v1" in first
    lines = {page: [c for c in commands_of(page) if c in NEWCOMERS.values()] for page in QUICKSTARTS}
    assert lines[QUICKSTARTS[0]] == lines[QUICKSTARTS[1]] == [*NEWCOMERS.values()]
    assert shortened(NEWCOMERS["train"])[-1] == "20" and shortened(NEWCOMERS["evaluate"]) == NEWCOMERS["evaluate"]


def processor_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.matrix
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("is_short", [True, False], ids=["shortened", "as it stands"])
def test_a_newcomers_way_leads_from_data_to_a_model_to_talk_to(is_short, tmp_path):
    began = processor_seconds_of_children()
    folder = tmp_path / "a workplace"
    folder.mkdir()
    (folder / "finetune_demo").symlink_to(DEMO)
    printed = {}
    for name, command in NEWCOMERS.items():
        start = [sys.executable, "-m", "sat_lora.cli"] if command[0] == "sat-lora" else [sys.executable]
        line = [*start, *(shortened(command) if is_short else command)[1:]]
        if name != "serve":
            printed[name] = run_in(folder, *line)
            continue
        port = str(free_port())  # 8000 may be taken on the machine that tests
        server = subprocess.Popen(
            [*line[:-1], port], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()
        )
        try:
            wait_for_server(server, int(port))
            code = code_of_newcomers(QUICKSTARTS[0]).replace(":8000/", f":{port}/")
            answer, backwards = run_in(folder, sys.executable, "-c", code).split(" ")
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert f"samples   {'200' if is_short else '8,000'}\n" in printed["data"] and "«" in printed["data"]
    assert (folder / "mine" / "report.html").is_file()
    assert "500 images" in printed["evaluate"] and "base + adapter" in printed["evaluate"]
    assert answer == printed["chat"].strip() and backwards.strip()
    if not is_short:
        (shares,) = re.findall(r"^ +exact-match +([\d.]+) % \[.*?\] +([\d.]+) % \[", printed["evaluate"], re.MULTILINE)
        assert float(shares[0]) < 10 and float(shares[1]) > 85
        # ten minutes of two cores, whatever else they have to do
        assert processor_seconds_of_children() - began < 2 * 600


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_for_server(server: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + patient(200)
    while not is_listening(port):
        assert server.poll() is None and time.monotonic() < deadline, server.stdout.read()
        time.sleep(0.2)


@pytest.mark.matrix
@pytest.mark.timeout(1500)
def test_make_demo_prints_what_the_readme_shows(tmp_path):
    clone = tmp_path / "sat_lora"
    ignored = shutil.ignore_patterns("__pycache__", "captchas")
    for name in ("sat_lora", "finetune_demo"):
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    for name in ("Makefile", "setup.py", "constraints.txt", "README.md"):
        shutil.copy2(ROOT / name, clone)
    python = clone / ".venv" / "bin" / "python"  # this environment in place of one that is installed anew
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (clone / ".venv" / ".installed").touch()
    environ = {**without_make(environment()), "PYTHONPATH": str(clone)}
    made = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True, env=environ, timeout=1400)
    assert made.returncode == 0, made.stdout + made.stderr
    block = next(body for kind, body in FENCED.findall((ROOT / "README.md").read_text()) if "500 images" in body)
    printed = made.stdout.splitlines()
    for line in block.splitlines():
        first = re.split(r"  +|\.\.\.", line.strip())[0]
        assert [p for p in printed if p.strip().startswith(first)], line
    (matches,) = re.findall(r"^  exact-match +([\d.]+) % \[.*?\] +([\d.]+) % \[", made.stdout, re.MULTILINE)
    assert matches[0] == "3.0" and float(matches[1]) > 95

    evaluate = [sys.executable, "finetune_demo/evaluate_cogvlm.py", "--run", "runs/demo", "--quantize", "nf4"]
    run_in(clone, *evaluate, "--no-base", "--out", "nf4.json")  # what was trained on the whole base, on few bits
    result = json.loads((clone / "nf4.json").read_text())
    assert result["images"] == 500 and result["metrics"]["exact-match"]["adapter"]["value"] >= 0.93

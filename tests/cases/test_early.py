"""Kind 11, starting: what is not there, or holds results, is refused before anything slow is imported; and numbers and
paths as people write them are answered with what they meant.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sat_lora.commands.parts import refuse_missing
from sat_lora.errors import ConfigError, DataError
from sat_lora.files.paths import missing_base, missing_path
from sat_lora.parallel.launch import Place
from sat_lora.terminal.option_parser import OptionParser
from sat_lora.terminal.option_types import count, fraction, positive_int, proportions, rate
from sat_lora.training.early import check_early
from sat_lora.training.settings.config import Origin
from tests.support.configs import config_of, demo, parse_options
from tests.support.paths import ROOT

ALONE = Place(0, 1, 0, None, None, None, False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "Höhe/scan 1", "runs"):
        Path(name).mkdir(parents=True)
    Path("labels.jsonl").touch()
    Path("gone").symlink_to("nowhere/images")
    return tmp_path


@pytest.mark.parametrize(
    "text, words",
    [
        ("imges", "did you mean 'images'?"),
        ("IMAGES/", "its folder has 'images'"),
        ("label.jsonl", "did you mean 'labels.jsonl'?"),
        ("labels.jsonl/0", "labels.jsonl is no folder"),
        ("Hohe/scan 1", "there is no folder Hohe; "),
        ("höhe/scan 2", "there is no folder höhe, did you mean 'Höhe/scan 1'?"),
        ("Höhe/scan_1", "did you mean 'scan 1'?"),
        ("H%C3%B6he/scan 1", "did you mean 'Höhe/scan 1'?"),
        ("gone", "gone is a link to nowhere/images, which is not there"),
        ("~/images", "the shell has left ~ as it is: give /"),
        ("$DATA/images", "the shell has left the variable as it is"),
        ("images/*.png", "the shell has found nothing for * and ?"),
        ("images,runs", "several paths have spaces between them, not commas"),
        ("images:labels.jsonl", "spaces between them, not colons"),
        ("'images'", "its quotes are a part of the name"),
        ("“images”", "its quotes are a part of the name"),
        (" images", "it begins or ends with a space"),
        ("https://x.org/images.tar", "nothing is fetched"),
        ("file:///images", "without file://"),
        ("C:\\images", "a path of Windows"),
        ("", "got '', an empty name"),
        ("a\0b", r"a\x00b does not exist"),
        ("x\x1b[2J", r"x\x1b[2J does not exist"),
    ],
)
def test_a_path_that_leads_nowhere_is_said_with_what_was_meant(here, text, words):
    problem = missing_path(text, "give it")
    assert words in problem and problem.endswith(("; give it", "; mend the link")) and "\n" not in problem


def test_what_is_there_and_what_cannot_be_seen_is_no_problem(here, monkeypatch):
    assert missing_path("y" * 300, "") is None  # too long for a name: whoever reads it says so
    assert missing_path("images", "") is None and missing_base("images") is None
    monkeypatch.setattr(os, "stat", lambda *args, **more: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert missing_path("closed/images", "") is None


def test_all_that_is_known_early_is_one_error(here):
    (here / "runs" / "finetune").mkdir()
    (here / "runs" / "finetune" / "evaluation.json").write_text("{}")
    options = parse_options(["--from_pretrained", "bse", "--train-data", "imges", "--valid-data", "x.tar"], environ={})
    with pytest.raises(ConfigError) as caught:
        check_early(options, ALONE)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems with the options:"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "- --save",
        "- --from_pretrained",
        "- --train-data",
        "- --valid-data",
    ]
    with pytest.raises(ConfigError, match="3 problems"):
        check_early(options, ALONE, writes=False)
    with pytest.raises(DataError, match="--train-data: imges does not exist"):
        check_early(config_of(from_pretrained="images", train_data=["imges"]), ALONE, writes=False)


def test_what_is_made_or_found_out_later_is_no_problem_yet(here):
    options = parse_options(["--train-data", "s-{0..3}.tar", "pipe:cat a.tar", "images"], environ={})
    check_early(options, ALONE)
    options = options.replaced(train_data=["demo/captchas/train"])
    check_early(options, ALONE, demo=demo.demo_in("demo"))
    Path("demo/captchas").mkdir(parents=True)
    with pytest.raises(DataError, match="make_captchas.py writes the demo's data"):
        check_early(options.replaced(Origin.DEMO, train_data=["demo/captchas/train"]), ALONE, demo=demo.demo_in("demo"))


@pytest.mark.parametrize("rank, local_rank, speaks", [(1, 1, None), (8, 0, "rank 8 on "), (9, 1, "")])
def test_one_rank_of_a_machine_speaks_and_all_end(here, rank, local_rank, speaks, capsys):
    options = parse_options(["--train-data", "imges"], environ={})
    place = Place(rank, 16, local_rank, "a", 1, "torchrun", True)
    with pytest.raises((DataError, SystemExit)) as caught:  # the first machine's leave it to `run_command`
        check_early(options, place)
    assert isinstance(caught.value, DataError) == (speaks is None)
    assert getattr(caught.value, "code", 2) == 2
    said = capsys.readouterr().err
    assert (f"error: rank 8 on {socket.gethostname()}: --train-data: imges" in said) == bool(speaks)
    assert said.count("\n") == bool(speaks)


def test_commands_refuse_all_folders_that_are_not_there(here):
    with pytest.raises(ConfigError) as caught:
        refuse_missing("imges", base="THUDM/cogvlm")
    assert "--adapter: imges does not exist; did you mean 'images'?" in str(caught.value)
    assert "--base: THUDM/cogvlm is not a SAT model folder" in str(caught.value)
    refuse_missing("images", base="runs")


def test_used_folders_and_slips_are_answered_before_anything_heavy_is_imported(here):
    (here / "runs" / "finetune" / "adapter" / "1").mkdir(parents=True)
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'finetune_demo')!r})\n"
        "import evaluate_cogvlm, finetune_cogvlm\n"
        "from sat_lora import cli\n"
        "tiny = finetune_cogvlm.HERE / 'tiny_cogvlm'\n"
        "calls = [(finetune_cogvlm.main, words.split()) for words in ('--train-data images', '--train-data imges',\n"
        "         '--train-data imges --doctor', '--from_pretrained no/base')]\n"
        "words = ['--from_pretrained', str(tiny), *'--test-data imges --adapter y'.split()]\n"
        "calls += [(evaluate_cogvlm.main, words)]\n"
        "calls += [(cli.main, words.split()) for words in ('merge --base x --adapter y --out z', 'inspect y',\n"
        "          'export --to peft --adapter y --out z', 'import --from peft y --base x --out z',\n"
        "          'combine y z --method svd --out images',\n"
        "          'doctor --train-data imges', 'doctor --ranks 2 --train-data imges', 'doctor --run y',\n"
        "          'estimate --from_pretrained x')]\n"
        "assert [main(words) for main, words in calls] == [2] * len(calls)\n"
        "heavy = {'torch', 'sat', 'deepspeed', 'transformers', 'numpy', 'webdataset', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "runs/finetune holds the results of a run: adapter (1)" in lines[0]
    assert sum("error: " in line for line in lines) == 14 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "kind, text, meant",
    [
        (rate, "0,0001", "0.0001"),
        (rate, "1e−4", "1e-4"),
        (rate, "1,5e-4", "1.5e-4"),
        (rate, "5x10^-4", "5e-4"),
        (rate, "10**-4", "1e-4"),
        (rate, "0.0001,", "0.0001"),
        (rate, "1 e-4", "1e-4"),
        (rate, "0.01%", "0.0001"),
        (fraction, "0,05", "0.05"),
        (positive_int, "1,000", "1000"),
        (positive_int, "1.000", "1000"),
        (positive_int, "12 000", "12000"),
        (count, "1.500.000", "1500000"),
    ],
)
def test_a_number_as_it_is_written_elsewhere_is_answered_with_ours(kind, text, meant):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"did you mean {re.escape(meant)}\?$"):
        kind(text)
    kind(meant)


@pytest.mark.parametrize("text", ["abc", "", "-0,1", "0,0,1", "1k", "nan", "\x1b[2J", "9" * 5000 + "x"])
def test_what_is_no_number_anywhere_has_no_hint(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        rate(text)
    assert "did you mean" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "text, meant",
    [
        ("0,8", "here: 0.8,..."),
        ("0,8,0,1,0,1", "here: 0.8,0.1,0.1"),
        ("0,8;0,2", "here: 0.8,0.2"),
        ("0.8/0.2", "did you mean 0.8,0.2?"),
        ("80%,20%", "did you mean 80,20?"),
        ("0.8:0.1:0.1", "did you mean 0.8,0.1,0.1?"),
        ("80,20", "give 0.8,0.2"),
        ("all", "no spaces"),
    ],
)
def test_shares_that_are_written_elsewise_are_answered_with_ours(text, meant):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        proportions(text)
    assert str(caught.value).endswith(meant)


@pytest.mark.parametrize("option", ["--train-data", "--experiment-name", "--save", "--deepspeed_config", "--resume"])
@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_a_variable_that_is_not_set_is_no_path(option, text, capsys):
    with pytest.raises(SystemExit):
        parse_options([option, text], environ={})
    assert f"argument {option}: got {text!r}, an empty name" in capsys.readouterr().err
    parser = OptionParser()
    parser.add_argument("--prompt")
    assert parser.parse_args(["--prompt", text]).prompt == text


def test_a_rank_that_ends_silently_lets_the_first_one_speak_under_a_launcher(monkeypatch):
    """A launcher ends all ranks when one has ended: the one that says why must not be ended before it has."""
    from sat_lora.terminal import edge

    waits = []
    monkeypatch.setattr(edge.time, "sleep", waits.append)
    for launcher in ({"TORCHELASTIC_RUN_ID": "x"}, {"CROSS_RANK": "0"}, {}):
        for rank in ("0", "1"):
            edge.let_first_rank_speak({"RANK": rank, **launcher})
    assert waits == [edge.TO_SPEAK] * 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit):
        parse_options(["--lr", "x"], environ={})
    assert edge.run_command("x", lambda: (_ for _ in ()).throw(ConfigError("x"))) == 2
    assert len(waits) == 4

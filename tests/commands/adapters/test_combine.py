"""`sat-lora combine`. For `sat-lora merge` see tests/adapters/test_merge.py."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from sat_lora import combine_adapters
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from tests.support.combining import adapter_maker, assert_same, deltas_of, summed

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, single_process_group):
    make = adapter_maker(tmp_path_factory.mktemp("adapters"))
    return [make(0), make(1)]


@pytest.fixture
def run(capsys):
    def command(*arguments):
        status = main(["combine", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.mark.parametrize("folders_first", [True, False])
def test_the_command_combines_and_says_where(run, pair, tmp_path, folders_first):
    options = ["--method", "cat", "--out", tmp_path / "out"]
    ordered = [*pair, *options] if folders_first else [*options, *pair]
    assert run(*ordered, "--weights", "0.7", "-0.3") == (0, f"combined adapter in {tmp_path / 'out'}\n", "")
    assert_same(deltas_of(tmp_path / "out"), summed(pair, [0.7, -0.3]), 1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "linear"},
        {"method": "svd", "rank": 2},
        {"method": "ties", "density": 0.4, "majority_sign": "frequency"},
        {"method": "ties", "density": 0.4, "majority_sign": "total"},
    ],
)
def test_every_option_reaches_the_function(run, pair, tmp_path, options):
    typed = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert run(*pair, *typed, "--out", tmp_path / "typed")[0] == 0
    combine_adapters(pair, tmp_path / "called", **options)
    typed, called = (read_adapter(tmp_path / name).tensors for name in ("typed", "called"))
    assert typed.keys() == called.keys() and all(torch.equal(typed[key], called[key]) for key in typed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tise"], "there is no method 'tise', did you mean 'ties'? known: cat, linear, svd, ties"),
        (["--method", "ties"], "ties needs a density, the share of values that it keeps, for example 0.5"),
        (["--method", "cat", "--rank", "4"], "rank is for svd, cat does not use it"),
        (
            ["--method", "cat", "--weights", "1"],
            "weights has to be one finite number for each of 2 folders, got [1.0]",
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(run, pair, tmp_path, arguments, message):
    expected = f"sat-lora combine: error: not combined: {message}\n"
    assert run(*pair, "--out", tmp_path / "out", *arguments) == (2, "", expected)
    assert not (tmp_path / "out").exists()


def test_many_wrong_folders_are_one_line_and_status_2(run, pair, tmp_path):
    broken = shutil.copytree(pair[1], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    status, out, err = run(pair[0], broken, tmp_path / "nowhere", "--method", "cat", "--out", tmp_path / "out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"sat-lora combine: error: not combined: {broken}/adapter_model.safetensors: cannot be read")
    assert f"{tmp_path}/nowhere is not an adapter folder" in err


def test_a_place_that_cannot_be_written_is_one_line_and_status_2(run, pair, tmp_path):
    (tmp_path / "file").touch()
    status, out, err = run(*pair, "--method", "cat", "--out", tmp_path / "file" / "out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{tmp_path}/file/out: the combined adapter could not be written" in err


def test_a_missing_option_is_named(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("a", "b")
    assert stop.value.code == 2 and "required: --out, --method" in capsys.readouterr().err


def test_help_holds_an_example(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0 and "examples:\n  sat-lora combine runs/a/adapter" in capsys.readouterr().out


def test_a_reader_that_has_heard_enough_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "sat_lora.cli", "runs", str(tmp_path)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr

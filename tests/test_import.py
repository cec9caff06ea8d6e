"""Importing the package is quiet and starts nothing."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


def python(code, **environment):
    """A fresh interpreter with Python's own warning settings, in which nobody has imported anything."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "SAT_LOGLEVEL", "LOGLEVEL", "RANK")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_importing_prints_nothing_and_starts_nothing():
    """Where no GPU is visible; logging is left as it was, here with what is below any level that is logged at."""
    assert python(
        "import logging\n"
        "logging.disable(1)\n"
        "import sat_lora, sat_lora.cogvlm, sat_lora.adapters.merge, sat_lora.cli\n"
        "from sat_lora import *\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert logging.root.manager.disable == 1\n",
        CUDA_VISIBLE_DEVICES="",
    ) == ("", "")


def test_what_needs_no_torch_imports_at_once():
    code = "import sys, sat_lora, sat_lora.training.runs.listing; print({'torch', 'sat'} & sys.modules.keys())"
    assert python(code) == ("set()\n", "")


def test_every_public_name_is_there():
    import sat_lora

    assert all(getattr(sat_lora, name) is not None for name in sat_lora.__all__)
    assert issubclass(sat_lora.ConfigError, ValueError)
    for name in ("AdapterError", "CheckpointError", "ConfigError", "DataError"):
        assert issubclass(getattr(sat_lora, name), sat_lora.SatLoraError)


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("merge", "combine", "export", "import", "inspect"))]
)
def test_the_command_explains_itself(arguments, capsys):
    from sat_lora.cli import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith("usage: sat-lora")
    assert arguments == ["--help"] or f"example:\n  sat-lora {arguments[0]} " in shown.replace("examples", "example")


def test_a_sat_that_lacks_what_is_needed_is_one_error_with_its_version(tmp_path):
    (tmp_path / "sat").mkdir()
    (tmp_path / "sat" / "__init__.py").write_text("")
    about = tmp_path / "SwissArmyTransformer-0.4.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: SwissArmyTransformer\nVersion: 0.4.9\n")
    code = (
        "try:\n    from sat_lora import LoraMixin\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    )
    output, errors = python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert output.startswith("VersionError SwissArmyTransformer 0.4.9 lacks what sat_lora needs of it (cannot import")
    assert "from 0.4.10 on it is there: pip install" in output and errors == ""


def test_what_sat_itself_lacks_is_not_said_of_sat():
    from sat_lora import _sat

    with pytest.raises(ModuleNotFoundError) as error:
        _sat._refuse(ModuleNotFoundError("No module named 'einops'", name="einops"))
    assert error.type is ModuleNotFoundError

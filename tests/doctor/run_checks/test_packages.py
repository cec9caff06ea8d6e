"""Packages that cannot be imported, with the real cause, and versions that do not fit, each planted."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

from sat_lora.doctor.run_checks.packages import IMPORTS, compare_versions, package_findings
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(60)


def write_package(folder, name, code, **files):
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    for file, content in files.items():
        (package / file).write_bytes(content)


def told_of_packages(folder, *imports):
    """(code, seen, module, fix) of each finding, in a process that finds `folder` first on its path."""
    script = (
        "import json; from sat_lora.doctor.run_checks.packages import package_findings\n"
        f"found = package_findings({ {name: name for name in imports}!r}, gpu='nowhere')\n"
        "print(json.dumps([(one.code, one.seen, one.module, one.fix) for one in found]))"
    )
    environ = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=folder, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_package_that_setup_requires_is_tried():
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    required = ast.literal_eval(next(one.value for one in calls if one.arg == "install_requires"))
    assert {one.split(">")[0] for one in required} == {*IMPORTS}


def test_a_missing_module_is_named_behind_a_misleading_error(tmp_path):
    write_package(tmp_path, "outer", "try:\n  import inner\nexcept ImportError:\n  raise RuntimeError('no') from None")
    write_package(tmp_path, "inner", "import not_there.at_all")
    write_package(tmp_path, "other", "import inner")
    ((code, seen, module, fix),) = told_of_packages(tmp_path, "outer", "other")
    assert (code, module) == ("missing-module", "not_there") and fix.endswith(" not_there")
    assert seen.startswith("outer, other cannot be imported: ModuleNotFoundError: No module named 'not_there'")
    assert f"inner{os.sep}__init__.py:1" in seen and "RuntimeError: no" in seen


def test_an_import_that_failed_before_a_name_error_is_named(tmp_path):
    code = (
        "try:\n  from not_there import Base\nexcept Exception as e:\n  print('Failed:', e)\nclass Derived(Base): pass"
    )
    write_package(tmp_path, "outer", code)
    ((code, seen, module, _),) = told_of_packages(tmp_path, "outer")
    assert (code, module) == ("missing-module", "not_there") and "NameError: name 'Base' is not defined" in seen


def test_a_package_that_is_there_and_broken_is_named_with_its_library(tmp_path):
    write_package(tmp_path, "outer", "import outer._core", **{"_core.so": b"\x7fELF, and no more"})
    write_package(tmp_path, "loader", "import ctypes\nctypes.CDLL('libnot_there.so.12')")
    (core, library) = told_of_packages(tmp_path, "outer", "loader")
    assert core[0] == "missing-module" and "outer/_core.so: " in core[1]
    assert "libnot_there.so.12: cannot open shared object file" in library[1] and "libnot_there.so.12" in library[3]


def test_a_folder_of_that_name_is_no_package(tmp_path):
    (tmp_path / "outer" / "run-1").mkdir(parents=True)  # as wandb leaves one where a run was started
    ((code, seen, _, fix),) = told_of_packages(tmp_path, "outer")
    assert code == "missing-module" and f"{tmp_path / 'outer'} is a folder without code" in seen and "rename" in fix


def test_the_command_names_a_broken_package_that_keeps_it_from_starting(tmp_path):
    write_package(tmp_path, "triton", "import ctypes\nctypes.CDLL('libnot_there.so.12')")
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "finetune_demo" / "finetune_cogvlm.py"), "--doctor"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "error: missing-module" in done.stdout, done.stderr
    assert "SwissArmyTransformer, triton cannot be imported" in done.stdout and "libnot_there.so.12" in done.stdout


def test_a_version_outside_of_its_range_is_found(tmp_path):
    for name, version, wants in (("sat_lora", "0.1.0", "fake_lib>=2"), ("fake_lib", "1.5", "fake_lib>=1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {wants}\n"
        (folder / "METADATA").write_text(text)
    write_package(tmp_path, "fake_lib", "")
    ((code, seen, _, fix),) = told_of_packages(tmp_path, "fake_lib")
    assert (code, fix) == ("versions", "pip install 'fake_lib>=2'")
    assert seen == "sat_lora wants fake_lib>=2, and 1.5 is installed"


def test_a_torch_without_cuda_beside_a_gpu_is_found(tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = package_findings({}, gpu=tmp_path / "nvidia0")
    assert finding.code == "versions" and "built without CUDA" in finding.seen
    assert package_findings({}, gpu=tmp_path / "nvidia1") == []


def test_versions_are_compared_by_majority():
    findings = compare_versions([{"torch": "2.6"}, {"torch": "2.7"}, {"torch": "2.7"}])
    assert [(one.ranks, one.seen) for one in findings] == [((0,), "torch is 2.6 on rank 0; 2.7 on rank 1, 2")]

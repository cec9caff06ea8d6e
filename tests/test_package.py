"""What is installed: the package's metadata, its data files and what it asks for; and, built, that it works without the
checkout.
"""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import setuptools

import sat_lora
from sat_lora.cogvlm.families import published
from tests.support.paths import ROOT

PACKAGE = ROOT / "sat_lora"
INSTALLED_AS = {"PIL": "Pillow", "rouge_score": "rouge-score", "sat": "SwissArmyTransformer", "yaml": "PyYAML"}


@pytest.fixture(scope="module")
def metadata():
    """The arguments of setup.py's call."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: calls.append(arguments))
        patch.chdir(ROOT)
        runpy.run_path("setup.py", run_name="__main__")
    return calls[0]


def imported_packages(file: Path) -> tuple[set[str], set[str]]:
    """The first names of all absolute imports of a module, at its top and inside functions: those that it needs, and
    those that it does without where they are not installed.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    missing = re.compile("ImportError|ModuleNotFoundError")
    optional = {
        node
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try) and any(missing.search(ast.dump(handler)) for handler in attempt.handlers)
        for statement in attempt.body
        for node in ast.walk(statement)
    }
    names: tuple[set[str], set[str]] = (set(), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names[node in optional].update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names[node in optional].add(node.module.split(".")[0])
    return names


def test_the_version_is_the_same_everywhere(metadata):
    assert metadata["version"] == sat_lora.__version__
    assert f"\nversion: {metadata['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {metadata['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_folder_with_code_is_a_package_that_is_installed(metadata):
    folders = {file.parent.relative_to(ROOT) for file in PACKAGE.rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(metadata["packages"])


def test_every_file_beside_the_code_is_installed(metadata):
    others = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    sizes = {name for name in others if name.startswith("cogvlm/published/") and name.endswith(".json")}
    assert others == set(metadata["package_data"]["sat_lora"]) == {"py.typed", *sizes}
    assert len(sizes) == len(published())


def test_the_licence_is_the_one_that_is_named(metadata):
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    assert metadata["license"] == "Apache-2.0" and metadata["license_files"] == ["LICENSE"]
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert text.endswith("limitations under the License.")


# Folders that are imported by a command alone, which says what to install where it is missing.
EXTRA_OF_FOLDER = {"serve": {"fastapi", "prometheus_client", "starlette", "uvicorn"}}


def test_what_the_package_imports_it_asks_for_and_no_extra(metadata):
    required = {name_of_requirement(line) for line in metadata["install_requires"]}
    assert EXTRA_OF_FOLDER["serve"] == {name_of_requirement(line) for line in metadata["extras_require"]["serve"]}
    extras = {name_of_requirement(line) for lines in metadata["extras_require"].values() for line in lines}
    own = {"sat_lora"} | set(sys.stdlib_module_names)
    needed: dict[str, set[str]] = {}  # beside what is required: everything, where what is missing is done without
    for file in PACKAGE.rglob("*.py"):
        always, at_will = imported_packages(file)
        allowed = required | EXTRA_OF_FOLDER.get(file.parent.name, set())
        needed |= {f"{file}: {n}": allowed for n in always - own if INSTALLED_AS.get(n, n) not in allowed}
        needed |= {f"{file}: {n}": extras for n in at_will - own if INSTALLED_AS.get(n, n) not in required | extras}
    assert not needed
    assert not extras & required


def name_of_requirement(requirement: str) -> str:
    return requirement.split("<")[0].split(">")[0].split("=")[0].strip()


def test_the_long_description_is_the_readme(metadata):
    assert metadata["long_description"] == (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["long_description_content_type"] == "text/markdown"


def test_files_that_the_source_distribution_names_are_there():
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        command, *names = line.split() or [""]
        if command in ("include", "graft"):
            assert [name for name in names if not (ROOT / name).exists()] == []


MERGE = """
import pathlib, sys, torch
from sat_lora import LoraConfig, LoraMixin, add_lora, save_adapter
from sat_lora.cogvlm import load_cogvlm
import sat_lora
assert "site-packages" in sat_lora.__file__, sat_lora.__file__
assert (pathlib.Path(sat_lora.__file__).parent / "py.typed").is_file()
model, _ = load_cogvlm(sys.argv[1])
add_lora(model, LoraConfig(r=2))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.01)
save_adapter(model, "adapter")
"""


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_a_wheel_from_the_source_distribution_works_without_the_checkout(tmp_path):
    folder = tmp_path / "a path with spaces"
    folder.mkdir()
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*command, status=0, cwd=folder):
        command = [*map(str, command)]
        done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    # The two calls that `python -m build` makes: the source distribution, and the wheel from what that holds.
    build = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "build_sdist", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    wanted = ["LICENSE", "sat_lora/py.typed", "finetune_demo/tiny_cogvlm/latest", "tests/support/tiny.py"]
    wanted.append("docs/errors.md")
    assert [name for name in wanted if not (unpacked / name).is_file()] == []
    run(sys.executable, "-c", build, "build_wheel", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")

    # What sat_lora asks for comes from this environment; sat_lora itself, and the demo's extras, do not.
    run(sys.executable, "-m", "venv", folder / "env")
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    python, command = folder / "env" / "bin" / "python", folder / "env" / "bin" / "sat-lora"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    base = shutil.copytree(ROOT / "finetune_demo" / "tiny_cogvlm", folder / "base")
    assert "merge" in run(command, "--help")
    run(python, "-c", MERGE, base)
    run(command, "merge", "--base", base, "--adapter", "adapter", "--out", "merged")
    assert (folder / "merged" / "model_config.json").is_file()
    said = run(command, "estimate", status=2)
    assert "the demo is not installed" in said and "finetune_demo/ of a clone of sat_lora" in said

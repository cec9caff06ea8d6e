"""Which lines of a stack are the project's or the user's own, wherever the folders lie and whatever they are called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sat_lora.watchdog.places import PACKAGE, own_place, places_of

CLONE = "/home/me/sat_lora"  # git's default
LIBRARY = "lib/python3.12/site-packages"
INSTALLED = f"{CLONE}/.venv/{LIBRARY}"


def is_own(file, package):
    (place,) = places_of([(file, 1, "f", "")], package)
    return place.is_own


@pytest.mark.parametrize(
    "package",
    [
        f"{CLONE}/sat_lora",  # editable, in a clone called sat_lora
        "/srv/my code/sat_lora",  # editable, elsewhere
        f"{INSTALLED}/sat_lora",  # installed, and the user's project is called sat_lora
        f"/opt/conda/{LIBRARY}/sat_lora",
        "/work/lora",  # a package by another name
    ],
)
def test_own_lines_are_the_packages_without_the_doctor_and_the_users(package):
    assert is_own(f"{package}/training/step.py", package)
    assert is_own(f"{package}/cogvlm/doctor/x.py", package)
    assert not is_own(f"{package}/doctor/watchdog.py", package)
    for users in (f"{CLONE}/finetune_demo/mine.py", f"{CLONE}/doctor/hook.py", "/home/me/my sat_lora/mine.py"):
        assert is_own(users, package)
    for foreign in (
        f"{INSTALLED}/torch/autograd/graph.py",
        f"{INSTALLED}/sat_lora2/mixin.py",
        f"{CLONE}/.venv/lib64/{LIBRARY.removeprefix('lib/')}/deepspeed/comm/torch.py",
        "/usr/lib/python3.12/threading.py",
        "/usr/lib/python3/dist-packages/numpy/core.py",
        "<frozen runpy>",
    ):
        assert not is_own(foreign, package)


@pytest.mark.parametrize("package", [f"{CLONE}/sat_lora", "/srv/my code/sat_lora", f"{INSTALLED}/sat_lora"])
def test_a_run_that_has_not_kept_its_package_is_read_by_form(package):
    assert is_own(f"{package}/training/step.py", None)
    assert not is_own(f"{package}/doctor/watchdog.py", None)
    assert is_own(f"{CLONE}/finetune_demo/mine.py", None)
    assert not is_own(f"{INSTALLED}/torch/autograd/graph.py", None)
    assert not is_own("/usr/lib/python3.12/threading.py", None)


def test_the_innermost_own_place_is_the_one_and_without_any_the_innermost():
    frames = [(f"{INSTALLED}/torch/utils/data.py", 1, "get", ""), (f"{CLONE}/mine.py", 2, "load", "open()")]
    assert own_place(places_of(frames, None)).words == f"load ({CLONE}/mine.py:2): open()"
    assert own_place(places_of(frames[:1], None)).function == "get"
    assert own_place(()) is None


LOOK = """
import sys
from sat_lora.files import atomic
from sat_lora.watchdog import places
frames = [(file, 1, "f", "") for file in (atomic.replace_text.__code__.co_filename, places.__file__)]
print([place.is_own for place in places.places_of(frames, places.PACKAGE)], places.PACKAGE)
"""


@pytest.mark.parametrize("place", ["sat_lora", "a folder/sat_lora", f"sat_lora/.venv/{LIBRARY}"])
@pytest.mark.parametrize("put", [shutil.copytree, os.symlink], ids=["copied", "linked"])
def test_a_process_knows_its_package_by_the_name_that_its_frames_carry(place, put, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    put(PACKAGE, folder / "sat_lora")
    program = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{LOOK}"]
    printed = subprocess.run(program, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60).stdout
    assert printed == f"[True, False] {Path(folder, 'sat_lora')}\n"

"""The Dockerfile: what it copies is there and not left out, and what it installs can be installed."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

IGNORED = ROOT / ".dockerignore"
KNOWN = set("FROM RUN ENV WORKDIR COPY USER EXPOSE ENTRYPOINT CMD".split())


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = filter(None, map(str.strip, re.sub(r"\\\n", " ", text).split("\n")))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def copied() -> list[str]:
    return [source for word, rest in instructions() if word == "COPY" for source in shlex.split(rest)[:-1]]


def pip_line() -> list[str]:
    """The words of the line that installs the package, after `pip install`."""
    (line,) = (rest for word, rest in instructions() if word == "RUN" and "pip install" in rest)
    return shlex.split(line.partition("pip install ")[2])


def is_sent(path: str) -> bool:
    """Whether `docker build` sends a path of the checkout, by .dockerignore: the last line that fits it decides."""
    sent = True
    for line in IGNORED.read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        parts = [path, *map(str, Path(path).parents)]
        if any(fnmatch.fnmatchcase(part, pattern) or fnmatch.fnmatchcase(f"/{part}", pattern[1:]) for part in parts):
            sent = line.startswith("!")
    return sent


def test_its_instructions_are_known_and_begin_with_a_base_that_is_named():
    words = [word for word, _ in instructions()]
    assert words[0] == "FROM" and set(words) <= KNOWN and words.count("FROM") == 1
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", dict(instructions())["FROM"])
    assert "3.11" in dict(instructions())["FROM"]  # which the constraints are for
    for word in ("ENTRYPOINT", "CMD"):
        assert all(isinstance(part, str) for part in json.loads(dict(instructions())[word]))
    assert words.index("USER") < words.index("ENTRYPOINT") and dict(instructions())["USER"] != "root"


def test_what_it_copies_is_there_and_sent():
    assert copied() and [path for path in copied() if not (ROOT / path).exists()] == []
    assert all(map(is_sent, [*copied(), "sat_lora/py.typed", "finetune_demo/tiny_cogvlm/latest"]))


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "runs/mine/run.json", "finetune_demo/captchas/train/1.png", ".env", "key.pem",
     "sat_lora/__pycache__/cli.pyc", "docs/index.md", "tests/conftest.py", "data.tar"],
)  # fmt: skip
def test_nothing_else_is_sent(path):
    assert not is_sent(path)


def test_it_installs_extras_that_there_are():
    (package,) = (word for word in pip_line() if word.startswith("."))
    names = package.partition("[")[2].rstrip("]").split(",")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert names == sorted(names) and all(f'"{name}": [' in setup for name in names)
    assert pip_line()[:2] == ["-c", "constraints.txt"] and "constraints.txt" in copied()


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_its_pip_line_installs(tmp_path):
    """From what is copied, in an environment of its own: all is found that it wants, and the package itself works."""
    context = tmp_path / "context"
    context.mkdir()
    for path in copied():
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, context / path, ignore=shutil.ignore_patterns("__pycache__", "captchas"))
        else:
            shutil.copy2(ROOT / path, context)
    python = tmp_path / "env" / "bin" / "python"

    def run(*command):
        done = subprocess.run([*map(str, command)], cwd=context, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "env")
    found = run(python, "-m", "pip", "install", "--dry-run", *pip_line())
    assert re.search(r"^Would install .*\bgradio-\S+.*\bsat[_-]lora-", found, re.MULTILINE)
    run(python, "-m", "pip", "install", "--no-deps", *pip_line())
    assert "serve" in run(tmp_path / "env" / "bin" / "sat-lora", "--help")

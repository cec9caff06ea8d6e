"""finetune_demo/demo.ipynb: its cells are Python and commands that there are; in the matrix it is executed."""

import ast
import json
import os
import re
import shlex
import shutil

import pytest

from tests.support.configs import parse_options
from tests.support.paths import DEMO, ROOT

NOTEBOOK = DEMO / "demo.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = {cell["id"]: "".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"}
COMMAND = re.compile(r"^\s*!(.*)$", re.MULTILINE)


def test_it_holds_no_output_and_every_cell_has_a_name():
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) >= (4, 5) and len({*ids}) == len(ids)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in CONTENT["cells"])
    assert all(len(line) <= 140 for cell in CONTENT["cells"] for line in cell["source"])


@pytest.mark.parametrize("name", CODE)
def test_a_cell_is_python(name):
    tree = ast.parse(re.sub(r"^(\s*)!.*$", r"\1pass", CODE[name], flags=re.MULTILINE))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sat_lora"):
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            assert all(hasattr(module, alias.name) for alias in node.names)


def values_in(code: str) -> list[tuple[str, str]]:
    """The texts that a cell gives names, for its commands."""
    assignments = re.findall(r"^([A-Z]+(?:, [A-Z]+)*) = (\".*\")$", code, re.MULTILINE)
    return [
        pair for names, texts in assignments for pair in zip(names.split(", "), shlex.split(texts.replace(",", " ")))
    ]


def test_its_commands_are_read_by_the_programs():
    from sat_lora.cli import build_parser

    values = {"STEPS": "7"} | dict(pair for code in CODE.values() for pair in values_in(code))
    lines = [line for code in CODE.values() for line in COMMAND.findall(code)]
    lines = [re.sub(r"\{([A-Z]+)\}", lambda name: values.get(name[1], name[0]), line) for line in lines]
    commands = [shlex.split(line) for line in lines]
    assert {command[0] for command in commands} == {"{PYTHON}"}
    kinds = []
    for _, *words in commands:
        kinds.append(" ".join(words[:3]) if words[0] == "-m" else words[0])
        if words[:2] == ["-m", "sat_lora.cli"]:
            build_parser().parse_args(words[2:])
        elif words[0] != "-m":
            assert (ROOT / words[0]).is_file() and parse_options(words[1:]).schedule.train_iters == 7
    assert kinds == [
        "-m pip install",
        "finetune_demo/finetune_cogvlm.py",
        *["-m sat_lora.cli " + c for c in ("inspect", "merge")],
    ]


def test_a_place_in_the_clone_is_found_from_below_it(monkeypatch):
    monkeypatch.chdir(ROOT / "docs" / "tools")
    names: dict = {}
    exec(CODE["place"], names)
    assert names["ROOT"] == ROOT and os.getcwd() == str(ROOT)


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_it_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    reason = "nbclient and ipykernel are not installed: pip install 'sat_lora[matrix]'"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    import nbformat

    clone = tmp_path / "a clone"
    shutil.copytree(DEMO, clone / "finetune_demo", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    train = next(cell for cell in notebook.cells if cell.id == "train")
    train.source = train.source.replace("STEPS = 700", "STEPS = 30")
    resources = {"metadata": {"path": str(clone / "finetune_demo")}}
    done = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    said = {
        cell.id: "".join(out.get("text", "") for out in cell.outputs) for cell in done.cells if cell.cell_type == "code"
    }
    kinds = {
        cell.id: [kind for out in cell.outputs for kind in out.get("data", ())]
        for cell in done.cells
        if "outputs" in cell
    }
    assert re.search(r"^base +[\d.]+ % of 500 images read exactly$", said["evaluation"], re.MULTILINE)
    assert said["ask"].count("'mine':") == 3 and kinds["ask"].count("image/png") == 3
    assert "image/png" in kinds["curve"] and "text/markdown" in kinds["card"]
    assert (clone / "runs" / "notebook" / "merged" / "model_config.json").is_file()

"""What is written for people is current: generated pages, tables and the picture, the links, the README's length."""

import json
import re
from itertools import product
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from sat_lora.cogvlm.families import published
from sat_lora.cogvlm.inputs.prompts import settings_of_base
from sat_lora.lora.targets import PRESETS
from sat_lora.memory.fit import SPARE
from sat_lora.training.settings.options import build_parser
from tests.support.paths import ROOT
from tests.support.patience import patient
from tests.support.scripts import load_file

DOCS = ROOT / "docs"
READMES = ("README.md", "README_zh.md")
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def read(path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the slugs of mkdocs.yml make them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


def test_the_page_of_options_is_that_of_the_parsers():
    assert load_file(DOCS / "tools" / "options_page.py").page() == read("docs/options.md"), (
        "run python docs/tools/options_page.py"
    )


def test_the_chinese_page_of_options_leads_to_each_of_its_sections():
    headings = anchors_of(DOCS / "options.md") - {"options"}
    assert set(re.findall(r"\(\.\./options\.md#([^)]+)\)", read("docs/zh/options.md"))) == headings


def test_the_picture_is_what_the_script_draws_and_shows_every_preset():
    drawn = load_file(DOCS / "tools" / "towers.py").picture()
    assert drawn == read("docs/pictures/towers.svg"), "run python docs/tools/towers.py"
    texts = [node.text for node in ElementTree.fromstring(drawn).iter() if node.get("class") == "p"]
    assert set(PRESETS) <= set("\n".join(texts).replace("-\n", "-").split("\n"))


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_short_and_shows_the_picture(page):
    text = read(page)
    assert text.count("\n") <= 150
    assert "](docs/pictures/towers.svg)" in text


def test_both_readmes_have_the_same_sections_commands_and_tables():
    english, chinese = map(read, READMES)
    assert english.count("\n## ") == chinese.count("\n## ")
    assert len(re.findall(r"^\|", english, re.MULTILINE)) == len(re.findall(r"^\|", chinese, re.MULTILINE))
    blocks = ["\n".join(FENCED.findall(text)) for text in (english, chinese)]
    commands = [re.sub(r"(^|\s)#.*", "", block, flags=re.MULTILINE).split() for block in blocks]
    assert commands[0] == commands[1]


def test_the_table_of_gpus_is_one_that_the_script_writes():
    tool = load_file(DOCS / "tools" / "gpu_table.py")
    written = {}
    for page, (head, nothing) in tool.HEADS.items():
        rows = tool.rows_in(read(page), head, nothing=nothing)
        assert tool.replace_table(read(page), head, tool.table(rows, nothing=nothing)) == read(page)
        count = len(tool.FITTED)
        assert [(row.gpus, row.card) for row in rows[:count]] == [(1, card) for card in tool.FITTED]
        assert [(row.gpus, row.options) for row in rows[count:]] == [*tool.LAYOUTS]
        for row in rows:
            assert row.card is None or row.gigabytes * SPARE <= row.card + 0.06  # as it is rounded
            build_parser().parse_args(row.options.split())
        assert [row.card for row in rows[count:]] == [tool.smallest_card(row.gigabytes) for row in rows[count:]]
        written[page] = rows
    assert written["README.md"] == written["README_zh.md"] and tool.SPARE == SPARE


@pytest.mark.matrix
@pytest.mark.timeout(patient(1200))
def test_the_table_of_gpus_is_what_estimate_says(tmp_path):
    from benchmarks.models import config_of

    tool = load_file(DOCS / "tools" / "gpu_table.py")
    config = tmp_path / "model_config.json"
    config.write_text(json.dumps(config_of("full")))
    rows = [tool.fitted(tool.FITTED[1], config), tool.laid_out(*tool.LAYOUTS[-1], config)]
    for line in tool.table(rows, nothing="nothing fits")[1:]:
        assert f"{line}\n" in read("README.md")


def test_the_table_of_the_successors_is_one_that_the_script_writes():
    tool = load_file(DOCS / "tools" / "gpu_table.py")
    layouts = [(model, gpus, options) for model in tool.FAMILIES for gpus, options in tool.FAMILY_LAYOUTS]
    written = []
    for page, (head, fits, too_large) in tool.FAMILY_HEADS.items():
        rows = tool.family_rows_in(read(page), head)
        lines = tool.family_table(rows, fits=fits, too_large=too_large)
        assert tool.replace_table(read(page), head, lines) == read(page)
        assert [(model, row.gpus, row.options) for model, row in rows] == layouts
        written.append(rows)
    assert written[0] == written[1]
    assert {*tool.FAMILIES} == {name for name in published() if not name.startswith("cogvlm-")}
    assert tool.FAMILY_CARDS == (24, 48, 80)
    for _, row in written[0]:
        build_parser().parse_args(row.options.split())
    for model, length in tool.FAMILIES.items():
        assert settings_of_base(model)["max_length"] == length


@pytest.mark.matrix
@pytest.mark.timeout(patient(1200))
def test_the_table_of_the_successors_is_what_estimate_says():
    tool = load_file(DOCS / "tools" / "gpu_table.py")
    _, fits, too_large = tool.FAMILY_HEADS["docs/families.md"]
    rows = [tool.family_row("cogagent-chat", *tool.FAMILY_LAYOUTS[number]) for number in (1, -1)]
    for line in tool.family_table(rows, fits=fits, too_large=too_large)[1:]:
        assert f"{line}\n" in read("docs/families.md")


def test_the_matrix_has_a_line_for_each_layout_stage_and_precision_within_its_bounds():
    from tests.distributed.matrix import BOUNDS, CELLS, replace_table

    layouts = list(product(("fp32", "bf16"), "12", "12", "0123"))
    for page in ("docs/matrix.md", "docs/zh/matrix.md"):
        text = read(page)
        rows = [line.strip("| ").split(" | ") for line in text.split("\n") if re.match(r"\| (fp32|bf16) ", line)]
        assert [tuple(row[:4]) for row in rows] == layouts
        assert f"{len(CELLS)} " in text
        for row in rows:
            limits = BOUNDS.values() if row[0] == "fp32" else [1.0] * len(BOUNDS)
            assert all(float(value) <= limit for value, limit in zip(row[4:], limits, strict=True)), row
        lines = [line for line in text.split("\n") if line.startswith("|")]
        assert replace_table(text, lines) == text
        assert replace_table(text, [*lines[:2], "| x |"]).count("\n|") == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page):
    broken = []
    for target, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        file = page.parent / unquote(target) if target else page
        if not file.exists() or (anchor and unquote(anchor) not in anchors_of(file)):
            broken.append(f"{target}#{anchor}")
    assert not broken


def test_every_page_has_its_place_on_the_site():
    named = set(re.findall(r"^ +- .+: (\S+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= named
    assert {name for name in named - pages if not (ROOT / name).is_file()} == set()


@pytest.mark.parametrize("page", READMES)
def test_the_map_names_folders_and_files_that_are_there(page):
    section = next(part for part in read(page).split("\n## ") if "`sat_lora/cogvlm/`" in part)
    paths = re.findall(r"`([\w/]+/)`", section)
    assert len(paths) > 6
    assert [path for path in paths if not (ROOT / path).is_dir()] == []
    packages = {file.parent.relative_to(ROOT).as_posix() + "/" for file in (ROOT / "sat_lora").rglob("__init__.py")}
    assert packages <= set(paths)

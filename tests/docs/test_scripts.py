"""The Python of docs/any-sat-model.md and docs/any-loop.md is run, on tiny random models, and does what is told."""

import re

import pytest

from sat_lora.adapters.read import read_adapter
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.sat_folders import MORE, run_script

FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    "docs/any-sat-model.md": ("## LLaMA, ChatGLM and ViT in SAT's trainer", "## From lora2 to sat_lora"),
    "docs/zh/any-sat-model.md": ("## SAT 训练器中的 LLaMA、ChatGLM 和 ViT", "## 从 lora2 到 sat_lora"),
}


def section(page, heading):
    (text,) = (part for part in (ROOT / page).read_text().split("\n## ") if f"## {part}".startswith(heading + "\n"))
    return text


def without_comments(code):
    return re.sub(r" *#.*", "", code)


SCRIPTS = dict(zip(MORE, FENCED.findall(section("docs/any-sat-model.md", SECTIONS["docs/any-sat-model.md"][0]))))


def test_each_script_is_of_under_25_lines_and_the_same_in_both_languages():
    assert SCRIPTS.keys() == MORE.keys()
    assert all(len(code.splitlines()) < 25 and f'"{name}"' in code for name, code in SCRIPTS.items())
    chinese = FENCED.findall(section("docs/zh/any-sat-model.md", SECTIONS["docs/zh/any-sat-model.md"][0]))
    assert [*map(without_comments, chinese)] == [*map(without_comments, SCRIPTS.values())]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_the_adapter_alone_and_saves_it(name, tmp_path):
    ((losses, trained, changed, save),) = run_ranks(run_script, 1, SCRIPTS[name], str(tmp_path), name)
    head = ["mixins.cls.classifier.weight", "mixins.cls.classifier.bias"] if name.startswith("vit") else []
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    assert {part.rpartition(".")[2] for part in trained if part not in head} == {"A", "B"}
    assert changed == head
    saved = read_adapter(tmp_path / save)
    assert {*saved.trained} == {*head} and len(saved.layers) > 3
    assert all(tensor.isfinite().all() for tensor in saved.tensors.values())
    assert any(tensor.abs().max() > 0 for key, tensor in saved.tensors.items() if "lora_B" in key)
    slots = {entry.slots for layer, entry in saved.layers.items() if "query_key_value" in layer}
    assert slots == ({("q", "v")} if name.startswith("chatglm") else {("q", "k", "v")})

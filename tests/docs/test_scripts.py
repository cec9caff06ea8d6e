"""The Python of docs/any-sat-model.md and docs/any-loop.md is run, on tiny random models, and does what is told."""

import json
import re
import shlex
from argparse import Namespace

import pytest
import torch

from sat_lora import add_lora
from sat_lora._deepspeed import skip_shared_memory_build
from sat_lora.adapters.read import read_adapter
from sat_lora.interop.sat_lora2 import LoraMixin as Lora2Mixin
from sat_lora.lora.apply import adapters_of
from sat_lora.watchdog.rank_state import read_states
from sat_lora.watchdog.verdict import verdict
from tests.support.paths import ROOT
from tests.support.plain_loops import batch_of, loss_of, plain_engine
from tests.support.ranks import run_ranks
from tests.support.sat_folders import ENGINE, MORE, run_script
from tests.support.tiny import tiny_batch, tiny_model

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


# docs/any-loop.md


LOOPS = FENCED.findall((ROOT / "docs/any-loop.md").read_text())
IN_SAT = next(code for code in LOOPS if "training_main" in code)
ALONE = [code for code in LOOPS if code is not IN_SAT]


def test_the_tools_have_the_same_scripts_in_both_languages():
    chinese = FENCED.findall((ROOT / "docs/zh/any-loop.md").read_text())
    assert [*map(without_comments, chinese)] == [*map(without_comments, LOOPS)] and len(LOOPS) == 6


@pytest.mark.parametrize("code", ALONE, ids=["loop", "gradients", "examine", "memory", "adapter"])
def test_the_script_of_a_tool_runs(code, single_process_group, tmp_path, monkeypatch, capsys):
    skip_shared_memory_build()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "zero2.json").write_text(
        json.dumps({key: value for key, value in ENGINE.items() if key != "optimizer"})
    )
    model = tiny_model().train()
    names = dict(model=model, batches=[batch_of(1), tiny_batch((False, False))], loss_of=loss_of)
    if "engine" in code and "deepspeed.initialize" not in code:
        add_lora(model, r=4)
        names["engine"] = plain_engine(model, 2)
    if code.startswith("from sat_lora import estimate"):
        add_lora(model, r=4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    exec(code, names)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B"}
    assert all(
        torch.equal(before[name], p) for name, p in model.named_parameters() if name in before and not p.requires_grad
    )
    printed = capsys.readouterr().out
    if "print(estimate" in code:
        assert "memory in MiB at the peak of a step" in printed and "activations" in printed
    if "examine(" in code:
        assert "error:" not in printed
    for folder in re.findall(r'save_adapter\(\w+, "(.+)"\)', code):
        assert len(read_adapter(tmp_path / folder).layers) > 10
    if "watched(" in code:
        assert verdict(tmp_path / "runs" / "mine").text.startswith("Nothing is wrong: the run has ended well")


def test_sats_trainer_is_watched(tmp_path):
    script = SCRIPTS["vit-base-patch16-224-in21k"]
    before, line, last = script.partition("with adapter_checkpoints():\n")
    dataset = last.partition("forward_step, ")[2].rstrip().removesuffix(")")
    code = f"{before}create_dataset = {dataset}\n{IN_SAT}"
    ((losses, _, _, save),) = run_ranks(run_script, 1, code, str(tmp_path), "vit-base-patch16-224-in21k", 3)
    assert line and len(losses) == 3 and read_adapter(tmp_path / save).layers
    (state,) = read_states(tmp_path / "runs" / "mine")
    assert (state.step, state.error, state.ended is None) == (4, None, False)


# From lora2


ROWS = {page: section(page, heading) for page, (_, heading) in SECTIONS.items()}


def test_the_commands_and_names_of_the_way_from_lora2_are_there():
    from sat_lora.cli import build_parser

    code = [re.findall(r"`([^`]+)`", text) for text in ROWS.values()]
    ours = [
        [part for part in parts if "sat-lora " in part or "sat_lora" in part or "add_lora(" in part] for parts in code
    ]
    assert ours[0] == ours[1] and len(ours[0]) == 6
    for command in (part for part in ours[0] if part.startswith("sat-lora ") and " --" in part):
        build_parser().parse_args(shlex.split(command)[1:])
    (line,) = {part for part in ours[0] if part.startswith("from sat_lora import")}
    exec(line, {})


def test_the_line_for_everything_as_it_was_gives_the_layers_and_the_scale_of_lora2(single_process_group):
    (call,) = (part for part in re.findall(r"`(add_lora[^`]+)`", ROWS["docs/any-sat-model.md"]) if "alpha=1" in part)
    ours, published = tiny_model(), tiny_model()
    exec(call, dict(add_lora=add_lora, model=ours, args=Namespace(lora_rank=2)))
    for model in (published, published.get_mixin("eva").vit_model):
        model.add_mixin("lora", Lora2Mixin(2, 2), reinit=True)
    adapters = [adapters_of(model) for model in (ours, published)]
    assert adapters[0].keys() == adapters[1].keys()
    assert {name: adapter.scale for name, adapter in adapters[0].items()} == dict.fromkeys(adapters[1], 0.5)
    assert {adapter.scale for adapter in adapters[1].values()} == {0.5}
    one_layer = tiny_model()
    add_lora(one_layer, r=2, target_modules=["language-attention"], layers_to_transform=[1])
    assert all(".layers.1." in name for name in adapters_of(one_layer))

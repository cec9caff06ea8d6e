"""The model card says what the adapter is of and how it is loaded, and is never written over somebody's own words."""

import dataclasses
import json
import os
import re
import shlex
import shutil

import pytest

from sat_lora import AdapterError, LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.adapters.card import CARD, Section, add_section, card_of, is_ours
from sat_lora.adapters.format import write_adapter
from sat_lora.adapters.inspect import inspect_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.cogvlm import load_cogvlm
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.training.runs.card_sections import evaluation_section, sections_of_run
from tests.support.paths import TINY_BASE
from tests.support.tiny import fill_adapters

pytestmark = pytest.mark.usefixtures("single_process_group")
CODE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def written(single_process_group, tmp_path_factory):
    """The folder of an adapter of the demo's base."""
    folder = tmp_path_factory.mktemp("card") / "adapter"
    model, _ = load_cogvlm(TINY_BASE)
    add_lora(model, LoraConfig(r=4))
    fill_adapters(model, seed=0)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it to write to."""
    return shutil.copytree(written, tmp_path / "adapter")


def text_of(folder) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


def rows_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))


def test_the_card_says_what_is_in_the_folder(written):
    report = inspect_adapter(written)
    rows = rows_of(text_of(written))
    assert rows["Name of its folder"] == f"`{report['base']['name']}`" and rows["Rank"] == "`4`"
    assert rows["Parameters"] == f"{report['parameters']:,}" and rows["Layers"] == str(len(report["layers"]))
    assert rows["Digest of its values"] == f"`{report['base']['digest']}`"
    head = text_of(written).split("---\n")[1]
    assert json.loads(head.partition("tags: ")[2]) == ["lora", "sat_lora", "cogvlm"]


def test_what_it_tells_to_run_runs(written, tmp_path, monkeypatch):
    """Its commands are read by the command's own parser, and run where they write; its Python loads the adapter."""
    from sat_lora.cli import build_parser, main

    names = {"BASE": str(TINY_BASE), "ADAPTER": str(written), "PEFT": str(tmp_path / "peft"), "MERGED": "merged"}
    blocks = CODE.findall(text_of(written))
    for name, value in names.items():
        blocks = [
            (kind, re.sub(rf"\b{name}\b", shlex.quote(value) if kind == "sh" else value, code)) for kind, code in blocks
        ]
    commands = [shlex.split(line) for kind, code in blocks if kind == "sh" for line in code.splitlines()]
    assert [command[1] for command in commands] == ["chat", "merge", "export"]
    for command in commands:
        build_parser().parse_args(command[1:])
    assert main(commands[-1][1:]) == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    python = [code for kind, code in blocks if kind == "python"]
    model = {}
    exec(python[0], model)
    expected, _ = load_cogvlm(TINY_BASE)
    load_adapter(expected, written)
    own = expected.state_dict()
    assert all((tensor == own[name]).all() for name, tensor in model["model"].state_dict().items())
    assert 'PeftModel.from_pretrained(base, "' in python[1]


def test_the_same_adapter_has_the_same_card_wherever_it_is_written(written, tmp_path):
    saved = read_adapter(written)
    for folder in (tmp_path / "a" / "adapter", tmp_path / "of another name"):
        write_adapter(folder, saved)
        assert text_of(folder) == text_of(written) == card_of(saved)


def test_a_card_that_stands_as_written_is_written_anew(folder):
    saved = read_adapter(folder)
    write_adapter(folder, saved, [Section("Training", (("Steps", 7),))])
    assert rows_of(text_of(folder))["Steps"] == "7" and is_ours(folder / CARD)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text + "\n",
        lambda text: text.replace("# A LoRA", "# My LoRA"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "My own words.\n",
        lambda text: "",
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("unchanged: ", "unchanged: 0"),
        lambda text: text + text,
        lambda text: "\N{ZERO WIDTH NO-BREAK SPACE}" + text,
    ],
)
def test_words_of_somebody_stay(folder, edit):
    edited = edit(text_of(folder)).encode()
    (folder / CARD).write_bytes(edited)
    write_adapter(folder, read_adapter(folder), [Section("Training", (("Steps", 7),))])
    add_section(folder, Section("Evaluation", (("Images", 3),)))
    assert (folder / CARD).read_bytes() == edited


def test_bytes_that_are_no_text_and_a_card_that_is_large_stay(folder):
    for content in (b"\xff\xfe\x00", b"x" * 2**21):
        (folder / CARD).write_bytes(content)
        write_adapter(folder, read_adapter(folder))
        assert (folder / CARD).read_bytes() == content


def test_a_link_to_somebodys_words_leaves_these_as_they_are(folder, tmp_path):
    (tmp_path / "words.md").write_text("mine")
    (folder / CARD).unlink()
    (folder / CARD).symlink_to(tmp_path / "words.md")
    write_adapter(folder, read_adapter(folder))
    assert text_of(folder) == "mine" == (tmp_path / "words.md").read_text()


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), os.mkfifo, os.mkdir])
def test_what_is_no_file_keeps_no_adapter_from_being_written(folder, make):
    (folder / CARD).unlink()
    make(folder / CARD)
    write_adapter(folder, read_adapter(folder))
    assert is_ours(folder / CARD) and "A LoRA adapter" in text_of(folder)


def test_no_card_breaks_no_reader(folder):
    (folder / CARD).unlink()
    model, _ = load_cogvlm(TINY_BASE)
    load_adapter(model, folder)
    add_section(folder, Section("Evaluation", ()))
    assert not (folder / CARD).exists()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError):
        read_adapter(folder)


@pytest.mark.parametrize(
    "name", ["a`b|c", "x\n# injected", "<script>", "\x1b[31mred", "`" * 9, " ", "ñ" * 999, "../../etc"]
)
def test_names_of_others_are_shown_and_nothing_else(written, name):
    saved = read_adapter(written)
    base = BaseIdentity(saved.base_fingerprint, name, "CogVLM", 3)
    text = card_of(dataclasses.replace(saved, base=base))
    assert text.isascii() or "ñ" in text
    assert "\x1b" not in text and "\n# injected" not in text and text.count("\n# ") == 1
    for line in text.splitlines():
        if line.startswith("| ") and line != "| | |":
            assert line.count("|") == 3 and line.count("`") % 2 == 0


def test_a_section_is_put_in_once_and_before_how_to_load(folder):
    for images in (3, 4):
        add_section(folder, Section("Evaluation", (("Images", images),)))
    text = text_of(folder)
    assert rows_of(text)["Images"] == "4" and text.count("## Evaluation") == 1 and is_ours(folder / CARD)
    assert text.index("## Adapter") < text.index("## Evaluation") < text.index("## How to load it")


SETTINGS = {
    "train_data": ["/home/me/secret place/captchas", "more.jsonl:0.3"],
    "valid_data": None,
    "version": "chat",
    "prompt": "What is this?\n",
    "lr": 1e-4,
    "bf16": True,
    "quantize": "none",
}
STATE = {
    "step": 400,
    "samples_per_step": 16,
    "best_loss": 0.125,
    "best_step": 300,
    "run": {"data": {"samples": 8000}, "valid_data": {"samples": 50}},
}


def test_a_run_tells_its_data_settings_and_losses():
    data, training = (dict(section.rows) for section in sections_of_run(SETTINGS, STATE))
    assert data["Training data"] == ["captchas", "more.jsonl:0.3"] and data["Training samples"] == 8000
    assert data["Validation samples"] == 50 and data["Prompt"] == "What is this?\n"
    assert training == {
        "Steps": 400,
        "Samples of a step": 16,
        "Learning rate": 1e-4,
        "Arithmetic": "bf16",
        "Lowest validation loss": 0.125,
        "Step of the lowest validation loss": 300,
    }
    assert "secret" not in str(data)


@pytest.mark.parametrize(
    "metric, name", [("cider", "cider"), ("token_accuracy", "token_accuracy"), ("/home/me/mine.py:score", "score")]
)
def test_a_run_whose_best_goes_by_a_metric_tells_what_it_gave(metric, name):
    by_metric = {**STATE, "best_loss": None, "best_value": 0.75}
    _, training = (dict(section.rows) for section in sections_of_run({**SETTINGS, "metric": metric}, by_metric))
    assert training[f"Best {name} of a validation"] == 0.75 and training[f"Step of the best {name}"] == 300
    assert not [title for title in training if "loss" in title or "home" in title]


def test_a_run_that_says_nothing_tells_its_step():
    _, training = sections_of_run({}, {"step": 3, "samples_per_step": 2, "best_loss": None, "run": {}})
    assert dict(training.rows) == {"Steps": 3, "Samples of a step": 2, "Arithmetic": "float32"}


def test_an_evaluation_is_a_table():
    one, two, words = ({"value": value, "low": value - 0.01, "high": value} for value in (0.03, 0.988, 17.25))
    metrics = {"anls": {"base": one, "adapter": two}, "perplexity": {"adapter": words}}
    metrics["/home/me/my.py:score"] = {"adapter": words}
    section = evaluation_section({"images": 500, "metrics": metrics, "base": {"exact_match": 0.5}})
    assert dict(section.rows) == {
        "Images": 500,
        "Base: anls": "3.0 % [2.0, 3.0]",
        "Base and adapter: anls": "98.8 % [97.8, 98.8]",
        "Base and adapter: perplexity": "17.250 [17.240, 17.250]",
        "Base and adapter: score": "17.250 [17.240, 17.250]",
    }


def test_an_evaluation_of_an_earlier_version_is_a_table():
    scores = {"exact_match": 0.03, "exact_match_ignoring_case": 0.04}
    section = evaluation_section({"images": 500, "base": scores, "adapter": {"exact_match": 0.988}, "broken": ["/x"]})
    assert dict(section.rows) == {
        "Images": 500,
        "Base: exact-match": "3.0 %",
        "Base: exact-match-ignoring-case": "4.0 %",
        "Base and adapter: exact-match": "98.8 %",
    }

"""The demo's second task, conversations about captchas: its data, its settings, and the questions that it asks."""

import json
import re
import subprocess
import sys

import pytest

from sat_lora.chat import Chat
from sat_lora.cogvlm import load_cogvlm
from sat_lora.data.samples import read_items
from sat_lora.training.preflight import option_problems
from sat_lora.training.prepare import dataset_maker
from tests.support.configs import parse_options
from tests.support.demo_runs import environment
from tests.support.paths import DEMO, ROOT, TINY_BASE
from tests.support.scripts import load_script

sys.path.insert(0, str(DEMO))
from make_captchas import draw_captcha, split_strings
from make_conversations import BACKWARDS, DIGITS, READ, conversation, main, make_conversations

FEW = {"train": 4, "valid": 2, "test": 3}
SETS = tuple(FEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_conversations(tmp_path_factory.mktemp("demo") / "mine", **FEW, seed=3, workers=1)


def settings(folder, *more):
    """The config of a run on the conversations, as the one command has it."""
    return parse_options(load_script("conversations").training_options(folder, more), environ={})


def test_a_conversation_asks_for_the_string_and_then_about_it(folder):
    for name, count in FEW.items():
        records = json.loads((folder / f"{name}.json").read_text())
        assert len(records) == count
        for record in records:
            text = re.fullmatch(rf"images/{name}/\d+/(\d\d\d)\.png", record["image"])[1]
            turns = [turn["value"] for turn in record["conversations"]]
            assert (folder / record["image"]).is_file() and text in split_strings(3)[name]
            assert turns[:4] == [f"<image>\n{READ}", text, BACKWARDS, text[::-1]]
            assert turns[5:] == [DIGITS[turns[4]](text)]
    assert [answer("470") for answer in DIGITS.values()] == ["4", "0"]


def test_every_question_is_drawn_by_seed_and_path():
    images = [f"images/train/{number:03d}/123.png" for number in range(40)]
    drawn = [conversation(image, 0)["conversations"][4]["value"] for image in images]
    assert {*drawn} == {*DIGITS}
    assert drawn == [conversation(image, 0)["conversations"][4]["value"] for image in images]
    assert drawn != [conversation(image, 1)["conversations"][4]["value"] for image in images]


def test_what_was_begun_is_ended_and_what_is_whole_stays(folder, tmp_path, capsys):
    whole = {name: (folder / f"{name}.json").read_bytes() for name in SETS}
    times = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in SETS}
    argv = ["--out", str(folder), "--seed", "3", *(f"--{name}={count}" for name, count in FEW.items())]
    assert main([*argv, "--workers", "1"]) == 0
    assert "conversations: already at" in capsys.readouterr().out
    assert times == {name: (folder / f"{name}.json").stat().st_mtime_ns for name in SETS}
    (folder / "test.json").unlink()  # as if it had been stopped before
    assert main([*argv, "--workers", "1"]) == 0
    assert whole == {name: (folder / f"{name}.json").read_bytes() for name in SETS}


def test_its_pictures_are_the_demo_s(folder):
    from PIL import Image

    (file,) = (folder / "images" / "valid" / "000").glob(f"{split_strings(3)['valid'][0]}.png")
    with Image.open(file) as image:
        assert image.tobytes() == draw_captcha(file.stem, f"3 valid/000/{file.name}").tobytes()


def test_the_settings_are_those_of_a_run_and_every_conversation_fits(folder, tmp_path):
    from sat_lora.cogvlm.checkpoints.load import read_config

    config = settings(folder, "--save", str(tmp_path))
    assert option_problems(config, read_config(TINY_BASE), "cpu") == ([], [])
    records = [
        {"image": "a.png", **dict(zip(("prompt", "answer"), last)), "history": [[READ, "123"], [BACKWARDS, "321"]]}
        for last in ((question, answer("123")) for question, answer in DIGITS.items())
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    draw_captcha("123", "a").save(tmp_path / "a.png")
    dataset = dataset_maker(config.model, config.data, read_config(TINY_BASE))(read_items([tmp_path / "a.jsonl"]))
    samples = [dataset[number] for number in range(len(records))]
    assert [sample.left_out for sample in samples] == [0, 0]
    learnt = [dataset.tokenizer.decode(sample.labels[sample.labels >= 0]) for sample in samples]
    assert learnt == ["123<eos>321<eos>1<eos>", "123<eos>321<eos>3<eos>"]


def test_every_question_comes_behind_the_model_s_own_answers(folder, single_process_group):
    config = settings(folder)
    loaded = load_cogvlm(TINY_BASE)
    items = read_items([folder / "test.json"])
    dataset = dataset_maker(config.model, config.data, loaded[1], with_answer=False)(items)
    script = load_script("conversations")
    loaded[0].eval()
    answers = script.answers_of(loaded[0], dataset, "cpu")
    chat = Chat(loaded, version=config.model.version, max_new_tokens=4)
    for item, own in zip(items, answers, strict=True):
        chat.show(item.image)
        assert [chat.ask(question).strip() for question in script.questions_of(item)] == own
    assert any(own[0] != script.right_answers(item)[0] for item, own in zip(items, answers))


def test_the_table_counts_conversations_without_a_wrong_answer(folder):
    script = load_script("conversations")
    items = read_items([folder / "test.json"])
    right = [script.right_answers(item) for item in items]
    half = [right[0], [right[1][0], "x", right[1][2]], ["x", *right[2][1:]]]
    head, base, adapter = script.table(items, {"base": [["", "", ""]] * 3, "base + adapter": half}).splitlines()
    assert head.split()[:2] == ["3", "conversations"] and READ in head and BACKWARDS in head
    assert re.findall(r"[\d.]+%", base)[:3] == ["0.0%", "0.0%", "0.0%"]
    assert re.findall(r"[\d.]+%", adapter)[:3] == ["33.3%", "66.7%", "66.7%"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--run", "runs/x", "--lr", "1"], "unknown: --lr 1"),
        (["--no-such-option"], "unknown: --no-such-option"),
        (["--train-iters", "some"], "--train-iters"),
        (["--run", "no/run"], "no/run"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(argv, words, folder, capsys):
    try:
        status = load_script("conversations").main(["--data", str(folder), *argv])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.startswith("conversations.py: error: ")


@pytest.mark.matrix
@pytest.mark.timeout(3000)
def test_the_one_command_goes_from_under_a_tenth_to_most(tmp_path):
    line = [sys.executable, str(DEMO / "conversations.py"), "--save", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=2800, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = dict(re.findall(r"^  (base|base \+ adapter) +([\d.]+)%", done.stdout, re.MULTILINE))
    assert float(shares["base"]) < 10 and float(shares["base + adapter"]) > 85

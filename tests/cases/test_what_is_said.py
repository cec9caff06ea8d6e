"""What a run says before its first step: the right things, in ten lines that fit a terminal, whatever people bring."""

import json

import pytest

from sat_lora.cogvlm.inputs.prompts import PROMPTS, settings_of_base, version_of
from sat_lora.cogvlm.inputs.text import IGNORED
from sat_lora.data.samples import Item
from sat_lora.errors import ConfigError
from sat_lora.training.run_summary import COUNTED, check_vocabulary, columns, fit, look_at
from sat_lora.training.settings.schedule import schedule_problems, warmup_steps
from tests.support.configs import config_of, parse_options
from tests.support.datasets import numbered, source_of
from tests.support.paths import DEMO
from tests.support.run_summaries import summary_lines


def test_what_will_be_trained_is_said(tokenizer):
    lines = summary_lines(source_of(numbered(6), tokenizer), "--batch-size", "4", "--gradient-accumulation-steps", "3")
    assert lines == {
        "base": "the embedded tiny base: CogVLM, 2 layers, fingerprint 01234567",
        "device": "cpu, fp32, 4 ranks (2 data-parallel x 2 model-parallel), ZeRO 0, gloo",
        "data": "6 samples of images",
        "valid": "none: no --valid-data, and --split 1 leaves none (0.95,0.05 would)",
        "prompt": '"What is this?" (default of --prompt); version base (the demo\'s)',
        "steps": "20 (80 epochs), batch 24 = 4 x 3 x 2 ranks, lr 0.0001, warm-up 1",
        "run": "runs/finetune",
        "sample": '"<image>What is this?" -> "0", 27 tokens',
        "length": "no answer is cut; longest of the 6 samples 27 of 64 tokens",
    }


@pytest.mark.parametrize(
    "answer",
    ["\x1b]0;owned\x07", "two\nlines\r", "a" * 100_000, "\u202egnp.exe", "漢字" * 80, "\U0001f600" * 50, "", "\ud83d"],
)
def test_any_answer_and_name_fits_one_line(answer, tokenizer, tmp_path):
    source = source_of([Item(None, answer, answer)], tokenizer, max_length=300)
    lines = summary_lines(
        source, "--save", f"{tmp_path}/a folder/\x1b[2J", "--prompt", answer or "x", "--version", "chat"
    )
    assert "\\x1b[2J" in lines["run"]  # whole, so that it can be copied


def test_data_with_a_long_path_are_said_by_their_kind(tokenizer, tmp_path):
    folder = tmp_path / ("a" * 60)
    folder.mkdir()
    kinds = ["file names are the answers", "jsonl: prompt and answer"]
    lines = summary_lines(source_of(numbered(2), tokenizer, layouts=kinds[:1]), train_data=[str(folder)])
    assert lines["data"] == "2 samples (file names are the answers)"
    lines = summary_lines(source_of(numbered(2), tokenizer, layouts=kinds), train_data=[str(folder), "b.jsonl"])
    assert lines["data"] == "2 samples (file names are the answers, jsonl: prompt and answer)"


def test_cut_answers_are_counted_and_a_part_is_called_one(tokenizer):
    items = [Item(None, "x" * (30 if number % 3 == 0 else 3), "q") for number in range(COUNTED + 200)]
    source = source_of(items, tokenizer, max_length=20)
    lines = summary_lines(source, "--max_length", "20")
    assert COUNTED == 1000
    assert lines["length"] == "400 of 1,200 answers are cut by --max_length 20; 33 would hold them"
    assert lines["prompt"] == "each sample's own; version base (the demo's)"


def test_a_long_answer_is_not_tokenised_whole(tokenizer):
    """50 MB in one answer: what is beyond any --max_length does not matter for being cut."""
    texts = look_at(source_of([Item(None, "ab " * 17_000_000, "q")], tokenizer), 128)
    assert texts.lengths.cut == 1


def test_what_is_left_out_is_said_with_reasons_the_commonest_first(tokenizer):
    left_out = [("of .txt", 3), ("hidden", 120), ("of .txt", 1), *((f"of .{letter * 20}", 1) for letter in "abcdef")]
    lines = summary_lines(source_of(numbered(2), tokenizer, left_out))
    assert lines["left out"].startswith("120 hidden, 4 of .txt, 1 of .aaaa")
    assert lines["left out"].endswith(" reasons more")


def test_prompts_of_some_samples_alone_are_said(tokenizer):
    items = [*numbered(3), Item("images/a.png", "a", "Which letter?")]
    lines = summary_lines(source_of(items, tokenizer), "--prompt", "Read it:")
    assert lines["prompt"] == '3 of 4 have none: "Read it:" (--prompt); version base (the demo\'s)'


@pytest.mark.parametrize("version", list(PROMPTS))
def test_a_short_prompt_is_shown_whole_whatever_stands_beside_it(version, tokenizer, tmp_path):
    (tmp_path / "model_config.json").write_text(json.dumps({"text_processor_version": version}))
    lines = summary_lines(source_of(numbered(6), tokenizer), "--from_pretrained", str(tmp_path))
    assert lines["prompt"].startswith('"What is this?" (')
    assert lines["prompt"].endswith(f"; version {version} (from its config)")


def test_a_version_that_is_not_that_of_the_config_is_said(tokenizer, tmp_path):
    (tmp_path / "model_config.json").write_text(json.dumps({"text_processor_version": "vqa"}))
    lines = summary_lines(source_of(numbered(6), tokenizer), "--from_pretrained", str(tmp_path), "--version", "base")
    assert lines["prompt"].endswith("version base (given; its config says vqa)")


@pytest.mark.parametrize(
    "start_step, words",
    [(7, "runs/finetune, resumed from step 7"), (20, "runs/finetune, at step 20 of 20: nothing is left (--train-i")],
)
def test_a_resumed_run_says_from_where(start_step, words, tokenizer):
    assert summary_lines(source_of(numbered(2), tokenizer), start_step=start_step)["run"].startswith(words)


def test_validation_data_beats_the_split_and_says_so(tokenizer):
    valid = source_of(numbered(2), tokenizer)
    lines = summary_lines(
        source_of(numbered(6), tokenizer), "--valid-data", "held_out", "--split", "0.5,0.5", valid=valid
    )
    assert lines["valid"] == "2 samples of --valid-data; --split is not used, every 200 steps"


def test_token_ids_that_the_base_has_not_are_an_error_before_the_first_step(tokenizer):
    texts = look_at(source_of(numbered(3), tokenizer), 60)
    with pytest.raises(ConfigError, match=r"--local_tokenizer: here makes token \d+ .*vocabulary of 60, from 0 to 59"):
        check_vocabulary(texts, "here", 60)


def test_what_is_shown_is_what_is_learned(tokenizer):
    texts = look_at(source_of(numbered(1), tokenizer), 128)
    learned = texts.first.input_ids[texts.first.labels != IGNORED].tolist()
    assert learned == [*tokenizer.encode("0", add_special_tokens=False), tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["", "a", "漢" * 50, "e\u0301" * 60, "\u200b" * 40, "x" * 81, "\x00" * 30])
@pytest.mark.parametrize("room", [8, 9, 70])
def test_a_shortened_text_never_takes_more_than_its_room(text, room):
    assert columns(fit(text, room)) <= room and fit(text, room).isprintable()


# Options that decided in silence


@pytest.mark.parametrize(
    "split, advice",
    [
        ("0.9", "sums to 0.9, wanted shares that sum to 1; give 0.9,0.1 (train,valid), or 1 for no validation"),
        ("0.5,0.9", "sums to 1.4, wanted shares that sum to 1; give 0.357,0.643"),
        ("8,1,1", "sums to 10, wanted shares that sum to 1; give 0.8,0.1,0.1"),
        ("90,10", "give 0.9,0.1"),
        ("0.7,0.1", "give 0.875,0.125"),
        ("2", "give 1"),
        ("1e-300", "sums to 1e-300"),
    ],
)
def test_a_split_that_does_not_sum_to_one_is_an_error_with_advice(split, advice, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(["--split", split])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and advice in message and message.count("\n") == 1


@pytest.mark.parametrize("split", ["1.", "1", "0.9,0.1", "0.95,.05", "0.333,0.333,0.333", "0.7,0.2,0.1", "1,0,0"])
def test_a_split_that_sums_to_one_is_taken(split):
    assert sum(parse_options(["--split", split]).data.split) == pytest.approx(1, abs=2e-3)


def test_nothing_of_the_demo_is_in_a_run_on_other_data(tmp_path):
    options = parse_options(["--train-data", str(tmp_path)])
    schedule = options.schedule
    assert (options.data.prompt, options.optimizer.lr) == ("What is this?", 1e-4)
    assert (schedule.train_iters, schedule.warmup, schedule.min_lr_ratio) == (None, 0.01, 0.0)
    assert (options.saving.experiment_name, schedule.batch_size) == ("finetune", 4)
    assert (options.model.version, options.model.max_length) == ("base", 64)  # they go with the embedded base
    real = parse_options(["--from_pretrained", "cogvlm", "--train-data", str(tmp_path)])
    assert (real.data.prompt, real.model.version, real.model.max_length) == ("What is this?", "chat", 1288)


@pytest.mark.parametrize("steps", [1, 3, 20, 700, 1400])
def test_the_demos_warm_up_fits_any_number_of_steps(steps):
    options = parse_options(["--train-iters", str(steps)])
    assert warmup_steps(options.schedule.warmup, steps) == max(1, -(-steps * 30 // 700))
    assert schedule_problems(options.schedule, options.optimizer.lr, steps) == []


def test_the_demos_own_folders_are_its_data_by_any_name():
    folder = DEMO / "captchas"
    assert parse_options(["--train-data", str(folder / ".." / "captchas" / "train")]).data.prompt == "CAPTCHA:"
    assert parse_options(["--train-data", str(folder / "train"), "elsewhere"]).data.prompt == "What is this?"


@pytest.mark.parametrize(
    "file, content, version",
    [
        ("model_config.json", {"text_processor_version": "vqa"}, "vqa"),
        ("config.json", {"template_version": "base"}, "base"),
        ("config.json", {"template_version": "vqa"}, "vqa"),
        ("config.json", {"template_version": "chat"}, "chat_old"),  # what the published code asks by that name
        ("model_config.json", {"text_processor_version": "chat"}, "chat"),
        ("model_config.json", {"num_layers": 3}, "chat"),
        ("model_config.json", ["text_processor_version"], "chat"),
        ("model_config.json", {"text_processor_version": None}, "chat"),
        ("model_config.json", {"text_processor_version": ["base"]}, "['base']"),  # refused when the run begins
    ],
)
def test_the_prompt_version_is_that_of_the_base(file, content, version, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    assert parse_options(["--from_pretrained", str(tmp_path)]).model.version == version
    assert parse_options(["--from_pretrained", str(tmp_path), "--version", "chat_old"]).model.version == "chat_old"


def test_a_config_that_cannot_be_read_names_no_version(tmp_path):
    (tmp_path / "model_config.json").write_text("[" * 100_000)
    assert version_of(tmp_path) is None is version_of(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "names", "expected"),
    [
        ({"num_multi_query_heads": 8}, None, ("chat", 1288)),  # CogVLM2 or its Video
        ({"num_multi_query_heads": 8}, ["model.vision.conv.weight"], ("base", 2048)),
        ({"template_version": "chat"}, ["model.vision.conv.weight", "a.vision_expert_dense"], ("chat_old", 2432)),
        ({"architectures": ["CogVLMVideoForCausalLM"]}, None, ("base", 2048)),
        ({"architectures": ["CogAgentForCausalLM"], "template_version": "vqa"}, None, ("vqa", 400)),
        ({"cross_image_size": 1120}, ["model.embed_tokens.weight"], ("chat", 400)),
        ({}, {"weight_map": 3}, ("chat", 1288)),
    ],
)
def test_the_length_is_that_of_the_family_of_a_hugging_face_folder(content, names, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 32, **content}))
    if names is not None:
        index = names if isinstance(names, dict) else {"weight_map": dict.fromkeys(names, "model.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = parse_options(["--from_pretrained", str(tmp_path)]).model
    assert (model.version, model.max_length) == expected


@pytest.mark.parametrize("name", ["cogagent-chat", "THUDM/cogagent-chat"])
def test_the_name_of_a_published_model_says_its_length(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings_of_base(name) == {"version": "chat", "max_length": 400}


@pytest.mark.parametrize("split", [[0.5, 0.5], [0.9, 0.1, 0.0], [1e-9, 1.0]])
def test_no_split_is_advised_where_the_samples_are_too_few(split):
    from sat_lora.training.run_summary import _valid

    said = _valid(config_of(split=split), None)
    assert said.startswith("none: too few samples for --split") and len(said) <= 70

"""--config files as people, editors, other programs and attackers write them, and what --print-config writes."""

import json
import os
import re
import subprocess
import sys

import pytest

from sat_lora.commands import evaluate
from sat_lora.errors import ConfigError
from sat_lora.training.settings.config import KNOWN, Origin
from sat_lora.training.settings.config_file import LIMIT, as_yaml, read_config_file
from sat_lora.training.settings.resolve import resolve
from sat_lora.training.settings.run_settings import settings_of_run
from tests.support.configs import parse_options
from tests.support.option_errors import failure
from tests.support.paths import DEMO, ROOT
from tests.support.scripts import load_script


@pytest.fixture
def read(tmp_path):
    """Reads a text, or bytes, as a --config file."""

    def read(content, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_config_file(path)

    return read


# What a value may look like

TAKEN = {
    "lr: 1e-4": {"lr": 1e-4},  # a text to YAML 1.1
    "lr: 2E-4": {"lr": 2e-4},
    "lr: '1e-4'": {"lr": 1e-4},
    "lr: .5": {"lr": 0.5},
    "batch_size: 4.0": {"batch_size": 4},
    "max_pixels: 1_000": {"max_pixels": 1000},
    "train_iters: 1e3": {"train_iters": 1000},
    "seed: 0": {"seed": 0},
    "bf16: on": {"bf16": True},
    "bf16: No": {"bf16": False},
    "checkpoint_activations: 'true'": {"checkpoint_activations": True},
    "experiment_name: no": {"experiment_name": "no"},
    "experiment_name: 2024-01-02": {"experiment_name": "2024-01-02"},
    "experiment_name: 12:30": {"experiment_name": "12:30"},
    "prompt: ''": {"prompt": ""},
    "prompt: 日本 😀": {"prompt": "日本 😀"},
    "train_data: images": {"train_data": ["images"]},
    "train_data:\n- a\n- b": {"train_data": ["a", "b"]},
    "train_data: 's-{0..3}.tar'": {"train_data": ["s-{0..3}.tar"]},
    "train_data: 'pipe:cat $HOME/a.tar'": {"train_data": ["pipe:cat $HOME/a.tar"]},
    "valid_data:": {},
    "valid_data: ~": {},
    "split: 0.9,0.1": {"split": [0.9, 0.1]},
    "split: [0.9, 0.1]": {"split": [0.9, 0.1]},
    "split: 1": {"split": [1.0]},
    "betas: [0.9, '0.98']": {"betas": [0.9, 0.98]},
    "zero_stage: '3'": {"zero_stage": 3},
    "r: '8'": {"r": 8},
    "lora_alpha: 1e1": {"lora_alpha": 10.0},
    "use_dora: yes": {"use_dora": True},
    "rank_pattern: {dense: 8, 'a.*': '4'}": {"rank_pattern": {"dense": 8, "a.*": 4}},
    "target_modules: language-mlp": {"target_modules": ["language-mlp"]},
    "target_modules: 'a|b'": {"target_modules": "a|b"},
    "target_modules: all-linear": {"target_modules": "all-linear"},
    "train-iters: 5": {"train_iters": 5},
    "--train-iters: 5": {"train_iters": 5},
    "lora_rank: 4": {"r": 4},  # the published name
    "optimizer:\n  lr: 1e-4\nschedule: {batch-size: 2}": {"lr": 1e-4, "batch_size": 2},
    "optimizer:\nr: 4": {"r": 4},
    "\ufefflr: 1\r\nr: 4\r\n": {"lr": 1.0, "r": 4},
    "---\nlr: 1\n...\n": {"lr": 1.0},
    '{"lr": 1e-4, "bf16": true}': {"lr": 1e-4, "bf16": True},
}


@pytest.mark.parametrize("text", TAKEN)
def test_what_people_write_is_taken_as_it_is_meant(text, read):
    values = read(text)
    assert values == TAKEN[text]
    assert {name: type(value) for name, value in values.items()} == {
        name: type(value) for name, value in TAKEN[text].items()
    }


def test_a_tilde_is_the_users_own_folder(read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert read("save: ~/runs\ntrain_data: [~/a, b~/c]") == {
        "save": "/home/me/runs",
        "train_data": ["/home/me/a", "b~/c"],
    }


REFUSED = {
    "lr: 1,5": "lr: got '1,5', wanted a number above 0, 1e+30 at most; did you mean 1.5?",
    "lr: -1": "lr: got -1, wanted a number above 0",
    "lr: .nan": "lr: got nan, wanted a number above 0",
    "lr: true": "lr: got True, wanted a number",
    "lr: [1]": "lr: got [1], wanted a number",
    f"batch_size: {'9' * 5000}": "batch_size: got '999",
    "batch_size: 4.5": "batch_size: got 4.5, wanted a whole number above 0",
    "seed: 0x10": "seed: got '0x10', wanted a whole number",
    "bf16: 1": "bf16: got 1, wanted true or false",
    "bf16: maybe": "bf16: got 'maybe', wanted true or false",
    "experiment_name: 12": "experiment_name: got 12, wanted a text; put it in quotes",
    "experiment_name: yes\nprompt: true": "prompt: got True, wanted a text; put it in quotes",
    "train_data: []": "train_data: got [], wanted a list of texts",
    "train_data: [1, 2]": "train_data: got [1, 2], wanted a list of texts",
    "train_data: {a: b}": "train_data: got {'a': 'b'}, wanted a list of texts",
    "save: $HOME/runs": "variables of the shell are not filled in here",
    "save: '${SCRATCH}/runs'": "variables of the shell are not filled in here",
    'prompt: "a\\0b"': "prompt: got 'a\\x00b', wanted a text",
    "version: v9": "version: got 'v9', wanted one of base, chat",
    "lr_decay_style: cosin": "wanted one of cosine, linear, constant; did you mean cosine?",
    "zero_stage: true": "zero_stage: got True, wanted one of 0, 1, 2, 3",
    "split: [0.5]": "wanted shares that sum to 1; give 0.5,0.5 (train,valid)",
    "betas: 0.9": "betas: got 0.9, wanted two numbers below 1",
    "r: 0": "lora.r has to be a whole number of at least 1, got 0",
    "rank_pattern: [3]": "lora.rank_pattern has to be a dictionary",
    "lora_alpha: big": "lora_alpha: got 'big', wanted a number",
    "lora: {r: x}": "lora.r: got 'x', wanted a whole number",
    "lora_rank: 1.5.2": "r: got '1.5.2', wanted a whole number",
    "lora: {rank_pattern: {dense: x}}": "lora.rank_pattern: got {'dense': 'x'}, wanted a whole number",
    "alpha_pattern: {dense: ten}": "alpha_pattern: got {'dense': 'ten'}, wanted a number",
    "use_rslora: perhaps": "use_rslora has to be True or False, got 'perhaps'",
    "larning_rate: 1": "there is no setting larning_rate; did you mean optimizer.lr?",
    "optim: adamw": "the optimizer is AdamW; its settings are --lr",
    "learning_rate: 1": "there is no setting learning_rate; did you mean optimizer.lr?",
    "optimiser: {lr: 1}": "there is no setting optimiser; did you mean optimizer?",
    "optimizer: {learning_rate: 1}": "there is no setting optimizer.learning_rate; did you mean optimizer.lr?",
    "per_device_train_batch_size: 4": "did you mean schedule.batch_size?",
    "trian_data: x": "did you mean data.train_data?",
    "load_in_4bit: true": "--quantize nf4 holds the base in 4.25 bits",
    "defaults: [base]": "there is no setting defaults; --print-config shows all of them",
    "1: 2": "there is no setting 1",
    '"\\e[2Jx": 1': "there is no setting \\x1b[2Jx",
    "optimizer: {batch_size: 3}": "optimizer.batch_size is no setting of that section; it is schedule.batch_size",
    "lora: {seed: 3}": "it is schedule.seed",
    "optimizer: adamw": "optimizer: got 'adamw', wanted its settings below it: lr, ",
    "lr: 1\noptimizer: {lr: 2}": "lr stands twice, as lr and as optimizer.lr; keep one of them",
    "r: 4\nlora_rank: 8": "r stands twice, as r and as lora_rank",
    "lr: 1\nlr: 2": "'lr' stands twice in one place",
    "optimizer:\n  lr: 1\n  lr: 2": "'lr' stands twice in one place",
    "resume: runs/x": "resume belongs to one start; give --resume as an option",
    "start: {doctor: true}": "start.doctor belongs to one start; give --doctor as an option",
    "trust-checkpoint: true": "give --trust-checkpoint as an option",  # a file of others may not let code run
    "": "it is empty",
    " \n\n": "it is empty",
    "# nothing\n": "holds nothing, wanted settings such as `lr: 2e-4`",
    "- lr: 1": "holds a list, wanted settings",
    "lr=1e-4": "write `name: value` on each line",
    "lr:1e-4": "write a space behind each colon",
    "optimizer:\n\tlr: 1": "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces",
    "lr: [1,": "line 1, column 8: ",
    "[optimizer]\nlr = 1e-4": "cannot be read as YAML: line 2, column 1: ",
    "a: 1\n---\nb: 2": "but found another document",
    "lr: !!python/object/apply:os.system ['touch here']": "tags are not read here",
    "prompt: !!binary aGVsbG8=": "tags are not read here",
    "lr: &a 1e-4\nweight_decay: *a": "line 2: aliases (*name) are not read here",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]": "aliases (*name) are not read here",
    "[a]: 1": "line 1: a key is no name",
    "a: " + "[" * 3000: "it is nested too deeply",
    "prompt: \x1b[31m": "special characters are not allowed",
    "prompt: " + "x" * LIMIT: "larger than 0.25 MiB",
    "zero_optimization: {stage: 2}\ntrain_batch_size: 8": "give that file to --deepspeed_config",
    '{"settings": {"lr": 1}, "versions": {}}': "is the run.json of a run; give its folder to --resume",
    "version https://git-lfs.github.com/spec/v1\noid sha256:1": "it is a pointer of git LFS",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_what_is_no_setting_is_one_message(text, read, tmp_path):
    with pytest.raises(ConfigError) as error:
        read(text)
    message = str(error.value)
    assert message.startswith(f"--config: {tmp_path}/mine.yaml") and REFUSED[text] in message
    assert "\n" not in message and len(message) < 500 and "\x1b" not in message
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ("lr: 1".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b"prompt: \xe9", "it is no text in UTF-8"),
        (bytes(range(256)), "it is no text in UTF-8"),
    ],
)
def test_bytes_that_are_no_utf_8_are_told(content, words, read):
    with pytest.raises(ConfigError, match=words):
        read(content)


JSON = {
    '{"lr": 1, "lr": 2}': "cannot be read as JSON: 'lr' stands twice",
    '{"lr": NaN}': "lr: got nan, wanted a number above 0",
    '{// none\n"lr": 1}': "cannot be read as JSON: Expecting property name",
    "lr: 1": "cannot be read as JSON",
    "[" * 200_000: "nested deeper than 100",
    "null": "holds nothing",
}


@pytest.mark.parametrize("text", JSON, ids=lambda text: text[:20])
def test_a_file_called_json_is_read_as_json(text, read):
    assert read('{"optimizer": {"lr": 1e-4}}', "mine.JSON") == {"lr": 1e-4}
    with pytest.raises(ConfigError) as error:
        read(text, "mine.json")
    assert JSON[text] in str(error.value)


def test_what_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "device")
    for name, words in {"pipe": "a pipe, no file", "device": "a device, no file", ".": "a folder, no file"}.items():
        with pytest.raises(ConfigError, match=f"cannot be read: {words}; give a file of settings"):
            read_config_file(tmp_path / name)
    with pytest.raises(ConfigError, match=r"no\.yaml is not there; give a file of settings, as --print-config"):
        read_config_file(tmp_path / "no.yaml")


def test_without_pyyaml_settings_may_be_json(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "sat_lora.files.yaml_text", None)
    with pytest.raises(ConfigError, match=r"install PyYAML, or write the same as JSON into a file called \.json"):
        read("lr: 1")
    assert read('{"lr": 1}', "mine.json") == {"lr": 1.0}


def test_all_that_is_wrong_comes_in_one_message(read):
    with pytest.raises(ConfigError) as error:
        read("lr: x\nbatch_size: 0\nfoo: 1\noptimizer: 3\nr: 0\n" + "".join(f"bar{n}: 1\n" for n in range(99)))
    first, *problems = str(error.value).split("\n")
    assert first.endswith("104 problems:") and len(problems) == 13 and problems[-1] == "- and 92 more"
    assert all(problem.startswith("- ") for problem in problems)


def test_a_mistake_in_a_file_ends_with_status_2_and_one_message_on_rank_0(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.yaml").write_text("lr: x")
    said = failure(capsys, ["--config", str(tmp_path / "mine.yaml")])
    assert "error: --config: " in said and "lr: got 'x', wanted a number above 0" in said and said.count("\n") == 1
    assert "got '', an empty name" in failure(capsys, ["--config", ""])
    assert "--config: given twice; put the settings" in failure(capsys, ["--config", "a.yaml", "--config", "b.yaml"])
    monkeypatch.setenv("RANK", "1")
    assert failure(capsys, ["--config", str(tmp_path / "mine.yaml")]) == ""


# Who beats whom


@pytest.fixture
def files(tmp_path):
    """A run, a DeepSpeed file and a --config file that have much to say of the same settings."""
    settings = {"from_pretrained": "base", "lr": 1e-3, "keep": 7, "clip_grad": 0.5, "weight_decay": 0.3}
    settings |= {"given": ["lr", "clip_grad"], "version": "vqa", "log_interval": 3}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": settings}))
    optimizer = {"type": "AdamW", "params": {"lr": 4e-4, "weight_decay": 0.4, "eps": 1e-6}}
    content = {"optimizer": optimizer, "gradient_clipping": 0.25, "zero_optimization": {"stage": 1}}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    (tmp_path / "mine.yaml").write_text(f"lr: 2e-3\nbatch_size: 2\nkeep: 9\ndeepspeed_config: {tmp_path}/ds.json\n")
    return tmp_path


def test_an_option_beats_the_file_beats_the_run_beats_deepspeed_beats_the_default(files):
    argv = ["--resume", str(files / "run"), "--config", str(files / "mine.yaml"), "--batch-size", "5"]
    config = parse_options(argv, environ={})
    origins = {
        "batch_size": (5, Origin.OPTION),
        "lr": (2e-3, Origin.FILE),
        "keep": (9, Origin.FILE),
        "clip_grad": (0.5, Origin.RUN),
        "weight_decay": (0.4, Origin.DEEPSPEED),  # the run's was nobody's wish
        "eps": (1e-6, Origin.DEEPSPEED),
        "zero_stage": (1, Origin.DEEPSPEED),
        "log_interval": (3, Origin.RUN_DEFAULT),
        "version": ("vqa", Origin.RUN_DEFAULT),
        "warmup": (0.01, Origin.DEFAULT),
    }
    assert {name: (config.value(name), config.origin(name)) for name in origins} == origins
    assert config.given == {"batch_size", "lr", "keep", "clip_grad", "deepspeed_config", "resume"}


def test_what_a_file_says_is_set_by_hand_and_beats_the_demo(files):
    config = parse_options(["--config", str(files / "mine.yaml")], environ={})
    assert (config.optimizer.lr, config.schedule.batch_size, config.data.prompt) == (2e-3, 2, "CAPTCHA:")
    assert config.origin("prompt") is Origin.DEMO and "lr" in config.given
    (files / "base.yaml").write_text("from_pretrained: cogvlm\nschedule: {epochs: 2}")
    real = parse_options(["--config", str(files / "base.yaml")], environ={})
    assert (real.data.prompt, real.schedule.epochs, real.run_folder) == ("What is this?", 2.0, "runs/finetune")


def test_of_two_that_exclude_each_other_the_better_source_counts(files, capsys):
    (files / "mine.yaml").write_text("epochs: 2\nfp16: true")
    argv = ["--from_pretrained", "b", "--config", str(files / "mine.yaml"), "--train-iters", "7", "--bf16"]
    config = parse_options(argv, environ={})
    assert (config.schedule.train_iters, config.schedule.epochs) == (7, None)
    assert (config.precision.bf16, config.precision.fp16) == (True, False)
    (files / "mine.yaml").write_text("epochs: 2\ntrain_iters: 3")
    said = failure(capsys, ["--config", str(files / "mine.yaml")])
    assert "--config: train_iters 3 and epochs 2: both say how long to train; give one of them" in said


def test_a_folder_of_no_name_is_refused_in_a_file_too(files, capsys):
    (files / "mine.yaml").write_text("experiment_name: ''")
    assert "--config: experiment_name: got '', wanted a name" in failure(capsys, ["--config", str(files / "mine.yaml")])


def test_resolving_changes_nothing_and_says_the_same_again(capsys):
    given, file = {"lr": 1e-7, "train_data": ["a"]}, {"lr": 1.0, "r": 4}
    first, warnings = resolve(given, file=file)
    assert resolve(given, file=file) == (first, warnings)
    assert (given, file) == ({"lr": 1e-7, "train_data": ["a"]}, {"lr": 1.0, "r": 4})
    assert len(warnings) == 1 and "1e-07 is very low" in warnings[0] and capsys.readouterr() == ("", "")
    with pytest.raises(AttributeError):
        first.optimizer.lr = 3.0
    with pytest.raises(TypeError):
        first.origins["lr"] = Origin.DEFAULT


def test_what_no_lora_can_have_is_said_with_all_else_that_is_wrong(files):
    (files / "mine.yaml").write_text(f"seed: {10**30}")
    argv = ["--from_pretrained", "b", "--config", str(files / "mine.yaml"), "--lora_dropout", "2"]
    config = parse_options(argv, environ={})
    assert [problem.split()[0] for problem in config.problems] == ["--lora_dropout", "--seed"]
    assert config.schedule.seed == 10**30


# What --print-config writes

COMMANDS = {
    "the demo": [],
    "a base": ["--from_pretrained", "base", "--train-data", "b c", 'd"e\\f', "--lr", "1e-8", "--epochs", "1.5"],
    "patterns": ["--from_pretrained", "b", "--rank_pattern", "de.*=4", "--qkv_slots", "q", "--layer_range", "0", "3"],
    "texts": ["--from_pretrained", "b", "--prompt", "no: 日本\t'\x85\x1b\u2028😀 #", "--split", "0.9,0.1"],
    "a precision": [
        "--from_pretrained",
        "b",
        "--fp16",
        "--zero-stage",
        "3",
        "--save",
        "on",
        "--experiment-name",
        "1e4",
    ],
}


def printed(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_options([*argv, "--print-config"], environ={})
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_gives_the_same_config_again(command, tmp_path, capsys):
    argv = COMMANDS[command]
    path = tmp_path / "printed.yaml"
    path.write_text(printed(argv, capsys))
    again = parse_options(["--config", str(path)], environ={})
    assert again == parse_options(argv, environ={})
    (tmp_path / "again.yaml").write_text(printed(["--config", str(path)], capsys))
    assert parse_options(["--config", str(tmp_path / "again.yaml")], environ={}) == again


def test_every_setting_is_printed_with_what_it_is_and_where_it_comes_from(files, capsys):
    lines = printed(["--resume", str(files / "run"), "--config", str(files / "mine.yaml"), "--seed", "7"], capsys)
    assert f"  # peak learning rate; LoRA wants 1e-4 or more [from {files}/mine.yaml]\n  lr: 0.002\n" in lines
    assert "[given as an option]\n  seed: 7\n" in lines
    assert "[from the DeepSpeed file]\n  weight_decay: 0.4\n" in lines
    assert "[left to the machine]\n  bf16: null\n" in lines
    assert f"# Of one start, and so in no file: --resume {files}/run\n" in lines
    shown = {line.partition(":")[0].strip() for line in lines.splitlines() if line.startswith("  ") and line[2] != "#"}
    assert shown == {name for name, known in KNOWN.items() if known.section not in ("start", "compatibility")}


def test_a_resumed_run_and_its_printed_config_are_the_same(files, tmp_path, capsys):
    stored = settings_of_run(files / "run")
    content = {**stored, "train_iters": 40, "epochs": 1.5, "given": ["epochs"]}
    (files / "run" / "run.json").write_text(json.dumps({"settings": content}))
    (tmp_path / "printed.yaml").write_text(printed(["--resume", str(files / "run")], capsys))
    again = parse_options(["--resume", str(files / "run"), "--config", str(tmp_path / "printed.yaml")], environ={})
    assert again == parse_options(["--resume", str(files / "run")], environ={})


def test_what_no_file_may_say_is_printed_as_a_comment(tmp_path, capsys):
    """Code and what belongs to one start: the file is read again, and what is pasted from the comment is taken."""
    text = printed(
        ["--overwrite", "--trust-checkpoint", "--metrics", "mine.py:score", "exact-match", "--metric", "mine.py:score"],
        capsys,
    )
    assert "names code: give it by --metrics]\n  metrics: null\n" in text
    assert "names code: give it by --metric]\n  metric: null\n" in text
    (line,) = re.findall(r"^# Of one start, and so in no file: (.+)$", text, re.M)
    (tmp_path / "printed.yaml").write_text(text)
    again = parse_options(["--config", str(tmp_path / "printed.yaml"), *line.split(", ")], environ={})
    assert (again.saving.metrics, again.saving.metric) == ((), "loss")
    assert again.start.overwrite and again.start.trust_checkpoint


def test_one_rank_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert printed([], capsys) == ""


def test_a_config_that_cannot_be_is_not_printed(capsys):
    assert "--r has to be a whole number of at least 1, got 0" in failure(capsys, ["--r", "0", "--print-config"])


def test_yaml_of_other_programs_reads_it_alike():
    import yaml

    config = parse_options(["--lr", "1e-8", "--prompt", "no", "--experiment-name", "1e4"], environ={})
    content = yaml.safe_load(as_yaml(config))
    assert {name: value for section in content.values() for name, value in section.items()} == {
        name: config.value(name)
        for name, known in KNOWN.items()
        if known.section not in ("start", "compatibility") and known.left_to is None
    } | {"bf16": None, "fp16": None, "quantize": None}


# Evaluations


def test_an_evaluation_takes_the_file_too(files, capsys):
    (files / "mine.yaml").write_text("data: {test_data: held_out, prompt: 'Why?'}\neval_batch_size: 7\nlr: 3\nr: 2")
    argv = ["--from_pretrained", "b", "--config", str(files / "mine.yaml"), "--prompt", "How?"]
    config = evaluate.read_settings(evaluate.build_parser().parse_args(argv)).config
    assert (config.data.test_data, config.data.prompt) == (("held_out",), "How?")
    assert config.saving.eval_batch_size == 7
    run = ["--run", str(files / "run"), "--config", str(files / "mine.yaml")]
    evaluation = evaluate.read_settings(evaluate.build_parser().parse_args(run))
    assert (evaluation.config.model.base, evaluation.adapter) == ("base", str(files / "run" / "adapter"))
    assert (evaluation.config.model.version, evaluation.config.data.prompt) == ("vqa", "Why?")
    (files / "mine.yaml").write_text("tset_data: x")
    assert load_script("evaluate_cogvlm").main(run) == 2
    assert "error: --config: " in (said := capsys.readouterr().err) and "did you mean data.test_data?" in said


def test_an_evaluation_prints_its_settings_before_it_has_a_base_and_data(files, capsys, read):
    assert evaluate.run_evaluation(["--config", str(files / "mine.yaml"), "--max_length", "99", "--print-config"]) == 0
    content = read(capsys.readouterr().out, "printed.yaml")
    assert content.items() >= (read_config_file(files / "mine.yaml") | {"max_length": 99}).items()
    assert not {"from_pretrained", "test_data"} & content.keys()


@pytest.mark.parametrize("page", ["docs/training.md", "docs/zh/training.md"])
def test_the_example_of_the_docs_is_taken(page, read):
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    expected = {"from_pretrained": "cogvlm-base-490", "train_data": ["my_images"], "epochs": 3.0, "batch_size": 4}
    assert read(example) == expected | {"r": 32, "lora_alpha": 64}


# Nothing slow before it

SLOW = """
import runpy, sys
sys.argv = {argv!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("status", stop.code, sorted(set(sys.modules) & {{"torch", "deepspeed", "transformers", "sat"}}))
"""


@pytest.mark.parametrize(
    "argv, status", [(["--print-config"], 0), (["--config", "no.yaml"], 2)], ids=["printed", "a mistake"]
)
def test_it_is_said_before_anything_slow_is_imported(argv, status, tmp_path):
    script = SLOW.format(argv=[str(DEMO / "finetune_cogvlm.py"), *argv])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.endswith(f"status {status} []\n"), done.stdout[-500:] + done.stderr[-500:]

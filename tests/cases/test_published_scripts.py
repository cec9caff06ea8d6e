"""Kind 12: published scripts run with their options unchanged; no option is read as the abbreviation of another."""

import shlex

import pytest

from sat_lora.cli import main as sat_lora
from sat_lora.commands import evaluate
from sat_lora.data.samples import reading_options
from sat_lora.training.source_settings import source_settings
from tests.support.configs import parse_options
from tests.support.paths import TINY_BASE
from tests.support.scripts import load_script

COMMON = (
    "--mode finetune --train-iters 0 --resume-dataloader {model} --train-data ./archive_split/train "
    "--test-data ./archive_split/test --distributed-backend nccl --lr-decay-style cosine --warmup .02 "
    "--checkpoint-activations --save-interval 200 --eval-interval 200 --save ./checkpoints --strict-eval "
    "--eval-batch-size 1 --split 1. --deepspeed_config scripts/test_config_bf16.json --skip-init --seed 2023"
)
PUBLISHED = {  # the options of CogVLM's scripts of these names, in their order and spelling
    "evaluate_cogvlm.sh": "--local_rank=0 --experiment-name finetune-cogvlm-base-490 --model-parallel-size 1 "
    + COMMON.format(
        model="--from_pretrained ./checkpoints/merged_lora --max_length 1288 --lora_rank 10 --use_lora "
        "--local_tokenizer lmsys/vicuna-7b-v1.5 --version base"
    ),
    "evaluate_cogagent.sh": "--local_rank=3 --experiment-name finetune-cogagent-chat --model-parallel-size 1 "
    + COMMON.format(
        model="--from_pretrained ./checkpoints/ft_cogagent_model --max_length 400 "
        "--local_tokenizer lmsys/vicuna-7b-v1.5 --version chat"
    ),
}


@pytest.mark.parametrize("script", PUBLISHED)
def test_the_published_options_of_an_evaluation_are_taken_unchanged(script):
    given = evaluate.build_parser().parse_args(shlex.split(PUBLISHED[script]))
    evaluation = evaluate.read_settings(given)
    options = evaluation.config
    assert options.data.test_data == ("./archive_split/test",)
    assert options.model.local_tokenizer == "lmsys/vicuna-7b-v1.5"
    assert (options.saving.eval_batch_size, options.parallel.model_parallel_size) == (1, 1)
    assert evaluation.adapter is None  # the published evaluation is of a merged model
    assert "--strict-eval" in given.no_effect and "--train-iters" in given.no_effect
    assert not {"--max_length", "--version", "--test-data", "--eval-batch-size"} & {*given.no_effect}
    expected = ("./checkpoints/merged_lora", 1288, "base", True)
    if script == "evaluate_cogagent.sh":
        expected = ("./checkpoints/ft_cogagent_model", 400, "chat", False)
    names_lora = "--use_lora" in given.no_effect
    assert (options.model.from_pretrained, options.model.max_length, options.model.version, names_lora) == expected


@pytest.mark.parametrize(
    "more",
    ["--layer_range 0 1 2", "--vit_checkpoint_activations", "--eval-iters 10", "--resume runs/x", "--lr=1e-5 --bf16"],
)
def test_so_are_the_other_options_of_fine_tuning(more):
    options = evaluate.build_parser().parse_args(["--test-data", "a", *shlex.split(more)])
    assert options.test_data == ["a"] and options.no_effect


def test_how_data_are_read_is_heeded_in_an_evaluation_too():
    more = "--data-format messages --columns prompt=q --image-mark <img> --images-per-sample 2 --ignore-keys note"
    more += " --images-from up --names-are-answers"
    given = evaluate.build_parser().parse_args(["--from_pretrained", str(TINY_BASE), "--test-data", "a", *more.split()])
    reading = {**reading_options(source_settings(evaluate.read_settings(given).config))}
    del reading["run_folder"]
    expected = dict(data_format="messages", columns=("prompt=q",), image_mark="<img>", images_per_sample=2)
    assert reading == {**expected, "ignore_keys": ("note",), "images_from": ("up",), "names_are_answers": True}
    assert given.no_effect == []


@pytest.mark.usefixtures("single_process_group")
def test_a_merged_model_is_evaluated_alone_and_said_so(captchas, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sat_lora.parallel.distributed.torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("sat_lora.parallel.distributed.mpu.destroy_model_parallel", lambda: None)
    base, out = TINY_BASE, tmp_path / "evaluation.json"
    options = ["--from_pretrained", base, "--test-data", captchas / "valid", "--version", "base", "--max_length", 64]
    status = load_script("evaluate_cogvlm").main([*map(str, options), "--out", str(out), "--strict-eval", "--use_lora"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "no effect on an evaluation: --strict-eval, --use_lora" in printed
    assert f"no --adapter: {base} is evaluated alone" in printed
    assert "16 images" in printed and "base + adapter" not in printed
    assert "adapter" not in out.read_text()


def test_a_run_without_test_data_is_asked_for_it_alone(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"settings": {"from_pretrained": "x", "test_data": null}}')
    assert load_script("evaluate_cogvlm").main(["--run", str(tmp_path)]) == 2
    assert f"error: --test-data missing: {tmp_path} has none; give them\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--train-iter", "5"], "did you mean --train-iters?"),
        (["--save-int", "5"], "did you mean --save-interval?"),
        (["--from", "x"], "unknown: --from x"),
        (["--learning-rate", "1e-4"], "did you mean --lr?"),
        (["--learning_rate=1e-4"], "did you mean --lr?"),
        (["--num_train_epochs", "3"], "did you mean --epochs?"),
        (["--per-device-train-batch-size", "3"], "did you mean --batch-size?"),
        (["--output_dir", "x"], "did you mean --save?"),
        (["--model_name_or_path", "x"], "did you mean --from_pretrained?"),
        (["--gradient_checkpointing"], "did you mean --checkpoint-activations?"),
        (["--qlora"], "--quantize nf4 holds the base in 4.25 bits"),
        (["--use_qlora"], "--quantize nf4 holds the base in 4.25 bits"),
        (["--load_in_8bit"], "--quantize int8 holds the base in 8.25 bits"),
        (["--quantization-bit", "4"], "--quantize nf4 holds the base in 4.25 bits"),
        (["--bnb_4bit_quant_type", "nf4"], "--quantize nf4 has no further settings"),
        (["--pre_seq_len", "8"], "there is no P-tuning here"),
        (["--config_file", "my.yaml"], "did you mean --config?"),
        (["--num_gpus", "8"], "it is an option of the launcher: give it before the script"),
        (["--x\x1b[2J"], r"unknown: --x\x1b[2J; --help lists the options"),
    ],
)
def test_a_near_name_is_a_hint_and_never_an_option(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(argv, environ={})
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and words in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["inspect", "x", "--js"], "sat-lora inspect: error: unknown: --js; did you mean --json?"),
        (["merge", "--base", "a", "--adapter", "b", "--out", "c", "--veri"], "unknown: --veri"),
        (["merge", "--base", "a", "--adapter", "b", "--ou", "c"], "required: --out"),
        (["combine", "a", "--method", "cat", "--out", "b", "--weight", "1"], "unknown: --weight"),
        (["estimate", "--gpu", "8"], "unknown: --gpu 8"),
        (["doctor", "--rank", "2"], "unknown: --rank 2"),
    ],
)
def test_nothing_is_abbreviated_in_sat_lora_either(argv, words, capsys):
    try:
        status = sat_lora(argv)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err


def test_whole_numbers_may_be_written_as_people_write_them(capsys):
    for text, steps in (("1e3", 1000), ("2E+2", 200), ("800", 800), ("1_000", 1000), ("1e3.0", None), ("1.5", None)):
        if steps is None:
            with pytest.raises(SystemExit):
                parse_options(["--train-iters", text], environ={})
            assert f"got {text!r}, wanted a whole number above 0" in capsys.readouterr().err
        else:
            assert parse_options(["--train-iters", text], environ={}).schedule.train_iters == steps


@pytest.mark.parametrize(
    "option, most",
    [("--batch-size", "65,536"), ("--gradient-accumulation-steps", "1,048,576"), ("--num-workers", "1,024")],
)
def test_a_slip_of_many_digits_fills_no_memory_and_starts_no_processes(option, most, capsys):
    for text in ("10000000", "1" + 30 * "0"):
        with pytest.raises(SystemExit) as stop:
            parse_options([option, text], environ={})
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and f"argument {option}: got {text!r}, wanted " in printed
        assert printed.endswith(f", {most} at most\n") and printed.count("\n") == 1


@pytest.mark.parametrize(
    "script, argv",
    [
        ("pack_shards", ["x", "--out", "y", "--samples-per-shard", "0"]),
        ("pack_shards", ["x", "--out", "y", "--samples-per-shard", "-3"]),
        ("make_captchas", ["--train", "-1"]),
        ("make_captchas", ["--workers", "0"]),
        ("evaluate_cogvlm", ["--eval-batch-size", "0"]),
        ("evaluate_cogvlm", ["--model-parallel-size", "0"]),
        ("evaluate_cogvlm", ["--max_length", "none"]),
    ],
)
def test_a_number_that_cannot_be_is_one_line(script, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script(script).main(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and "wanted a whole number" in printed


@pytest.mark.parametrize(
    "argv",
    [["--from_pretrained", ""], ["--train-data", ""], ["--train-data", "x", ""], ["--save="], ["--experiment-name", ""],
     ["--resume", ""]],
)  # fmt: skip
def test_an_empty_name_is_not_the_folder_one_is_in(argv, capsys):
    """As of `--train-data "$DATA"` where DATA is not set; a prompt may be empty."""
    with pytest.raises(SystemExit) as stop:
        parse_options(argv, environ={})
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    option = argv[0].rstrip("=")
    assert f"error: argument {option}: got '', an empty name; a variable of the shell may not be set" in printed
    assert parse_options(["--prompt", ""], environ={}).data.prompt == ""


@pytest.mark.parametrize(
    "argv",
    [["inspect", ""], ["merge", "--base", "", "--adapter", "b", "--out", "c"],
     ["combine", "a", "", "--method", "cat", "--out", "b"]],
)  # fmt: skip
def test_nor_is_it_in_other_commands(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sat_lora(argv)
    assert stop.value.code == 2 and "got '', an empty name" in capsys.readouterr().err


def test_a_watchdog_waits_no_longer_than_a_thread_can(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--watchdog-limit", "1e300"], environ={})
    assert "wanted a number, 0 or above, 1,000,000,000 at most" in capsys.readouterr().err

import json
import shlex

import pytest

from sat_lora.training.settings.config import DEFAULTS
from sat_lora.training.settings.options import build_parser
from sat_lora.training.settings.schedule import warmup_steps
from tests.support.configs import demo, parse_options
from tests.support.option_errors import failure

# The options of CogVLM's published finetune_cogvlm_lora.sh, in its order and spelling.
PUBLISHED = shlex.split(
    "--local_rank=0 --experiment-name finetune-cogvlm-base-490 --model-parallel-size 1 --mode finetune "
    "--train-iters 800 --resume-dataloader --from_pretrained cogvlm-base-490 --max_length 1288 --lora_rank 10 "
    "--use_lora --local_tokenizer lmsys/vicuna-7b-v1.5 --version base --train-data ./archive_split/train "
    "--valid-data ./archive_split/valid --distributed-backend nccl --lr-decay-style cosine --warmup .02 "
    "--checkpoint-activations --vit_checkpoint_activations --save-interval 200 --eval-interval 200 "
    "--save ./checkpoints --eval-iters 10 --eval-batch-size 1 --split 1. "
    "--deepspeed_config scripts/test_config_bf16.json --skip-init --seed 2023"
)


def test_published_launch_options_are_taken_unchanged():
    options = parse_options(PUBLISHED)
    assert options.model.from_pretrained == "cogvlm-base-490"
    assert (options.schedule.train_iters, options.schedule.epochs) == (800, None)
    assert options.data.train_data == ("./archive_split/train",)
    assert options.data.valid_data == ("./archive_split/valid",)
    assert options.data.split == (1.0,)
    assert (options.schedule.warmup, options.lora.r) == (0.02, 10)
    assert options.checkpointing.checkpoint_activations and options.checkpointing.vit_checkpoint_activations
    assert options.run_folder == "checkpoints/finetune-cogvlm-base-490"
    assert "lr" not in options.given and "train_iters" in options.given


def test_every_option_takes_hyphens_and_underscores():
    for argument in ("--train-iters", "--train_iters"):
        assert parse_options([argument, "5"]).schedule.train_iters == 5
    for argument in ("--lora_rank=4", "--lora-rank=4"):
        assert parse_options([argument]).lora.r == 4
    assert parse_options(["--local-rank=3"]).start.local_rank == 3


def test_without_the_checkout_it_is_said_where_the_demo_lies(capsys, tmp_path):
    said = failure(capsys, [], demo=demo.demo_in(tmp_path / "site-packages" / "finetune_demo"))
    assert "--from_pretrained: missing, and the demo is not installed" in said
    assert "finetune_demo/ of a clone of sat_lora; give the base's folder" in said
    assert failure(capsys, [], demo=None) == said
    assert parse_options(["--from_pretrained", "base"], demo=None).model.from_pretrained == "base"


def test_values_keep_their_hyphens():
    assert parse_options(["--experiment_name=a-b_c"]).saving.experiment_name == "a-b_c"


def test_no_option_at_all_is_the_embedded_demo(tmp_path):
    options = parse_options([], demo=demo.demo_in(tmp_path))
    assert options.model.from_pretrained == options.model.local_tokenizer == str(tmp_path / "tiny_cogvlm")
    assert options.data.train_data == (str(tmp_path / "captchas" / "train"),)
    assert (options.run_folder, options.schedule.batch_size, options.schedule.train_iters) == ("runs/demo", 32, 700)
    assert (
        options.optimizer.lr,
        warmup_steps(options.schedule.warmup, 700),
        options.lora.r,
        options.lora.lora_alpha,
    ) == (3e-3, 30, 16, 32)
    assert options.data.prompt == "CAPTCHA:"
    assert options.given == frozenset()


def test_own_training_data_is_not_validated_on_the_demos_captchas(tmp_path):
    options = parse_options(["--train-data", "mine"], demo=demo.demo_in(tmp_path))
    assert (options.data.train_data, options.data.valid_data, options.data.test_data) == (("mine",), None, None)


def test_a_real_base_gets_the_general_defaults():
    options = parse_options(["--from_pretrained", "cogvlm"])
    assert (options.optimizer.lr, options.schedule.batch_size, options.schedule.train_iters) == (
        1e-4,
        DEFAULTS["batch_size"],
        None,
    )
    assert options.run_folder == "runs/finetune"


def test_epochs_replace_the_demos_steps(tmp_path):
    options = parse_options(["--epochs", "0.5"], demo=demo.demo_in(tmp_path))
    assert (options.schedule.epochs, options.schedule.train_iters) == (0.5, None)


def test_epochs_and_train_iters_together_are_refused(capsys):
    message = failure(capsys, ["--epochs", "2", "--train-iters", "10"])
    assert "--train-iters 10 and --epochs 2: both say how long to train; give one of them" in message


def test_an_unknown_option_is_named_with_the_nearest_one(capsys):
    assert "unknown: --lora_ranks 3; did you mean --lora_rank?" in failure(capsys, ["--lora_ranks", "3"])


def test_options_are_not_abbreviated(capsys):
    assert "--train-iter" in failure(capsys, ["--train-iter", "3"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--version", "cogagent"], ["--version", "'cogagent'", "chat_old"]),
        (["--train-iters", "0"], ["--train-iters", "got '0'", "a whole number above 0"]),
        (["--lr", "nan"], ["--lr", "got 'nan'", "a number above 0"]),
        (["--min-lr-ratio", "1"], ["--min-lr-ratio", "got '1'", "but not including, 1"]),
        (["--split", "1,2,3,4"], ["--split", "got '1,2,3,4'", "one to three shares"]),
        (["--zero-stage", "4"], ["--zero-stage", "4"]),
        (["--lr-decay-style", "exponential"], ["--lr-decay-style", "exponential", "cosine"]),
    ],
)
def test_a_bad_value_is_reported_with_its_option(capsys, argv, words):
    message = failure(capsys, argv)
    assert all(word in message for word in words), message
    assert message.count("\n") == 1


def test_only_the_first_rank_reports_but_all_end_with_status_2(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert failure(capsys, ["--train-iters", "zero"]) == ""


def test_help_is_grouped_and_says_what_has_no_effect(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups = ["what people set", "model", "LoRA", "data", "schedule", "parallelism and memory"]
    groups += ["saving and evaluating", "accepted for compatibility"]
    places = [text.index(f"\n{name}:\n") for name in groups]
    assert places == sorted(places)
    compatible = text[places[-1] :]
    names = ["--mode", "--use_lora", "--resume-dataloader", "--skip-init", "--ignore_pad_token_for_loss", "--deepspeed"]
    names += ["--image_length", "--cross_image_pix", "--eva_args"]
    assert all(f"  {name}" in compatible for name in names)
    assert compatible.count("no effect:") == len(names)


def test_every_default_has_a_place_on_the_command_line():
    known = {action.dest for action in build_parser()._actions}
    assert DEFAULTS.keys() - known == {"betas", "eps"}


def test_resume_takes_over_the_settings_of_the_run(tmp_path):
    settings = {"lr": 7e-4, "r": 8, "train_iters": 50, "from_pretrained": "base", "given": ["r"]}
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    options = parse_options(["--resume", str(tmp_path), "--epochs", "2"])
    assert (options.optimizer.lr, options.lora.r, options.model.from_pretrained) == (7e-4, 8, "base")
    assert (options.schedule.epochs, options.schedule.train_iters) == (2, None)
    assert options.given == {"r", "resume", "epochs"}
    assert options.run_folder == str(tmp_path)


def test_resume_of_something_else_is_refused(capsys, tmp_path):
    message = failure(capsys, ["--resume", str(tmp_path)])
    assert f"--resume: {tmp_path} is no run folder with a readable run.json" in message


def test_local_rank_comes_from_the_launcher():
    assert parse_options([], environ={"LOCAL_RANK": "5"}).start.local_rank == 5


def test_a_shrunk_model_cannot_be_trained(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(["--shrink", "2"])
    assert stop.value.code == 2 and "--shrink 2: training takes the whole model" in capsys.readouterr().err
    assert parse_options(["--shrink", "2", "--doctor"]).start.shrink == 2

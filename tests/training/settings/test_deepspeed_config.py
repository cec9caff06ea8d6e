import json
import logging

import pytest

from sat_lora.errors import ConfigError
from sat_lora.terminal.notice import warn
from sat_lora.training.settings.deepspeed_config import BUCKET, decisions, settle
from tests.support.configs import parse_options

# The file that CogVLM's launch script names (finetune_demo/test_config_bf16.json).
PUBLISHED = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.1,
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": False,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 4e7,
        "allgather_bucket_size": 1e8,
        "load_from_fp32_weights": False,
    },
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 5e-2}},
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
    "wall_clock_breakdown": False,
}


@pytest.fixture
def merge(tmp_path):
    def merge(content=None, *argv, device="cpu", environ=None):
        if content is not None:
            path = tmp_path / "ds.json"
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            argv = ("--deepspeed_config", str(path), *argv)
        place = environ if "RANK" in (environ or {}) else {}
        options = parse_options(["--from_pretrained", "base", *argv], environ=place)
        settled = settle(options, device=device, environ=environ or {})
        for message in settled.warnings:
            warn(message, environ or {})
        return settled.engine, settled.config

    return merge


def test_without_a_file_the_options_decide(merge):
    config, options = merge(None, "--batch-size", "3", "--zero-stage", "1", "--clip-grad", "0.5")
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": BUCKET}
    assert config["gradient_clipping"] == 0.5
    assert config["zero_allow_untested_optimizer"] is True and config["zero_force_ds_cpu_optimizer"] is False
    assert config["steps_per_print"] > 10**9 and config["wall_clock_breakdown"] is False
    assert options.saving.eval_batch_size == 3


def test_the_published_file_is_taken(merge, caplog):
    config, options = merge(PUBLISHED)
    assert config["zero_optimization"] == PUBLISHED["zero_optimization"]
    assert config["activation_checkpointing"] == PUBLISHED["activation_checkpointing"]
    assert (options.schedule.batch_size, options.optimizer.clip_grad, options.parallel.zero_stage) == (32, 0.1, 2)
    optimizer = options.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-5, (0.9, 0.95), 0.05)
    assert options.precision.bf16
    assert not config.keys() & {"optimizer", "scheduler", "offload_optimizer"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert '"offload_optimizer" at the top level does nothing; DeepSpeed reads it inside' in caplog.text


def test_deepspeed_accepts_the_merged_config(merge):
    from deepspeed.runtime.config import DeepSpeedConfig

    config, _ = merge(PUBLISHED)
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_config.stage == 2 and parsed.bfloat16_config.enabled
    assert (parsed.train_micro_batch_size_per_gpu, parsed.gradient_clipping) == (32, 0.1)


def test_a_given_option_beats_the_file(merge):
    given = "--lr 5e-4 --batch-size 2 --clip-grad 2 --weight-decay 0 --gradient-accumulation-steps 4".split()
    config, options = merge(PUBLISHED, *given)
    assert (options.optimizer.lr, options.optimizer.weight_decay, options.optimizer.betas) == (5e-4, 0.0, (0.9, 0.95))
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 2.0


def test_merging_twice_changes_nothing(merge):
    config, options = merge(PUBLISHED)
    again = settle(options, device="cpu", environ={})
    assert (again.engine, again.config) == (config, options)


@pytest.mark.parametrize(
    ("content", "argv", "device", "bf16", "fp16"),
    [
        (None, (), "cpu", False, False),
        (None, (), "cuda:0", True, False),
        (None, ("--fp16",), "cuda", False, True),
        (None, ("--bf16",), "cpu", True, False),
        ({"bf16": {"enabled": False}}, (), "cuda", False, False),
        ({"fp16": {"enabled": True}}, (), "cuda", False, True),
        ({"fp16": {"enabled": True}}, ("--bf16",), "cuda", True, False),
        ({"bf16": {"enabled": True}}, ("--fp16",), "cuda", False, True),
    ],
)
def test_precision_is_the_flags_or_the_files_or_the_devices(merge, content, argv, device, bf16, fp16):
    config, options = merge(content, *argv, device=device)
    assert (options.precision.bf16, options.precision.fp16) == (bf16, fp16)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (bf16, fp16)


def test_entries_that_say_auto_are_left_to_the_options(merge):
    config, _ = merge({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}})
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": BUCKET}


def test_a_global_batch_size_is_divided_over_the_ranks(merge):
    content = {"train_batch_size": 48, "gradient_accumulation_steps": 2}
    config, options = merge(content, environ={"WORLD_SIZE": "4"})
    assert options.schedule.batch_size == 6 and "train_batch_size" not in config
    with pytest.raises(ConfigError, match='"train_batch_size" 48 does not divide by 5 data-parallel ranks x 2'):
        merge(content, environ={"WORLD_SIZE": "5"})


def test_what_a_file_leaves_out_beside_a_global_batch_size_is_the_accumulation(merge, caplog):
    """As DeepSpeed has it; an option of either factor says that it is meant otherwise."""
    content = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}
    config, options = merge(content, environ={"WORLD_SIZE": "2"})
    assert (options.schedule.batch_size, options.schedule.gradient_accumulation_steps) == (4, 4)
    assert config["gradient_accumulation_steps"] == 4 and "not used" not in caplog.text
    assert "accumulation steps 4 (of train_batch_size 32)" in " ".join(decisions(options, "cpu"))
    assert merge(content, "--gradient-accumulation-steps", "2")[1].schedule.gradient_accumulation_steps == 2
    assert merge(content | {"train_batch_size": 30})[1].schedule.gradient_accumulation_steps == 1
    assert '"train_batch_size" 30 is not used' in caplog.text


def test_a_global_batch_size_that_does_not_hold_is_said_to_be_unused(merge, caplog):
    merge({"train_batch_size": 48}, "--batch-size", "2")
    assert '"train_batch_size" 48 is not used: 2 samples x 1 accumulation steps x 1 ranks make 2' in caplog.text


def test_a_scheduler_section_is_said_to_be_unused(merge, caplog):
    config, _ = merge({"scheduler": {"type": "WarmupLR", "params": {}}})
    assert "scheduler" not in config
    assert '"scheduler" is not used; --lr-decay-style' in caplog.text


def test_a_learning_rate_that_learns_nothing_is_warned_about(merge, caplog):
    merge({"optimizer": {"type": "AdamW", "params": {"lr": 1e-7}}})
    assert "--lr: 1e-07 is very low, LoRA learns next to nothing below 1e-05; try 1e-4" in caplog.text


def test_only_the_first_rank_warns(merge, caplog):
    rank = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    merge(PUBLISHED, "--lr", "1e-8", environ=rank)
    assert caplog.records == []


def test_nccl_without_a_gpu_becomes_gloo(merge, caplog):
    assert merge(None, "--distributed-backend", "nccl")[1].parallel.distributed_backend == "gloo"
    assert "nccl needs GPUs and there is none; gloo is used" in caplog.text
    assert merge(None, device="cuda")[1].parallel.distributed_backend == "nccl"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list, wanted a JSON object"),
        ({"zero_optimisation": {"stage": 2}}, '"zero_optimisation" is no entry .* did you mean "zero_optimization"'),
        ({"xyz": 1}, '"xyz" is no entry .*; remove it'),
        ({"optimizer": {"type": "Lion"}}, '"optimizer": type is \'Lion\', wanted "AdamW" or "Adam"'),
        ({"zero_optimization": {"stage": 7}}, '"zero_optimization": "stage" is 7, wanted a number: 0, 1'),
        ({"zero_optimization": {"offlod_optimizer": {}}}, '"zero_optimization": offlod_optimizer: '),
        ({"zero_optimization": 2}, '"zero_optimization" is 2, wanted an object'),
        ({"train_micro_batch_size_per_gpu": 0}, '"train_micro_batch_size_per_gpu" is 0, wanted a whole number'),
        ({"gradient_clipping": "1"}, "\"gradient_clipping\" is '1', wanted a number"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, '"betas" is .*, wanted two numbers'),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, '"bf16" and "fp16" are both enabled'),
    ],
)
def test_a_wrong_file_is_refused_with_the_entry(merge, content, words):
    with pytest.raises(ConfigError, match=words) as error:
        merge(content)
    assert "--deepspeed_config" in str(error.value)


def test_a_missing_file_is_refused(merge):
    with pytest.raises(ConfigError, match="--deepspeed_config: nowhere.json is not a file"):
        merge(None, "--deepspeed_config", "nowhere.json")


@pytest.fixture(autouse=True)
def _log_reaches_caplog(caplog):
    caplog.set_level(logging.WARNING, logger="sat_lora")

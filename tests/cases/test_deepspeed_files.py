"""DeepSpeed files of the wild: what they leave to the trainer, what editors make of them, and what is wrong in them."""

import json
import logging
import os
import re

import pytest

from sat_lora.errors import ConfigError
from sat_lora.training.settings.deepspeed_config import BUCKET, NEVER, decisions, settle
from sat_lora.training.settings.deepspeed_file import read_deepspeed_file
from tests.support.configs import parse_options

AUTO = "auto"
OF_A_TRAINER = {  # every entry that trainers of Hugging Face fill in themselves
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "steps_per_print": AUTO,
    "wall_clock_breakdown": AUTO,
    "communication_data_type": AUTO,
    "bf16": {"enabled": AUTO},
    "fp16": {
        "enabled": AUTO,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": AUTO,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AUTO)},
    "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(("warmup_max_lr", "total_num_steps"), AUTO)},
    "zero_optimization": {
        "stage": AUTO,
        "overlap_comm": AUTO,
        "reduce_bucket_size": AUTO,
        "allgather_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "stage3_gather_16bit_weights_on_model_save": AUTO,
        "offload_optimizer": {"device": AUTO, "pin_memory": AUTO},
    },
}


@pytest.fixture
def take(tmp_path):
    """Merges a file (an object, a text or bytes) with options; gives (DeepSpeed's config, the options)."""

    def take(content, *argv, device="cuda", environ=None):
        path = tmp_path / "ds.json"
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        options = parse_options(["--from_pretrained", "base", "--deepspeed_config", str(path), *argv], environ={})
        settled = settle(options, device=device, environ=environ or {})
        return settled.engine, settled.config

    return take


def refusal(take, content) -> str:
    with pytest.raises(ConfigError) as error:
        take(content)
    return str(error.value).partition("ds.json")[2].removeprefix(":").strip()


def without(options) -> dict:
    return {name: value for name, value in options.flat().items() if name != "deepspeed_config"}


@pytest.mark.parametrize("nothing", [AUTO, "Auto", None])
@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_what_is_left_to_the_trainer_is_as_if_it_were_absent(take, nothing, device):
    def replaced(value):
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        return nothing if value == AUTO else value

    file = replaced(OF_A_TRAINER)
    own = {"fp16": {key: value for key, value in file["fp16"].items() if isinstance(value, int)}}
    config, options = take(file, device=device)
    absent, same = take({"scheduler": {}, **own}, device=device)
    config["zero_optimization"].pop("offload_optimizer")
    assert config == absent and without(options) == without(same)
    assert options.precision.bf16 is device.startswith("cuda") and not options.precision.fp16
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": BUCKET}


@pytest.mark.parametrize(
    "content",
    [
        {"bf16": None, "fp16": None},
        {"bf16": {}, "fp16": {"enabled": "auto"}},
        {"bf16": {"enabled": None}},
        {"bf16": {"enabled": " AUTO "}, "fp16": {"enabled": False}},
        {"optimizer": {"type": "AdamW", "params": None}, "zero_optimization": None, "train_batch_size": None},
        {"optimizer": {"type": None, "params": {"betas": ["auto", "auto"]}}, "scheduler": {"params": None}},
    ],
)
def test_sections_that_say_nothing_decide_nothing(take, content):
    options = take(content)[1]
    assert without(options) == without(take({})[1]) and options.precision.bf16


@pytest.mark.parametrize(
    ("bf16", "fp16", "expected"),
    [
        ("true", "false", (True, False)),
        ("True", None, (True, False)),
        ("1", "0", (True, False)),
        (1, 0, (True, False)),
        ("yes", AUTO, (True, False)),
        ("FALSE", AUTO, (False, False)),
        (AUTO, "true", (False, True)),
        ("off", "on", (False, True)),
    ],
)
def test_booleans_in_quotes_are_booleans(take, bf16, fp16, expected):
    config, options = take({"bf16": {"enabled": bf16}, "fp16": {"enabled": fp16}})
    assert (options.precision.bf16, options.precision.fp16) == expected
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == expected


def test_a_false_in_quotes_is_false_in_every_section(take):
    zero = {"stage": 2, "overlap_comm": "False", "contiguous_gradients": "true"}
    config, _ = take({"zero_optimization": zero, "wall_clock_breakdown": "false"})
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["zero_optimization"]["contiguous_gradients"] is True
    assert config["wall_clock_breakdown"] is False


SETTINGS = {
    "lr": '{{"optimizer": {{"params": {{"lr": {}}}}}}}',
    "weight_decay": '{{"optimizer": {{"params": {{"weight_decay": {}}}}}}}',
    "eps": '{{"optimizer": {{"params": {{"eps": {}}}}}}}',
    "betas": '{{"optimizer": {{"params": {{"betas": [0.9, {}]}}}}}}',
    "gradient_clipping": '{{"gradient_clipping": {}}}',
    "train_batch_size": '{{"train_batch_size": {}}}',
    "train_micro_batch_size_per_gpu": '{{"train_micro_batch_size_per_gpu": {}}}',
    "gradient_accumulation_steps": '{{"gradient_accumulation_steps": {}}}',
    "stage": '{{"zero_optimization": {{"stage": {}}}}}',
    "reduce_bucket_size": '{{"zero_optimization": {{"reduce_bucket_size": {}}}}}',
    "loss_scale": '{{"fp16": {{"enabled": true, "loss_scale": {}}}}}',
    "gradient_predivide_factor": '{{"gradient_predivide_factor": {}}}',
}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1", "true", "[1]", "{}", '"0.5"'])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_number_that_is_none_is_one_error_with_its_name(take, name, value):
    if value == "{}" and name not in ("betas",):
        value = '{"a": 1}'
    said = refusal(take, SETTINGS[name].format(value))
    assert name in said and said.count("\n") == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"sequence_parallel_size": 2}, '"sequence_parallel_size" is 2, which this program does not do; remove it'),
        ({"hybrid_engine": {"enabled": True}}, '"hybrid_engine" is .*which this program does not do'),
        ({"tensor_parallel": {"autotp_size": 4}}, '"tensor_parallel" is .*which this program does not do'),
        ({"sparse_gradients": True}, '"sparse_gradients" is True, which this program does not do'),
        ({"elasticity": {"enabled": "true"}}, '"elasticity" is .*which this program does not do'),
        ({"gradient_allreduce_op": "sum"}, '"gradient_allreduce_op" is .sum., wanted "mean"'),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, '"grad_accum_dtype" is "fp16", and the run has bf16'),
        ({"data_types": {"grad_accum_dtype": "half"}}, '"grad_accum_dtype" is .half., wanted one of fp32'),
        ({"data_types": "bf16"}, '"data_types" is .bf16., wanted an object'),
        ({"checkpoint": 5}, '"checkpoint" is 5, wanted an object'),
        ({"checkpoint": {"tag_validation": "no"}}, '"checkpoint" is refused by DeepSpeed: .*tag_validation'),
        ({"gradient_predivide_factor": 0}, '"gradient_predivide_factor" is 0, wanted a number above 0'),
        ({"scheduler": {"type": 5}}, '"scheduler": "type" is 5, wanted a name'),
        ({"scheduler": {"type": "WarmupLR", "params": [1]}}, r'"scheduler": "params" is \[1\], wanted an object'),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, r'"optimizer": "params" is \[1\], wanted an object'),
        ({"optimizer": {"params": {"weigth_decay": 0.1}}}, 'has "weigth_decay", .*did you mean "weight_decay"'),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, '"adam_w_mode" is False, which this program does not do'),
        ({"bf16": True}, '"bf16" is True, wanted an object'),
        ({"bf16": {"enabled": "maybe"}}, '"bf16": "enabled" is .maybe., wanted true or false'),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": False}}, '"bf16" and "bfloat16" are two names'),
        ({"bf16": {"enabled": "true"}, "fp16": {"enabled": 1}}, '"bf16" and "fp16" are both enabled'),
        ({"gradient_clipping": 10**400}, '"gradient_clipping" is 1000.* [.]{3}, wanted a number'),
        ({"optimizer": {"params": {"eps": 1e-50}}}, '"eps" is 1e-50, wanted a number from 1e-38'),
        ({"zero_optimization": {"reduce_bucket_size": 1e300}}, '"reduce_bucket_size" is 1e.300, wanted a number'),
        ({"zero_optimization": {"reduce_bucket_size": 10**30}}, '"reduce_bucket_size" is 10000.*wanted a number below'),
        ({"fp16": {"enabled": True, "initial_scale_power": 5000}}, '"initial_scale_power" is 5000, wanted a whole'),
        ({"compile": {"backend": "inductor"}}, '"compile" is .*which this program does not do'),
        ({"stage": 2}, '"stage" is no entry .*reads it inside "zero_optimization"; move it there'),
        ({"lr": 1e-4}, '"lr" is no entry .*reads it inside "optimizer.params"; move it there'),
        ({"gradient_cliping": 1}, '"gradient_cliping" is no entry .*did you mean "gradient_clipping"'),
        ({"launcher": "pdsh"}, '"launcher" is no entry .*; remove it$'),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, '"offload_param" goes to nvme without'),
        ({"tensorboard": {"enabled": True, "folder": "x"}}, '"tensorboard" is refused by DeepSpeed: .*folder'),
        ({"\x1b]0;mine\x07": 1}, r'"\\x1b]0;mine\\x07" is no entry'),
    ],
)
def test_what_would_be_ignored_or_end_in_a_traceback_is_named(take, content, words):
    with pytest.raises(ConfigError, match=words) as error:
        take(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {"sequence_parallel_size": 1, "sparse_gradients": False, "amp": {"enabled": False}},
        {"hybrid_engine": {"enabled": "false"}, "elasticity": {}, "autotuning": {"enabled": False}},
        {"zero_optimization": {"stage": 3, "offload_param": None, "sub_group_size": 1e9}},
        {"train_micro_batch_size_per_gpu": 4.0, "steps_per_print": 2000},
        {"optimizer": {"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": True}}},
    ],
)
def test_what_is_switched_off_or_usual_is_taken(take, content):
    config, _ = take(content)
    assert not config.keys() & {"sequence_parallel_size", "sparse_gradients", "amp", "hybrid_engine", "elasticity"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n  // ours\n  "bf16": {}\n}', "line 2 column 3.*JSON has no comments, remove it"),
        ('{\n  "bf16": {} # ours\n}', "line 2 column 14.*JSON has no comments"),
        ('{\n  "gradient_clipping": 1.0,\n}', "line 3 column 1.*remove the comma before it"),
        ("{'bf16': {'enabled': True}}", 'JSON wants "double quotes", true, false and null'),
        ('{"bf16": {"enabled": True}}', "line 1 column 22.*true, false and null"),
        ("bf16:\n  enabled: true\n", "it is YAML, and DeepSpeed reads JSON"),
        ("# accelerate\n---\ndistributed_type: DEEPSPEED\n", "it is YAML.*deepspeed_config_file"),
        ("", "it is empty"),
        ("{}".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b'{"a": "\xff"}', "'utf-8' codec"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested deeper than"),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', '"bf16" stands twice in one object'),
        ('{"train_batch_size": 1' + "0" * 5000 + "}", "limit"),
        ('["bf16"]', "holds a list, wanted a JSON object"),
    ],
)
def test_what_is_no_json_is_named_for_what_it_is(take, content, words):
    with pytest.raises(ConfigError, match=words) as error:
        take(content)
    assert str(error.value).startswith("--deepspeed_config: ")


WRONG_EVERYWHERE = {
    "gradient_cliping": 1,
    "stage": 2,
    "gradient_clipping": float("nan"),
    "train_batch_size": "8",
    "scheduler": 5,
    "tensorboard": {"enabled": True, "folder": "x"},
    "fp16": {"enabled": "maybe", "initial_scale_power": "5", "scale": 1},
    "zero_optimization": {"stage": 7, "bucket": 3, "offload_param": {"device": "nvme", "pinned": 1}},
    "optimizer": {"type": "SGD", "params": {"lr": "abc", "weigth_decay": 1, "betas": [float("inf"), 0.9]}},
}
KEYS = {"gradient_cliping", "stage", "scale", "bucket", "offload_param.pinned", "weigth_decay"}


def test_all_that_is_wrong_is_said_at_once_and_each_thing_once(take):
    with pytest.raises(ConfigError) as error:
        take(json.dumps(WRONG_EVERYWHERE))
    problems = [line.partition("ds.json: ")[2] for line in str(error.value).splitlines()]
    for words in (
        *(
            '"gradient_cliping" is no entry',
            '"stage" is no entry',
            '"gradient_clipping" is nan',
            '"train_batch_size" is',
        ),
        *('"scheduler" is 5', '"tensorboard" is refused', '"enabled" is .maybe.', '"initial_scale_power" is .5.'),
        *("fp16.*scale: Extra", '"stage" is 7', "zero_optimization.*bucket: Extra", "offload_param.pinned: Extra"),
        *(
            "without an .nvme_path.",
            "type is .SGD.",
            '"lr" is .abc.',
            "weigth_decay.*did you mean",
            r"betas\.0. is inf",
        ),
    ):
        assert len([problem for problem in problems if re.search(words, problem)]) == 1, words
    assert len(problems) == 17


def test_the_doctor_says_what_is_wrong_beside_an_unknown_key(tmp_path):
    from sat_lora.doctor.diagnose import _option_findings
    from sat_lora.doctor.run_checks.configuration import key_findings

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(WRONG_EVERYWHERE))
    options = parse_options(["--from_pretrained", "b", "--deepspeed_config", str(path)], environ={})
    of_keys = key_findings(read_deepspeed_file(path), path)
    assert {"unknown-key", "misplaced-key"} == {finding.code for finding in of_keys} and len(of_keys) == len(KEYS)
    of_file = [one.seen for one in _option_findings(options, "cpu") if one.option == "--deepspeed_config"]
    assert len(of_file) == 17 - len(KEYS) and not any(
        "Extra inputs" in seen for seen in of_file if "tensor" not in seen
    )


@pytest.mark.parametrize("never", ["Infinity", '"inf"', '"Infinity"', '"auto"', "null"])
def test_the_steps_of_accelerate_that_never_print_are_taken(take, never):
    assert take(f'{{"steps_per_print": {never}}}')[0]["steps_per_print"] == NEVER


STAGE_3 = {
    "stage": 3,
    "overlap_comm": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": AUTO,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_max_live_parameters": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
    "zero_quantized_weights": False,
    "offload_optimizer": {"device": "none", "pin_memory": True, "nvme_path": None},
    "offload_param": {"device": "none", "nvme_path": None},
}
AS_FP16 = {"enabled": AUTO, "auto_cast": False, "loss_scale": 0, "initial_scale_power": 32, "hysteresis": 2}


@pytest.mark.parametrize(
    ("content", "stage", "precision"),
    [
        (
            {"zero_optimization": STAGE_3, "fp16": AS_FP16, "bf16": {"enabled": AUTO}, "gradient_clipping": AUTO},
            3,
            "bf16",
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}, "fp16": {"enabled": False}}, 2, "bf16"),  # older ones
        ({"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}}, 3, "bf16"),
        ({"zero_optimization": {"stage": 0, "round_robin_gradients": True}, "fp16": {"enabled": "True"}}, 0, "fp16"),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 1e9}, "bf16": {"enabled": "false"}}, 1, "fp32"),
        ({"amp": {"enabled": AUTO, "opt_level": AUTO}, "wandb": None, "hybrid_engine": {"enabled": False}}, 2, "bf16"),
    ],
)
def test_files_as_trainers_write_them_are_taken(take, content, stage, precision):
    _, options = take(content)
    assert options.parallel.zero_stage == stage
    assert (options.precision.bf16, options.precision.fp16) == (precision == "bf16", precision == "fp16")


def test_a_byte_order_mark_is_passed_over(take):
    assert take('\ufeff{"gradient_clipping": 0.25}')[1].optimizer.clip_grad == 0.25


@pytest.mark.parametrize(("make", "what"), [(os.mkfifo, "a pipe"), (os.mkdir, "a folder")])
def test_what_is_no_file_is_not_waited_for(tmp_path, make, what):
    make(tmp_path / "ds.json")
    options = parse_options(["--from_pretrained", "b", "--deepspeed_config", str(tmp_path / "ds.json")], environ={})
    with pytest.raises(ConfigError, match=f"cannot be read: {what}, no file; give DeepSpeed's json"):
        settle(options, device="cpu", environ={})


def test_what_was_decided_is_told(take):
    file = {
        "bf16": {"enabled": "auto"},
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"params": {"lr": 2e-5, "betas": [0.9, 0.99]}},
    }
    _, options = take(file, "--lr", "1e-3")
    assert decisions(options, "cuda") == [
        "precision bf16: default on CUDA, the DeepSpeed file says auto",
        "DeepSpeed file decides clipping 0.5, betas 0.9 0.99",
        "DeepSpeed file: --lr 0.001 beats its 2e-05",
        'DeepSpeed file leaves "bf16.enabled", "train_micro_batch_size_per_gpu" to options and defaults by "auto"',
    ]
    for content, argv, line in (
        ({"bf16": {"enabled": True}}, (), "precision bf16: DeepSpeed file"),
        ({"bf16": {"enabled": True}}, ("--fp16",), "precision fp16: --fp16"),
        ({"bf16": {"enabled": False}}, (), "precision fp32: DeepSpeed file"),
        ({"fp16": {"enabled": False}}, (), "precision bf16: default on CUDA, the DeepSpeed file leaves it open"),
    ):
        _, options = take(content, *argv)
        assert decisions(options, "cuda")[0] == line


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="sat_lora")

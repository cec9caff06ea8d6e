"""What the doctor says of a DeepSpeed file's arithmetic is what a run would do with it."""

import json

import pytest

from sat_lora.doctor.run_checks.configuration import configuration_findings
from sat_lora.training.settings.deepspeed_config import settle
from tests.support.configs import parse_options


@pytest.mark.parametrize(
    "content, more, ranks, holds",
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, [], 2, True),
        ({"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4}, [], 2, False),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
            ["--gradient-accumulation-steps", "2"],
            2,
            False,
        ),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, [], 2, False),
    ],
    ids=["accumulation is left", "does not divide", "an option says otherwise", "the file says otherwise"],
)
def test_a_global_batch_size_is_a_finding_where_a_run_does_not_use_it(content, more, ranks, holds, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(content))
    options = parse_options(["--deepspeed_config", str(file), *more], environ={})
    environ = {"WORLD_SIZE": str(ranks)}
    codes = [finding.code for finding in configuration_findings(options, environ, "cpu")]
    assert ("batch-arithmetic" not in codes) == holds
    schedule = settle(options, device="cpu", environ=environ).config.schedule
    product = schedule.batch_size * schedule.gradient_accumulation_steps * ranks
    assert (product == content["train_batch_size"]) == holds

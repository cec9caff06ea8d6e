"""Options as scripts of before `TrainConfig` read and write them, under the old names of their modules."""

import importlib
import json

import pytest

from sat_lora.training.settings.options import parse_options


def of_before(name):
    with pytest.deprecated_call():
        return importlib.import_module(f"sat_lora.training.{name}")


def test_a_script_of_before_gets_a_namespace_that_the_deepspeed_file_is_written_into(tmp_path, monkeypatch):
    for name in ("options", "deepspeed_config"):
        monkeypatch.delitem(importlib.import_module("sys").modules, f"sat_lora.training.{name}", raising=False)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": 3}))
    words = ["--from_pretrained", "base", "--train-data", "images", "--lr", "1e-3", "--deepspeed_config", str(file)]
    options = of_before("options").parse_options(words, environ={})
    config = parse_options(words, environ={})
    assert options.lr == 1e-3 and options.r == config.lora.r and options.run_folder == config.run_folder
    assert options.given == frozenset(config.given) and not options.bf16
    engine = of_before("deepspeed_config").deepspeed_config(options, device="cuda", environ={})
    assert options.bf16 and options.batch_size == 3 and engine["bf16"]["enabled"] is True

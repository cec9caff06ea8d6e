"""What is given to `merge` in an adapter's place, and is told for what it is, with what to give."""

import json
import shutil

import pytest

from sat_lora import AdapterError
from sat_lora.adapters.read import read_adapter
from tests.support.adapter_folders import write_tiny_adapter

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, single_process_group):
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "one")


def refusal(folder) -> str:
    with pytest.raises(AdapterError) as error:
        read_adapter(folder)
    return str(error.value)


@pytest.mark.parametrize("inside", ["adapter", "adapter/800"])
def test_a_run_folder_names_the_adapters_in_it(adapter, tmp_path, inside):
    run = tmp_path / "my run"
    shutil.copytree(adapter, run / inside)
    (run / "adapter" / "latest").write_text("800")
    (run / "run.json").write_text("{}")
    assert refusal(run).endswith(f"; give {run}/adapter, where the adapters of a run are")


@pytest.mark.parametrize("config", [{}, {"r": 8, "lora_alpha": 16, "target_modules": ["query_key_value"]}])
def test_an_adapter_of_peft_names_the_import(adapter, tmp_path, config):
    peft = shutil.copytree(adapter, tmp_path / "from peft")
    (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    assert f"; it is an adapter of PEFT: sat-lora import --from peft '{peft}'" in refusal(peft)
    (peft / "adapter_model.safetensors").rename(peft / "adapter_model.bin")
    assert "it is an adapter of PEFT" in refusal(peft)


@pytest.mark.parametrize("content", ["[]", "{", '"sat_lora"', "null", '{"sat_lora": 5}'])
def test_what_is_neither_gets_no_advice(adapter, tmp_path, content):
    folder = shutil.copytree(adapter, tmp_path / "other")
    (folder / "adapter_config.json").write_text(content)
    assert "; it is " not in refusal(folder)

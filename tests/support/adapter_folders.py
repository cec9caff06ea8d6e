"""An adapter of the tiny CogVLM, ways to spoil its folder, and the proof that a model refuses one unharmed."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lora import AdapterError, add_lora, load_adapter, save_adapter
from sat_lora.lora.mixin import lora_mixins
from tests.support.tiny import fill_adapters, tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINEAR = "transformer.layers.0.attention.dense"
SECONDS = 1.0  # of the processor; a refusal takes less


def write_tiny_adapter(folder: Path) -> Path:
    model = tiny_model()
    add_lora(model, r=4, target_modules=["language-attention", "vit-mlp"])
    fill_adapters(model)
    save_adapter(model, folder)
    return folder


def snapshot(model) -> tuple:
    """Everything of a model that loading might change: tensors, flags, mixins, hooks."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(len(module._forward_hooks), vars(module).get("forward")) for module in model.modules()]
    return state, [p.requires_grad for p in model.parameters()], list(lora_mixins(model)), hooks


def assert_unchanged(model, before: tuple) -> None:
    after = snapshot(model)
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())


def assert_refused(model, folder: Path, message: str) -> str:
    """An AdapterError with that message, which is returned, within SECONDS, and the model exactly as before."""
    before, start = snapshot(model), time.process_time()
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(model, folder)
    assert time.process_time() - start < SECONDS
    assert_unchanged(model, before)
    return str(error.value)


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))

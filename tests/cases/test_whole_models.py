"""Checkpoints of whole models given as adapters: damaged, of others, and made by an attacker."""

import json

import pytest
import torch

from sat_lora import AdapterError
from sat_lora.adapters.read import read_adapter
from sat_lora.cli import main
from tests.support.sat_files import write_step

PREFIX = "mixins.lora."
SITE = "transformer/layers/0/mlp/dense_h_to_4h"
LAYER = dict(kind="column", r=2, scale=2.0, slots=[], rows=[[0, 6]], blocks=[1])
ABOUT = dict(config=dict(r=2, lora_alpha=4), layers={SITE.replace("/", "."): LAYER}, trained=[])


def described(about) -> torch.Tensor:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def state(about=ABOUT, **changes) -> dict:
    pair = {f"{PREFIX}adapters.{SITE}.A": torch.ones(2, 4), f"{PREFIX}adapters.{SITE}.B": torch.ones(6, 2)}
    base = {f"{SITE.replace('/', '.')}.weight": torch.zeros(6, 4)}
    return {**base, **pair, f"{PREFIX}description": described(about), **changes}


def with_layer(**changes) -> dict:
    return ABOUT | {"layers": {SITE.replace("/", "."): LAYER | changes}}


def renamed() -> dict:
    return {name.replace("mixins.lora.", "mixins.second."): tensor for name, tensor in state().items()}


CASES = {
    "no JSON": ([state(b"\xff\xfe{")], "a whole model, of which the adapter cannot be read"),
    "another value": ([state([1, 2])], "wanted an object, got list"),
    "too deep": ([state(b"[" * 100_000)], "nested"),
    "numbers for bytes": ([state() | {f"{PREFIX}description": torch.ones(3)}], "are no description"),
    "without layers": ([state({"config": {}, "trained": []})], "no 'layers'"),
    "another kind": ([state(with_layer(kind="magic"))], "no 'magic'"),
    "blocks of nothing": ([state(with_layer(blocks=[0]))] * 2, "cannot be read"),
    "rank that is none": ([state(with_layer(r=-1))], "r -1"),
    "another rank": ([state(with_layer(r=3))], "are not of rank 3"),
    "scale without end": ([state(with_layer(scale=1e400))], "no finite number"),
    "a text for a tensor": ([state() | {f"{PREFIX}adapters.{SITE}.A": "x"}], "cannot be read"),
    "ranks that differ": ([state(), state() | {"more": torch.ones(1)}], "hold different names"),
    "another mixin": ([renamed()], "no LoRA mixin called 'lora' is in it; it has second"),
    "a plain base": ([{"transformer.final_layernorm.weight": torch.ones(2)}], "no LoRA mixin called 'lora' is in it"),
    "lora2 of SAT": ([{"transformer.layers.0.attention.dense.matrix_A.0": torch.ones(2, 2)}], "import --from lora2"),
    "a name that writes": ([state() | {"mixins.\x1b[31m.adapters.a.A": torch.ones(1)}], None),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_error_or_is_read(case, tmp_path, capsys):
    states, message = CASES[case]
    write_step(tmp_path / "run", *({"module": state} for state in states))
    if message is None:
        assert read_adapter(tmp_path / "run").layers.keys() == ABOUT["layers"].keys()
        return
    with pytest.raises(AdapterError) as error:
        read_adapter(tmp_path / "run")
    assert message in str(error.value) and "\x1b" not in str(error.value)
    assert main(["inspect", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_whole_one_is_read(tmp_path):
    write_step(tmp_path / "run", {"module": state(), "random_rng_state": (3, (1, 2), None)})
    saved = read_adapter(tmp_path / "run")
    assert saved.layers["transformer.layers.0.mlp.dense_h_to_4h"].scale == 2
    assert saved.tensors["transformer.layers.0.mlp.dense_h_to_4h.lora_B"].shape == (6, 2)

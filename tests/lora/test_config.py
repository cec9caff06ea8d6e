"""LoraConfig: validation, patterns, layers, and the way through a dictionary."""

import copy
import dataclasses
import json
import pickle

import pytest

from sat_lora import ConfigError, LoraConfig
from sat_lora.lora.config import LARGEST_FACTOR, MOST_LAYERS

QKV = "transformer.layers.3.attention.query_key_value"
VIT_DENSE = "mixins.eva.vit_model.transformer.layers.11.attention.dense"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r has to be a whole number of at least 1, got 0"),
        ({"r": 4.0}, "r has to be a whole number of at least 1, got 4.0"),
        ({"r": True}, "r has to be a whole number of at least 1, got True"),
        ({"lora_alpha": float("inf")}, "lora_alpha has to be a finite number, got inf"),
        ({"lora_alpha": "32"}, "lora_alpha has to be a finite number, got '32'"),
        ({"lora_dropout": 1.0}, r"lora_dropout has to be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout has to be in \[0, 1\), got -0.1"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"qkv_slots": ()}, "qkv_slots has to name some of q, k, v"),
        ({"qkv_slots": "qq"}, "each once, got 'qq'"),
        ({"qkv_slots": ["q", "o"]}, r"got \('q', 'o'\)"),
        ({"adapter_dtype": "int8"}, "adapter_dtype has to be one of float32, .* got 'int8'"),
        ({"layers_to_transform": "0..3"}, "cannot read '0..3'; write for example language:0-15,vit:40-62"),
        ({"layers_to_transform": "5-2"}, "'5-2' runs backwards"),
        ({"use_dora": 1}, "use_dora has to be True or False, got 1"),
        ({"init_lora_weights": "svd"}, "init_lora_weights has to be one of kaiming, gaussian, .* got 'svd'"),
        ({"init_lora_weights": False}, "init_lora_weights has to be one of .* got False"),
        ({"init_lora_weights": "pissa_niter_0"}, "got 'pissa_niter_0'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r has to be even for init_lora_weights='orthogonal', got 3"),
        ({"bias": "some"}, "bias has to be one of none, lora_only, all, got 'some'"),
        ({"lr_ratio": 0}, "lr_ratio has to be a finite number above 0, got 0"),
        ({"modules_to_save": (3,)}, r"modules_to_save has to be text or a list of texts, got \(3,\)"),
        ({"rank_pattern": {"dense[": 4}}, r"'dense\[' is not a regular expression"),
        ({"alpha_pattern": {"(": 4}}, r"'\(' is not a regular expression"),
        ({"rank_pattern": {"dense": 0}}, r"rank_pattern\['dense'\] has to be a whole number of at least 1, got 0"),
        ({"alpha_pattern": {"dense": None}}, r"alpha_pattern\['dense'\] has to be a finite number, got None"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_got(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 4


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (None, None),
        ((1, 3), {None: {1, 3}}),
        ([0], {None: {0}}),
        ("4", {None: {4}}),
        ("2-4", {None: {2, 3, 4}}),
        ("language:0-1, vit:40-42", {"language": {0, 1}, "vit": {40, 41, 42}}),
        ("language:0,language:5-6", {"language": {0, 5, 6}}),
        ("0,vit:1", {None: {0}, "vit": {1}}),
    ],
)
def test_layers_are_read_from_numbers_and_from_text(text, layers):
    assert LoraConfig(layers_to_transform=text).layers() == layers


def test_the_first_rank_pattern_that_matches_wins():
    config = LoraConfig(r=16, rank_pattern={r"vit_model\..*dense": 2, "dense": 4, r"attention\.\w+": 8})
    assert config.rank_for(VIT_DENSE) == 2
    assert config.rank_for("transformer.layers.0.attention.dense") == 4
    assert config.rank_for(QKV) == 8
    assert config.rank_for("transformer.layers.0.mlp.dense_h_to_4h") == 16


def test_a_pattern_matches_whole_parts_at_the_end_of_a_name():
    config = LoraConfig(r=16, rank_pattern={"value": 2, "attention": 3, "query_key_value|dense": 5})
    assert config.rank_for(QKV) == config.rank_for(VIT_DENSE) == 5
    assert config.rank_for("query_key_value") == 5


def test_the_scale_is_alpha_over_the_rank_in_effect():
    config = LoraConfig(r=16, lora_alpha=32, alpha_pattern={"dense": 6, ".*": 99})
    assert config.scale_for(VIT_DENSE, 4) == 1.5
    assert config.scale_for(QKV, 4) == 24.75
    assert LoraConfig(lora_alpha=32).scale_for(QKV, 8) == 4


def test_rslora_scales_by_the_root_of_the_rank():
    config = LoraConfig(r=16, lora_alpha=32, use_rslora=True, alpha_pattern={"dense": 6})
    assert config.scale_for(QKV, 16) == 8
    assert config.scale_for(VIT_DENSE, 9) == 2


def test_a_config_comes_back_from_json_as_it_was():
    config = LoraConfig(
        r=8,
        lora_alpha=12.5,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=["language-mlp", "dense"],
        exclude_modules=["projector"],
        layers_to_transform=[0, 2],
        rank_pattern={"b": 4, "a": 2},
        alpha_pattern={"dense": 3.0},
        qkv_slots=["q", "v"],
        adapter_dtype="float32",
        seed=7,
    )
    back = LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert back.target_modules == ("language-mlp", "dense") and back.layers_to_transform == (0, 2)
    assert list(back.rank_pattern) == ["b", "a"], "the first match wins, so the order is part of the value"


def test_every_unknown_field_is_listed():
    with pytest.raises(ConfigError, match="no field 'ranks'; there is no field 'zzz'$"):
        LoraConfig.from_dict({"zzz": 1, "ranks": 2, "r": 4})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": 3}, "rank_pattern has to be a dictionary of patterns, got 3"),
        ({"rank_pattern": ["dense"]}, r"rank_pattern has to be a dictionary of patterns, got \['dense'\]"),
        ({"qkv_slots": 4}, "qkv_slots has to name some of q, k, v, each once, got 4"),
        ({"target_modules": 4}, "target_modules has to be text or a list of texts, got 4"),
        ({"layers_to_transform": 4}, "layers_to_transform: "),
    ],
)
def test_a_field_of_the_wrong_type_is_a_config_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig.from_dict(fields)


def test_unknown_fields_and_wrong_values_come_in_one_error():
    with pytest.raises(ConfigError) as error:
        LoraConfig(lora_alfa=3, r=0, lora_dropout=2)
    for part in ("no field 'lora_alfa', did you mean 'lora_alpha'?", "r has to be a whole", "lora_dropout has to be"):
        assert part in str(error.value)


def test_pefts_spellings_of_the_defaults_are_taken():
    assert LoraConfig(init_lora_weights=True, modules_to_save=None) == LoraConfig()
    assert LoraConfig(modules_to_save="boi") == LoraConfig(modules_to_save=["boi"])


def test_a_config_survives_copying_and_pickling():
    config = LoraConfig(r=4, rank_pattern={"dense": 2})
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, r=8).r == 8


@pytest.mark.parametrize("seed, is_right", [(-1, False), (0, True), (2**63 - 1, True), (2**63, False), (True, False)])
def test_a_seed_is_one_of_torchs(seed, is_right):
    if is_right:
        assert LoraConfig(seed=seed).seed == seed
    else:
        with pytest.raises(ConfigError, match=f"seed has to be a whole number from 0 to 2.*got {seed!r}"):
            LoraConfig(seed=seed)


def test_layers_have_a_last_number():
    assert LoraConfig(layers_to_transform=f"{MOST_LAYERS - 1}").layers() == {None: frozenset({MOST_LAYERS - 1})}
    for text in (f"{MOST_LAYERS}", f"3-{MOST_LAYERS}"):
        with pytest.raises(ConfigError, match=f"'{text}' is beyond {MOST_LAYERS} layers"):
            LoraConfig(layers_to_transform=text)


def test_an_entry_of_a_pattern_is_named_by_its_key():
    with pytest.raises(ConfigError) as error:
        LoraConfig(rank_pattern={"q": 0}, alpha_pattern={"v": float("nan")})
    assert "rank_pattern['q'] has to be a whole number" in str(error.value)
    assert "alpha_pattern['v'] has to be a finite number" in str(error.value)


def test_factors_may_be_as_large_as_float32_bears():
    config = LoraConfig(lora_alpha=LARGEST_FACTOR, lr_ratio=LARGEST_FACTOR, alpha_pattern={"q": -LARGEST_FACTOR})
    assert config.lora_alpha == LARGEST_FACTOR
    with pytest.raises(ConfigError, match="lora_alpha has to be 3.4028e.38 at most"):
        LoraConfig(lora_alpha=3.40281e38)

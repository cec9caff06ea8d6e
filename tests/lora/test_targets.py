"""Which linears a config selects."""

import dataclasses

import pytest
import torch

from sat_lora import ConfigError, LoraConfig, add_lora
from sat_lora._sat import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from sat_lora.cogvlm.network.model import VIT
from sat_lora.lora import targets
from sat_lora.lora.apply import find_all_parameters, find_all_sites
from sat_lora.lora.targets import PRESETS, aim, bounded_rank, find_sites, own_modules, select
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def model(single_process_group):
    return tiny_model()


@pytest.fixture(scope="module")
def sites(model):
    return find_all_sites(model)


def chosen(sites, **fields):
    return set(select(sites, {}, LoraConfig(**fields))[0])


def test_the_default_is_every_linear_but_the_head(sites):
    linears = {name for name, site in sites.items() if site.kind.is_linear}
    assert chosen(sites) == linears - {"mixins.lm.lm_head"}
    assert sites.keys() - linears == {
        "transformer.word_embeddings",
        VIT + ".transformer.word_embeddings",
        VIT + ".transformer.position_embeddings",
        VIT + ".mixins.patch_embedding.proj",
    }


@pytest.mark.parametrize(
    "preset, count",
    [
        ("language-attention", 4),
        ("language-mlp", 6),
        ("vision-expert-attention", 4),
        ("vision-expert-mlp", 6),
        ("vit-attention", 4),
        ("vit-mlp", 4),
        ("projector", 4),
        ("lm-head", 1),
        ("patch-embedding", 1),
        ("all-linear", 32),
    ],
)
def test_presets_name_parts_of_the_model(sites, preset, count):
    assert len(chosen(sites, target_modules=preset)) == count
    assert len(chosen(sites, target_modules=[preset])) == count


def test_presets_do_not_overlap_and_cover_everything(sites):
    others = {part for part in PRESETS if part.startswith("cross-")} | {"vision-convolution"}
    parts = [chosen(sites, target_modules=p) for p in PRESETS if p not in ("all-linear", *others)]
    in_no_part = {name for name, site in sites.items() if site.part == "other"}
    assert in_no_part == {name for name, site in sites.items() if site.kind.is_embedding}
    assert sum(map(len, parts)) == len(sites) - len(in_no_part) == len(set().union(*parts))


def test_a_list_matches_whole_dotted_suffixes(sites):
    found = chosen(sites, target_modules=["attention.dense"])
    assert found == {f"{p}transformer.layers.{i}.attention.dense" for p in ("", VIT + ".") for i in range(2)}
    assert "transformer.layers.0.mlp.dense_4h_to_h" not in chosen(sites, target_modules=["dense"])


def test_a_string_is_a_regular_expression_for_the_whole_name(sites):
    assert chosen(sites, target_modules=r"transformer\.layers\.1\.mlp\..*") == {
        "transformer.layers.1.mlp.dense_h_to_4h",
        "transformer.layers.1.mlp.dense_4h_to_h",
    }


def test_exclusion_and_layers_take_away(sites):
    found = chosen(
        sites,
        target_modules=["language-mlp", "vit-mlp"],
        exclude_modules=["dense_h_to_4h"],
        layers_to_transform="language:0,vit:1",
    )
    assert found == {
        "transformer.layers.0.mlp.dense_4h_to_h",
        "mixins.mlp.gate_proj.0",
        VIT + ".transformer.layers.1.mlp.dense_4h_to_h",
    }


def test_layer_numbers_alone_count_for_every_tower(sites):
    found = chosen(sites, layers_to_transform=[1])
    assert {sites[name].tower for name in found} == {"language", "vit"}
    assert {sites[name].layer for name in found} == {1}


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("qkv", "query_key_value"),
        ("vit-mpl", "vit-mlp"),
        ("gate_project", "gate_proj"),
        ("q_proj", "query_key_value.*of which qkv_slots takes parts"),
        ("self_attn.o_proj", " dense"),
        ("down_proj", "dense_4h_to_h"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(sites, wrong, near):
    with pytest.raises(ConfigError, match=f"target_modules: '{wrong}' matches no layer; nearest:.*{near}"):
        chosen(sites, target_modules=[wrong])


def test_all_patterns_that_match_nothing_are_listed(sites):
    with pytest.raises(ConfigError) as error:
        chosen(sites, target_modules=["nonsense", "dense"], exclude_modules=["folly"])
    assert "nonsense" in str(error.value) and "exclude_modules: 'folly'" in str(error.value)


def test_shapes_come_from_the_weights(sites):
    site = sites["transformer.layers.0.attention.query_key_value"]
    assert (site.kind.name, site.in_features, site.out_features, site.slot_names) == (
        "column",
        64,
        192,
        ("q", "k", "v"),
    )
    assert site.slot_rows(("q", "v")) == [(0, 64), (128, 192)]
    site = sites[VIT + ".transformer.layers.0.mlp.dense_4h_to_h"]
    assert (site.kind.name, site.in_features, site.out_features, site.slot_names) == ("row", 72, 48, ())


def test_a_fused_linear_without_any_of_the_slots_is_left_out(sites):
    """Cross-attention's fused key and value have no q."""
    fused = sites["transformer.layers.0.mlp.dense_h_to_4h"]
    key_value = dataclasses.replace(fused, name="cross_attention.key_value", blocks=(1, 1))
    with_it = {**sites, key_value.name: key_value}
    targets = ["key_value", "query_key_value"]
    found = chosen(with_it, target_modules=targets, qkv_slots=["q"])
    assert found == chosen(sites, target_modules=["query_key_value"])
    assert key_value.name in chosen(with_it, target_modules=targets, qkv_slots=["k"])
    with pytest.raises(ConfigError, match="nothing is left after .* qkv_slots"):
        chosen({key_value.name: key_value}, target_modules=["key_value"], qkv_slots=["q"])


def test_every_contradiction_is_listed_at_once(sites):
    with pytest.raises(ConfigError) as error:
        chosen(
            sites,
            target_modules=["dense", "word_embeddings", "nonsense"],
            use_dora=True,
            freeze_a=True,
            qkv_slots="q",
            layers_to_transform="language:0,vision:1,0-9",
            rank_pattern={"dense_h": 4},
            alpha_pattern={"gate_proj": 4},
        )
    for part in (
        "'nonsense' matches no layer",
        "there is no tower 'vision', only language and vit",
        "qkv_slots=q: none of the chosen layers has slots q, k, v",
        "rank_pattern: 'dense_h' matches no adapted layer; nearest: ",
        "alpha_pattern: 'gate_proj' matches no adapted layer",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize("field", ["use_dora", "freeze_a"])
def test_what_an_embedding_cannot_have_is_named(sites, field):
    with pytest.raises(ConfigError, match=rf"{field} does not work on an embedding: .*word_embeddings"):
        chosen(sites, target_modules=["transformer.word_embeddings"], **{field: True})


def test_a_pattern_that_names_only_layers_left_out_is_an_error(sites):
    with pytest.raises(ConfigError, match="rank_pattern: 'dense_h_to_4h' matches no adapted layer"):
        chosen(sites, target_modules=["language-attention"], rank_pattern={"dense_h_to_4h": 4})


@pytest.mark.parametrize("preset", ["all-linear", "vit-mlp", "lm-head", "language-attention"])
@pytest.mark.parametrize("field", ["modules_to_save", "rank_pattern", "alpha_pattern"])
def test_a_preset_where_names_are_wanted_is_told_and_no_preset_is_near(sites, model, field, preset):
    value = (preset,) if field == "modules_to_save" else {preset: 4}
    with pytest.raises(ConfigError, match="it is a preset of target_modules, and names are wanted here; ") as error:
        select(sites, find_all_parameters(model), LoraConfig(**{field: value}))
    near = str(error.value).rpartition("nearest: ")[2]
    assert near and not any(name in PRESETS for name in near.split(", "))


def test_an_orthogonal_beginning_wants_an_even_rank_after_the_bound(model, sites):
    name = "transformer.layers.0.attention.dense"
    small = dataclasses.replace(sites[name], in_features=12, out_features=12)
    with pytest.raises(ConfigError, match=f"even rank; {name} is left with 3"), pytest.warns(UserWarning):
        aim(small, LoraConfig(r=6, init_lora_weights="orthogonal"))


@pytest.mark.parametrize("slots", ["q", "k", "v", "kv", "qkv"])
def test_the_bound_goes_by_the_rows_of_one_slot_wherever_it_lies(slots, sites):
    fused = sites["transformer.layers.0.attention.query_key_value"]
    rows = fused.slot_rows(("v",))[0]
    size = rows[1] - rows[0]
    with pytest.warns(UserWarning, match=f"full {size} x {fused.in_features} matrix"):
        target = aim(fused, LoraConfig(r=64, qkv_slots=slots))
    assert target.rank == bounded_rank(64, fused.in_features, size)


def test_layers_inside_of_other_sat_models_and_mixins_are_not_a_models_own():
    model = tiny_model()
    before = {name for name, _ in own_modules(model)}
    assert "mixins.eva" in before and not any("vit_model" in name for name in before) and "" in before
    assert {f"vit.{name}".strip(".") for name, _ in own_modules(model.mixins["eva"].vit_model)} == {
        name for name, _ in own_modules(model.mixins["eva"].vit_model, "vit")
    }
    add_lora(model, r=2)
    assert {name for name, _ in own_modules(model)} == before


def test_the_shape_of_a_partitioned_weight_is_its_whole_one():
    layer = torch.nn.Linear(3, 5)
    layer.weight.ds_shape, layer.weight.data = layer.weight.shape, torch.empty(0)
    site = find_sites(layer)[""]
    assert (site.in_features, site.out_features, site.blocks) == (3, 5, (1,))


@pytest.mark.parametrize("size", [1, 2])
def test_the_shape_of_a_cut_weight_is_its_whole_one(monkeypatch, size):
    monkeypatch.setattr(targets, "model_parallel_layout", lambda: (0, size))
    shapes = [
        (site.in_features, site.out_features)
        for layer in (
            ColumnParallelLinear(4, 6, stride=3),
            RowParallelLinear(4, 6),
            VocabParallelEmbedding(4, 6),
            torch.nn.Linear(4, 6),
        )
        for site in find_sites(layer).values()
    ]
    assert shapes == [(4, 6 * size), (4 * size, 6), (4 * size, 6), (4, 6)]
    assert find_sites(ColumnParallelLinear(4, 6, stride=3))[""].blocks == (1, 1, 1)


@pytest.mark.parametrize(
    "rank, width, height, expected",
    [(8, 6, 6, 2), (1, 1, 1, 1), (4, 12, 10, 4), (8, 12, 10, 4), (5, 12, 10, 5), (6, 12, 10, 3)],
)
def test_a_rank_is_halved_until_the_pair_is_no_larger_than_the_matrix(rank, width, height, expected):
    assert bounded_rank(rank, width, height) == expected

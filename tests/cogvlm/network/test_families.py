"""The models of every family against a second, plain implementation; their names, shapes, sizes and graph."""

import copy
import math
from collections import Counter

import pytest
import torch

from sat_lora import describe
from sat_lora.cogvlm.checkpoints.hugging_face_names import hf_name, sat_name
from sat_lora.cogvlm.checkpoints.load import shardings_of
from sat_lora.cogvlm.families import FAMILIES, published_config
from sat_lora.doctor.model_checks.trained_set import trained_set_findings
from sat_lora.errors import DataError
from sat_lora.lora.apply import adapters_of, add_lora, find_all_sites
from tests.support.published_tables import FREQUENCIES, expanded, published_table
from tests.support.reference_families import family_logits
from tests.support.tiny import fill_adapters, logits_of
from tests.support.tiny_families import (
    CONFIGS,
    family_batch,
    family_model,
    published_model,
    published_shapes,
    reference_config,
)

pytestmark = pytest.mark.usefixtures("single_process_group")
NAMES = [pytest.param("cogvlm", marks=pytest.mark.matrix), *(name for name in CONFIGS if name != "cogvlm")]
"""CogVLM itself has `test_model.py`."""
MIXED = {"images": (True, True), "mixed": (True, False), "text": (False, False)}


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_the_plain_implementation(name, rows):
    model = family_model(name, torch.float64).eval()
    batch = family_batch(name, rows, dtype=torch.float64)
    expected = family_logits(model.state_dict(), reference_config(name), batch)
    tolerance = 1e-6 if name == "cogagent" else 1e-12  # the second encoder's angles are float32's
    assert relative_error(logits_of(model, batch), expected) < tolerance
    assert copy.deepcopy(model).family is FAMILIES[name]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_gives_the_logits_of_its_own_weights_within_its_rounding(name):
    """float16 has 11 binary digits, bfloat16 8: a layer rounds a few times each."""
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        model = family_model(name, dtype).eval()
        state = {key: tensor.double() for key, tensor in model.state_dict().items()}
        for rows in MIXED.values():
            batch = family_batch(name, rows, dtype=dtype)
            logits = logits_of(model, batch)
            assert logits.isfinite().all()
            expected = family_logits(state, reference_config(name), batch)
            assert relative_error(logits.double(), expected) < tolerance, (dtype, rows)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_plain_implementation_and_come_in_one_order(name):
    """ZeRO fills buckets in the order in which gradients arrive; a branch on the data would change it."""
    orders = []
    never = {"mixins.encoder.vit.model." + part for part in ("blocks.2", "norm", "head")}
    for rows in ((True, True), (True, False), (False, False)):
        model = family_model(name, torch.float64).train()
        batch = family_batch(name, rows, dtype=torch.float64)
        order = []
        for parameter_name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, n=parameter_name, o=order: o.append(n))
        logits_of(model, batch).pow(2).mean().backward()
        orders.append(order)
        wanted = {n for n, _ in model.named_parameters() if not any(n.startswith(part) for part in never)}
        assert set(order) == wanted and len(set(order)) == len(order)
        if rows == (True, False):
            state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
            family_logits(state, reference_config(name), batch).pow(2).mean().backward()
            for parameter_name in wanted:
                expected = state[parameter_name].grad
                got = model.get_parameter(parameter_name).grad
                if expected is None:
                    assert not got.any(), parameter_name
                else:
                    assert relative_error(got, expected) < (1e-5 if name == "cogagent" else 1e-10), parameter_name
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_layers_give_the_same_gradients_of_adapters(name):
    gradients = []
    for recomputes in (False, True):
        model = family_model(name, checkpoint_activations=recomputes, vit_checkpoint_activations=recomputes)
        add_lora(model, target_modules="all-linear", r=2, lora_alpha=4)
        fill_adapters(model)
        model.train()
        logits_of(model, family_batch(name)).pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter_name, gradient in gradients[0].items():
        assert gradient is not None and relative_error(gradients[1][parameter_name], gradient) < 1e-4, parameter_name


PUBLISHED_BYTES = {"cogvlm2-llama3-chat-19B": 39_006_214_656, "cogvlm2-video-llama3-chat": 25_015_065_088}
PARAMETERS = {
    "cogvlm2-llama3-chat-19B": 19_503_105_280, "cogvlm2-video-llama3-chat": 12_507_530_496,
    "cogagent-chat": 18_291_033_280,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_sizes_of_published_models_are_those_of_their_files(name):
    shapes, parameters = published_shapes(name)
    assert parameters == PARAMETERS[name]
    if name in PUBLISHED_BYTES:
        (frequencies,) = shapes["mixins.rotary.rotary_emb.inv_freq"]
        copies = published_config(name)["num_layers"] * frequencies
        assert 2 * (parameters + copies) == PUBLISHED_BYTES[name]


PUBLISHED_NAMES = {"cogvlm2-llama3-chat-19B": 1221, "cogvlm2-video-llama3-chat": 1029}


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_shapes_and_cuts_are_the_published_ones(name):
    """Every one of them, in SAT and in Hugging Face, and none beside."""
    model = published_model(name)
    table = published_table(name)
    buffer, copies, frequencies = FREQUENCIES
    shapes, _ = published_shapes(name)
    assert shapes == {sat: shape for sat, _, shape, _ in table} | {buffer: frequencies}
    names = {sat: foreign for sat, foreign, _, _ in table}
    assert {key: hf_name(key) for key in shapes if key != buffer} == names
    assert {foreign: sat_name(foreign) for foreign in names.values()} == {
        foreign: sat for sat, foreign in names.items()
    }
    cuts = {key: (sharding.dim, sharding.blocks) for key, sharding in shardings_of(model).items() if key != buffer}
    lowest = {key: (dim, tuple(block // math.gcd(*blocks) for block in blocks)) for key, (dim, blocks) in cuts.items()}
    assert lowest == {sat: cut for sat, _, _, cut in table}
    in_files = {*names.values(), *(copy for (copy,) in expanded(copies))}
    assert len(in_files) == PUBLISHED_NAMES.get(name, len(in_files))


def test_what_never_runs_is_no_target_and_what_does_is():
    model = family_model("cogagent")
    names = [name for name in find_all_sites(model) if name.startswith("mixins.encoder.")]
    assert {name.split(".blocks.")[1][0] for name in names if ".blocks." in name} == {"0", "1"}
    assert not any(name.endswith(".head") for name in names)
    (site,) = (site for name, site in find_all_sites(model).items() if name.endswith("blocks.1.attn.q_proj"))
    assert (site.tower, site.layer) == ("cross-vision", 1)
    add_lora(model, target_modules=["cross-vision-attention"], r=2, lora_alpha=4)
    before = logits_of(model.eval(), family_batch("cogagent"))
    fill_adapters(model)
    assert not torch.equal(before, logits_of(model, family_batch("cogagent")))


PARTS = {
    "cogagent": {
        "language-attention": 4, "cross-attention": 6, "language-mlp": 6, "vision-expert-attention": 4,
        "vision-expert-mlp": 6, "vit-attention": 4, "vit-mlp": 4, "projector": 4, "lm-head": 1, "patch-embedding": 1,
        "cross-vision-patch-embedding": 1, "cross-vision-attention": 8, "cross-vision-mlp": 6,
    },
    "cogvlm2": {
        "language-attention": 4, "language-mlp": 6, "vision-expert-attention": 4, "vision-expert-mlp": 6,
        "vit-attention": 4, "vit-mlp": 4, "projector": 4, "lm-head": 1, "patch-embedding": 1, "vision-convolution": 1,
    },
    "cogvlm2-video": {
        "language-attention": 4, "language-mlp": 6, "vit-attention": 4, "vit-mlp": 4, "projector": 4, "lm-head": 1,
        "patch-embedding": 1, "vision-convolution": 1,
    },
}  # fmt: skip
"""How many layers each preset has of its own."""


@pytest.mark.parametrize("name", PARTS)
def test_a_preset_of_a_part_has_a_row_of_its_own(name):
    model = family_model(name)
    sites = find_all_sites(model)
    counts = Counter(site.part for site in sites.values())
    embeddings = {site.name for site in sites.values() if site.kind.is_embedding}
    assert {site.name for site in sites.values() if site.part == "other"} == embeddings
    assert {part: count for part, count in counts.items() if part != "other"} == PARTS[name]
    add_lora(model, target_modules=[*PARTS[name]], r=2, lora_alpha=4)
    rows = {row["part"]: (row["layers"], row["adapted"]) for row in describe(model)}
    assert rows.pop("total") == (sum(PARTS[name].values()),) * 2
    assert rows == {part: (count, count) for part, count in PARTS[name].items()}
    assert not trained_set_findings(model)


def test_the_preset_of_the_language_attention_has_the_cross_attention_with_it_as_ever():
    model = family_model("cogagent")
    chosen = {}
    for name in ("language-attention", "cross-attention", "patch-embedding"):
        called = f"of_{name.replace('-', '_')}"
        add_lora(model, target_modules=[name], r=2, lora_alpha=4, name=called)
        chosen[name] = {*adapters_of(model, called)}
    assert chosen["cross-attention"] < chosen["language-attention"] and len(chosen["language-attention"]) == 10
    assert len(chosen["patch-embedding"]) == 1
    assert not trained_set_findings(model)


def test_hooks_reach_the_second_encoders_queries_keys_and_values():
    model = family_model("cogagent").eval()
    seen = []
    for leaf in ("q_proj", "k_proj", "v_proj"):
        attention = model.mixins["encoder"].vit.model.blocks[0].attn
        getattr(attention, leaf).register_forward_hook(lambda *_, leaf=leaf: seen.append(leaf))
    logits_of(model, family_batch("cogagent"))
    assert seen == ["q_proj", "k_proj", "v_proj"]


def test_a_row_of_cogagent_has_one_picture_in_both_sizes():
    batch = family_batch("cogagent", (True, True))
    with pytest.raises(
        DataError, match="2 images and 1 for the second encoder; CogAgent takes one picture in each row"
    ):
        logits_of(family_model("cogagent"), {**batch, "cross_images": batch["cross_images"][:1]})
    with pytest.raises(DataError, match="2 images and 0 for the second encoder"):
        logits_of(family_model("cogagent"), {k: v for k, v in batch.items() if k != "cross_images"})

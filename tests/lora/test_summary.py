"""The table of what is adapted and what trains."""

import pytest
import torch

from sat_lora import add_lora, describe, describe_text
from sat_lora.lora import summary
from sat_lora.lora.apply import adapters_of
from tests.support.tiny import CONFIG, tiny_model

pytestmark = [
    pytest.mark.usefixtures("single_process_group"),
    pytest.mark.filterwarnings("ignore:LoRA rank"),
]
LAYERS, HIDDEN, INNER = CONFIG["num_layers"], CONFIG["hidden_size"], CONFIG["inner_hidden_size"]


def rows_of(model):
    return {row["part"]: row for row in describe(model)}


@pytest.fixture
def model():
    """Two adapters on the language attention, one on the language MLP, and a projector that trains whole."""
    model = tiny_model()
    add_lora(model, r=4, target_modules=["language-attention"], modules_to_save=["linear_proj.linear_proj"])
    add_lora(model, r=2, name="second", target_modules=["language-attention", "language-mlp"])
    return model


def test_layers_and_parameters_are_counted_by_hand(model):
    rows = rows_of(model)
    attention, mlp = 4 * HIDDEN * HIDDEN, 3 * HIDDEN * INNER
    pairs = sum(3 * HIDDEN + 3 * HIDDEN + 2 * HIDDEN for _ in range(LAYERS))  # q, k and v have an A each
    assert rows["language-attention"] == {
        "part": "language-attention",
        "layers": 2 * LAYERS,
        "adapted": 2 * LAYERS,
        "ranks": [2, 4],
        "trainable": (4 + 2) * pairs,
        "base": LAYERS * attention,
    }
    assert rows["language-mlp"] == {
        "part": "language-mlp",
        "layers": 3 * LAYERS,
        "adapted": 3 * LAYERS,
        "ranks": [2],
        "trainable": 2 * 3 * LAYERS * (HIDDEN + INNER),
        "base": LAYERS * mlp,
    }


def test_what_is_not_adapted_is_there_and_has_no_rank(model):
    head = rows_of(model)["lm-head"]
    assert head == {
        "part": "lm-head", "layers": 1, "adapted": 0, "ranks": [], "trainable": 0, "base": CONFIG["vocab_size"] * HIDDEN
    }  # fmt: skip


def test_embeddings_and_convolutions_are_rows_only_when_they_are_adapted():
    assert not {"word-embeddings", "patch-embedding"} & {*rows_of(tiny_model())}
    model = tiny_model()
    add_lora(model, r=2, target_modules=["patch-embedding"])
    adapted = [row for row in describe(model) if row["adapted"] and row["part"] != "total"]
    assert [(row["layers"], row["trainable"]) for row in adapted] == [(1, 2 * (3 * 7 * 7 + 48))]


def test_the_total_is_the_sum_and_comes_last(model):
    *rows, total = describe(model)
    whole = rows[-1]
    projector = 48 * HIDDEN
    assert whole == {
        "part": "trained whole", "layers": 0, "adapted": 0, "ranks": [], "trainable": projector, "base": projector
    }  # fmt: skip
    assert total["part"] == "total" and total["ranks"] == [2, 4]
    for field in ("layers", "adapted", "trainable", "base"):
        assert total[field] == sum(row[field] for row in rows)
    assert total["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_frozen_a_does_not_count():
    model = tiny_model()
    add_lora(model, r=2, target_modules=["language-mlp"], freeze_a=True)
    expected = sum(adapter.B.numel() for adapter in adapters_of(model).values())
    assert rows_of(model)["total"]["trainable"] == expected


def test_of_cut_parameters_those_of_all_ranks_count(model, monkeypatch):
    """As if this process were one of two model-parallel ranks."""
    before = rows_of(model)
    monkeypatch.setattr(summary, "model_parallel_layout", lambda: (0, 2))
    after = rows_of(model)
    attention = (4 + 2) * LAYERS * (3 * HIDDEN + 3 * HIDDEN + HIDDEN + HIDDEN)
    cut = (4 + 2) * LAYERS * (3 * HIDDEN + HIDDEN)  # B of q, k and v by rows, A of the dense layer by columns
    assert before["language-attention"]["trainable"] == attention
    assert after["language-attention"]["trainable"] == attention + cut
    assert after["trained whole"] == before["trained whole"]  # no rank has a part of it


def test_parameters_that_zero_3_has_partitioned_count_whole(model):
    expected = rows_of(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.ds_numel = parameter.numel() + 1
    counted = rows_of(model)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert counted["total"]["trainable"] == expected["total"]["trainable"] + trained


def test_the_text_has_a_line_for_each_row(model):
    lines = describe_text(model).splitlines()
    assert lines[0].split() == ["part", "layers", "adapted", "rank", "trainable", "of", "base"]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(describe(model))
    texts = {line[:26].strip(): line[26:].split() for line in lines[1:]}
    mlp = rows_of(model)["language-mlp"]
    share = f"{100 * mlp['trainable'] / mlp['base']:.2f}"
    assert texts["language-mlp"] == ["6", "6", "2", f"{mlp['trainable']:,}", share, "%"]
    assert texts["lm-head"] == ["1", "0", "-", "0", "0.00", "%"]
    assert texts["trained whole"][-2:] == ["100.00", "%"]


def test_the_text_of_a_part_without_a_base_has_no_share(monkeypatch):
    row = {"part": "x", "layers": 0, "adapted": 0, "ranks": [], "trainable": 0, "base": 0}
    monkeypatch.setattr(summary, "describe", lambda model: [row])
    assert describe_text(torch.nn.Module()).splitlines()[1].split() == ["x", "0", "0", "-", "0", "-"]

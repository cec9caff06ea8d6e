"""Planted faults, each found before a run with the right code, ranks and place; healthy models without a finding."""

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.network import head
from sat_lora.doctor.examine import examine
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.loss import answer_loss_sum as loss_of
from tests.support.branching_cogvlm import branch_on_data
from tests.support.examined import batches_of, tiny, told
from tests.support.ranks import run_ranks
from tests.support.sat_oracle import with_sats
from tests.support.sat_subjects import SUBJECTS
from tests.support.sat_subjects import loss_of as loss_of_subject
from tests.support.tiny import tiny_batch, tiny_model
from tests.support.training_runs import mixed_batch

VIT = "mixins.eva.vit_model"


# Healthy


def healthy(model_parallel, checkpoint, fields, bf16=False):
    world = init_model_parallel(init_distributed(), model_parallel)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = tiny(
        world, LoraConfig(r=4, **fields), checkpoint=checkpoint, dtype=dtype, model_parallel_size=model_parallel
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    random_before = torch.get_rng_state()
    found = examine(model, batches_of(world), loss_of, optimizer=torch.optim.AdamW(trained(model)), bucket_size=2000)
    same = all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    same &= torch.equal(random_before, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    return told(found), same


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "ranks, model_parallel, checkpoint, fields",
    [
        (1, 1, False, {}),
        (2, 1, True, dict(lora_dropout=0.2)),
        (2, 2, False, dict(use_dora=True)),
        (2, 2, True, dict(init_lora_weights="pissa", modules_to_save=("boi", "linear_proj"))),
        (2, 1, False, dict(bias="lora_only", target_modules=("vit-mlp", "lm-head", "patch-embedding"))),
    ],
)
def test_a_healthy_model_gives_no_finding_and_is_left_as_it_was(ranks, model_parallel, checkpoint, fields):
    for bf16 in (False, True):
        for found in run_ranks(healthy, ranks, model_parallel, checkpoint, fields, bf16):
            assert found == ([], True)


# Faults; each plants one and gives what was told


def branching():
    branch_on_data()
    world = init_model_parallel(init_distributed())
    return told(examine(tiny(world), batches_of(world), loss_of))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_published_branching_is_found_even_on_one_rank(ranks):
    for found in run_ranks(branching, ranks):
        codes = {code for code, *_ in found}
        assert codes == {"gradient-missing"}
        by_ranks = {those: module for _, those, module, _ in found}
        assert set(by_ranks) == ({(0,)} if ranks == 1 else {(0, 1)})
        assert all("mixins" in module for module in by_ranks.values())


def other_targets_on_one_rank():
    world = init_model_parallel(init_distributed())
    targets = ["language-mlp"] if world.rank else ["language-mlp", "vit-mlp"]
    return told(examine(tiny(world, LoraConfig(r=4, target_modules=targets)), batches_of(world), loss_of))


def test_different_trainable_sets_are_found():
    for found in run_ranks(other_targets_on_one_rank, 2):
        code, ranks, _, parameter = found[0]
        assert (code, ranks) == ("trainable-differs", (1,)) and VIT in parameter


def other_order_on_one_rank():
    world = init_model_parallel(init_distributed())
    model = tiny_model().train()
    for name in ("one", "two") if world.rank == 0 else ("two", "one"):
        add_lora(model, LoraConfig(r=2, target_modules=["language-mlp"]), name=name)
    return told(examine(model, batches_of(world), loss_of))


def test_another_order_of_parameters_is_found():
    for found in run_ranks(other_order_on_one_rank, 2):
        code, ranks, _, parameter = found[0]
        assert (code, ranks) == ("parameter-order", (1,)) and parameter.startswith("mixins.two.")


def detached(where):
    world = init_model_parallel(init_distributed())
    model = tiny(world)
    if where == "adapter":
        adapter = adapters_of(model)["transformer.layers.1.mlp.dense_4h_to_h"]
        add = adapter.forward
        adapter.forward = lambda y, x, layer, *_: y + (add(y.detach().clone(), x, layer) - y).detach()
    elif where == "vit":
        model.get_mixin("eva").vit_model.register_forward_hook(lambda module, args, output: output.detach())
    else:
        head = model.get_mixin("lm").lm_head
        run = head.forward
        head.forward = lambda *args: torch.no_grad()(run)(*args)
    return told(examine(model, batches_of(world), loss_of))


@pytest.mark.parametrize(
    "where, module, parameter",
    [
        ("adapter", "transformer.layers.1.mlp.dense_4h_to_h", "transformer/layers/1/mlp/dense_4h_to_h.A"),
        ("vit", f"{VIT}.transformer.layers.0.attention.query_key_value", "layers/0/attention/query_key_value.A"),
        ("head", "mixins.lm.lm_head", "A"),
    ],
)
def test_what_the_loss_does_not_reach_is_found(where, module, parameter):
    for found in run_ranks(detached, 2 if where == "adapter" else 1, where):
        assert {code for code, *_ in found} == {"unreachable"}
        assert found[0][1] == ((0, 1) if where == "adapter" else (0,))
        assert found[0][2] == module and found[0][3].endswith(parameter)


def vit_in_evaluation_mode_under_sats_checkpointing():
    """SAT makes the embeddings ask for a gradient in training mode alone; our models' own checkpointing always does."""
    world = init_model_parallel(init_distributed())
    model = tiny(world)
    vit = model.get_mixin("eva").vit_model.eval()
    vit.transformer.checkpoint_activations = True
    return told(examine(model, batches_of(world), loss_of))


def test_checkpointing_without_an_input_that_asks_for_a_gradient_is_found():
    for found in run_ranks(vit_in_evaluation_mode_under_sats_checkpointing, 2):
        assert {(code, ranks) for code, ranks, *_ in found} == {("checkpoint-without-grad", (0, 1))}
        assert found[0][2].startswith(f"{VIT}.transformer.layers.0") and VIT in found[0][3]


def head_in_chunks():
    """The regions of a step's chunks are recomputed from the last to the first."""
    world = init_model_parallel(init_distributed())
    head.CHUNK_ROWS = 3
    model = tiny(world, LoraConfig(r=4, target_modules=["all-linear", "lm-head"], lora_dropout=0.1), checkpoint=True)
    return told(examine(model, batches_of(world), loss_of))


def test_chunks_of_the_head_are_no_finding():
    assert run_ranks(head_in_chunks, 2) == [[], []]


def noise_of_pythons_own(module, args, output):
    return output * (1 + random.random())


def other_result_when_recomputed():
    world = init_model_parallel(init_distributed())
    model = tiny(world, checkpoint=True)
    model.get_submodule("transformer.layers.1.mlp").register_forward_hook(noise_of_pythons_own)
    return told(examine(model, batches_of(world), loss_of))


def test_a_recomputation_that_differs_is_found():
    for found in run_ranks(other_result_when_recomputed, 1):
        assert ("recompute-differs", (0,), "transformer.layers.1.mlp", None) in found


def switched_off_after_forward():
    world = init_model_parallel(init_distributed())
    model = tiny(world, checkpoint=True)

    def loss_and_switch(model, batch):
        loss = loss_of(model, batch)
        if loss.requires_grad:
            model.get_mixin("lora").disable()
        return loss

    batches = {"images": tiny_batch((True, False))}
    return told(examine(model, batches, loss_and_switch))


def test_a_switch_between_forward_and_backward_is_found():
    for found in run_ranks(switched_off_after_forward, 1):
        assert ("switched-between-passes", (0,), "mixins.lora", None) in found


def one_layer_in_two_regions():
    init_model_parallel(init_distributed())
    model = tiny_model().train()
    add_lora(model, LoraConfig(r=4, target_modules=["language-mlp"]))
    layer = model.transformer.layers[1].mlp.dense_h_to_4h
    words = torch.randn(4, 64)

    def loss_in_two_regions(model, batch):
        loss = loss_of(model, batch)
        mixin = model.get_mixin("lora")
        run = lambda x: mixin._in_scope(x, old_impl=layer)  # noqa: E731
        one = checkpoint(run, words.clone().requires_grad_(), use_reentrant=True)
        return loss + one.sum() + checkpoint(run, words.clone().requires_grad_(), use_reentrant=True).sum()

    return told(examine(model, {"images": tiny_batch((True, False))}, loss_in_two_regions))


def test_a_gradient_that_arrives_twice_is_found():
    for found in run_ranks(one_layer_in_two_regions, 1):
        assert {code for code, *_ in found} == {"gradient-twice"}
        assert all("transformer/layers/1/mlp/dense_h_to_4h" in parameter for *_, parameter in found)


def nan_on_one_rank(where):
    world = init_model_parallel(init_distributed())
    model = tiny(world)
    batches = batches_of(world)
    if world.rank == 1 and where == "batch":
        batches["images"]["images"] = batches["images"]["images"] * float("nan")
    elif world.rank == 1:
        adapter = adapters_of(model)["transformer.layers.0.attention.dense"]
        torch.nn.init.constant_(adapter.A, float("inf"))
    return [one for one in examine(model, batches, loss_of) if one.code == "not-finite"]


@pytest.mark.parametrize("where, module", [("batch", None), ("adapter", "transformer.layers.0.attention.dense")])
def test_a_nan_on_one_rank_is_found(where, module):
    for found in run_ranks(nan_on_one_rank, 2, where):
        (finding,) = found
        assert (finding.ranks, finding.module) == ((1,), module)


def wrong_flag(on_whole):
    world = init_model_parallel(init_distributed(), 2)
    model = tiny(world, model_parallel_size=2)
    adapter = adapters_of(model)["transformer.layers.0.attention.dense"]
    if on_whole:
        adapter.B.tensor_model_parallel = True
    else:
        del adapter.A.model_parallel
    return told(examine(model, {"images": mixed_batch(0)}, loss_of))


@pytest.mark.parametrize("on_whole, leaf", [(True, "B"), (False, "A")])
def test_a_wrong_sharding_flag_is_found(on_whole, leaf):
    for found in run_ranks(wrong_flag, 2, on_whole):
        name = f"mixins.lora.adapters.transformer/layers/0/attention/dense.{leaf}"
        assert ("sharding-flag", (0, 1), name.rpartition(".")[0], name) in found


def lora2_of_sat(name, model_parallel):
    init_model_parallel(init_distributed(), model_parallel)
    subject = SUBJECTS[name]
    model = with_sats(subject, 4, 6).train()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("matrix_" in parameter_name)
    return told(examine(model, {"words": {}}, lambda model, batch: loss_of_subject(subject.run(model))))


def test_sats_lora2_is_found_out_at_model_parallel_size_2_and_not_at_1():
    assert run_ranks(lora2_of_sat, 1, "plain", 1) == [[]]
    for found in run_ranks(lora2_of_sat, 2, "plain", 2):
        assert ("parallel-rule", (0, 1), "transformer.layers.0.attention.dense", None) in found
        assert {code for code, *_ in found} <= {"parallel-rule", "replicas-differ", "sharding-flag"}

"""Faults that no other test here plants: each is found, at its place and on its ranks."""

import json

import pytest
import torch

from sat_lora import LoraConfig, add_lora, quantize_model
from sat_lora.cogvlm.network import experts
from sat_lora.doctor.batches import kinds_of
from sat_lora.doctor.diagnose import diagnose
from sat_lora.doctor.examine import examine
from sat_lora.doctor.model_checks.parallelism import code_marks, compare_codes, quantized_replica_findings
from sat_lora.doctor.model_checks.trained_set import trained_set_findings
from sat_lora.doctor.run_checks.configuration import bucket_findings, precision_findings
from sat_lora.doctor.run_checks.data import batch_count_findings, data_findings
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.quantized.layers import put_quantized, quantized_weights
from sat_lora.training.steps.loss import answer_loss_sum as loss_of
from tests.support.configs import config_of, parse_options
from tests.support.demo_runs import options_for
from tests.support.examined import batches_of, tiny, told
from tests.support.paths import TINY_BASE
from tests.support.ranks import run_ranks
from tests.support.tiny import fill_adapters, tiny_batch, tiny_model

VIT_MLP = "mixins.eva.vit_model.transformer.layers.1.mlp.dense_h_to_4h"


def adapted(**fields):
    model = tiny_model().train()
    add_lora(model, LoraConfig(r=4, **fields))
    return model


def examined(model, optimizer=None):
    return examine(model, {"images": tiny_batch((True, False))}, loss_of, optimizer=optimizer)


# What trains


def test_a_part_of_the_base_that_trains_unasked_for_is_found(single_process_group):
    model = adapted(target_modules=["language-mlp"])
    for name, parameter in model.named_parameters():  # as CogVLM's published script chooses, by substring
        if "vit_model" in name and "mlp" in name:
            parameter.requires_grad_()
    (finding,) = trained_set_findings(model)
    assert finding.code == "trainable-set" and "trains, unasked for, and 7 more" in finding.seen
    assert finding.parameter.startswith("mixins.eva.vit_model.transformer.layers.0.mlp.")


def test_an_adapter_that_is_frozen_is_found(single_process_group):
    model = adapted()
    adapter = adapters_of(model)["transformer.layers.1.mlp.dense_4h_to_h"]
    adapter.B.requires_grad_(False)
    (finding,) = trained_set_findings(model)
    assert finding.code == "trainable-set" and "does not train" in finding.seen
    assert finding.parameter.endswith("layers/1/mlp/dense_4h_to_h.B")


def test_a_tower_of_which_nothing_is_left_is_found(single_process_group):
    model = adapted(target_modules=["vit-mlp", "language-mlp"], exclude_modules=["vit-mlp"])
    (finding,) = trained_set_findings(model)
    assert (finding.code, finding.option) == ("tower-not-adapted", "--target_modules")
    assert finding.seen.startswith("vit-mlp was asked for")


def test_an_adapter_of_another_dtype_is_found(single_process_group):
    model = adapted()
    adapters_of(model)[VIT_MLP].to(torch.bfloat16)
    (finding,) = trained_set_findings(model)
    assert (finding.code, finding.module) == ("dtype-or-device", VIT_MLP)
    assert "is torch.bfloat16 on cpu, wanted torch.float32 on cpu" in finding.seen


def test_a_fresh_adapter_that_changes_something_is_found(single_process_group):
    model = adapted()
    fill_adapters(model, seed=1)  # as the initial values that SAT's skip_init leaves in B
    (finding,) = examined(model)
    assert finding.code == "fresh-adapter" and "with the base alone" in finding.seen


@pytest.mark.parametrize("fault", ["lacks", "twice", "frozen"])
def test_an_optimizer_that_holds_something_else_than_trains_is_found(fault, single_process_group):
    model = adapted()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = {
        "lacks": [{"params": trained[1:]}],
        "twice": [{"params": trained}],
        "frozen": [{"params": [*trained, next(p for p in model.parameters() if not p.requires_grad)]}],
    }[fault]
    optimizer = torch.optim.AdamW(groups)
    if fault == "twice":  # torch refuses it when it is made, not afterwards
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": trained[:1]})
    words = {"lacks": "does not hold it", "twice": "more than once", "frozen": "1 parameters that do not train"}
    finding = next(one for one in examined(model, optimizer) if one.code == "optimizer-holds")
    assert words[fault] in finding.seen


# Gradients and model parallelism


def experts_in_another_order():
    """Rank 1 runs the language expert first, so that backward comes to the vision expert first."""
    world = init_model_parallel(init_distributed())
    model = tiny(world)
    if world.rank == 1:

        def route(routing, vision, language, x):
            flat = x.reshape(-1, x.shape[-1])
            of_language = language(flat[routing.language])
            of_vision = vision(flat[routing.vision])
            output = of_language.new_zeros(len(flat), of_language.shape[-1])
            output = output.index_copy(0, routing.language, of_language)
            return output.index_copy(0, routing.vision, of_vision).view(*x.shape[:-1], -1)

        experts.route = route
    return told(examine(model, batches_of(world), loss_of, bucket_size=1000))


def test_gradients_in_another_order_on_one_rank_are_found():
    for found in run_ranks(experts_in_another_order, 2):
        assert {code for code, *_ in found} == {"gradient-order"}
        assert found[0][1] == (0, 1) and "mixins/mlp/vision_dense_4h_to_h_list/1" in found[0][3]


def one_replica_changed():
    world = init_model_parallel(init_distributed(), 2)
    model = tiny(world, model_parallel_size=2)
    norm = model.get_submodule("transformer.layers.1.input_layernorm")
    if world.rank == 1:
        with torch.no_grad():
            norm.weight[3] += 1e-3
    return told(examine(model, kinds_of(tiny_batch((True, False))), loss_of))


def test_a_replica_that_has_drifted_is_found():
    for found in run_ranks(one_replica_changed, 2):
        assert ("replicas-differ", (0, 1), None, "transformer.layers.1.input_layernorm.weight") in found


# Quantised weights


def quantized(**fields):
    model = tiny_model().train()
    names = quantize_model(model, **fields)
    add_lora(model, LoraConfig(r=4))
    return model, names


def test_a_quantised_model_is_no_finding(single_process_group):
    assert examined(quantized()[0]) == []


def test_a_quantised_weight_that_is_a_parameter_is_found(single_process_group):
    model, names = quantized()
    for name in names[:2]:  # as load_state_dict(assign=True) puts it there, or a hand
        layer = model.get_submodule(name)
        weight = layer._buffers.pop("weight")
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    (finding,) = [found for found in examined(model) if found.code == "quantized-parameter"]
    assert (finding.parameter, finding.module) == (f"{names[0]}.weight", names[0])
    assert finding.seen == f"{names[0]}.weight is a parameter, and quantised; 2 in all"


A, B = "layers.0.a.weight", "layers.1.b.weight"


@pytest.mark.parametrize(
    ("by_rank", "name", "ranks", "seen"),
    [
        ([(0, {A: (False, 1.0)}), (0, {A: (False, 1.0)})], None, (), ""),
        ([(0, {A: (True, 1.0)}), (1, {A: (True, 2.0)}), (0, {A: (True, 1.0)}), (1, {A: (True, 2.0)})], None, (), ""),
        ([(0, {A: (False, 1.0)}), (0, {A: (False, 2.0)})], A, (1,), "its codes or scales differ from those of the"),
        ([(0, {A: (True, 1.0)}), (1, {A: (True, 2.0)}), (0, {A: (True, 3.0)}), (1, {A: (True, 2.0)})], A, (2,), ""),
        ([(0, {A: (False, 1.0)}), (1, {A: (False, 2.0)})], A, (1,), "its codes or scales differ"),
        ([(0, {A: (False, 1.0)}), (0, {})], A, (1,), "it is not quantised on rank 1"),
        ([(0, {}), (0, {B: (True, 1.0)}), (0, {})], B, (1,), "it is not quantised on rank 0, 2"),
        ([(0, {A: (False, 1.0), B: (False, 1.0)}), (0, {A: (False, 2.0), B: (False, 2.0)})], A, (1,), "; 2 weights in"),
    ],
)  # fmt: skip
def test_quantised_replicas_are_compared_by_their_codes(by_rank, name, ranks, seen):
    findings = compare_codes(by_rank)
    assert [(found.code, found.parameter, found.ranks) for found in findings] == (
        [] if name is None else [("replicas-differ", name, ranks)]
    )
    assert all(seen in found.seen for found in findings)


def test_a_part_that_each_rank_holds_alone_is_no_replica(single_process_group):
    """Under --quantize_partition; a weight that is partitioned on one rank and whole on another is one all the same."""
    marks = []
    for seed in (0, 1):  # other bytes on each rank
        model, _ = quantized()
        for name, weight in quantized_weights(model):
            part = weight.partitioned(torch.distributed.group.WORLD)
            part.codes.fill_(seed)
            put_quantized(model.get_submodule(name), part)
        marks.append((0, code_marks(model)))
    assert marks[0][1] and compare_codes(marks) == []
    (finding,) = compare_codes([marks[0], (0, code_marks(quantized()[0]))])
    assert finding.code == "replicas-differ"
    (finding,) = compare_codes([marks[0], (0, {})])
    assert "it is not quantised on rank 1" in finding.seen


def one_code_changed():
    world = init_model_parallel(init_distributed())
    model, names = quantized()
    if world.rank == 1:
        model.get_submodule(names[3]).weight.codes[2, 1] ^= 1
    found = quantized_replica_findings(model)
    model.get_submodule(names[3]).weight.codes[2, 1] ^= world.rank
    return names[3], told(found), quantized_replica_findings(model)


@pytest.mark.matrix
def test_one_changed_bit_of_one_rank_is_found():
    for name, found, after in run_ranks(one_code_changed, 2):
        assert [entry[:2] for entry in found] == [("replicas-differ", (1,))] and f"{name}.weight" in found[0]
        assert after == []


# Configuration


def codes_told(arguments):
    return [(one.code, one.seen, one.where) for one in diagnose(parse_options(arguments))]


def test_a_key_that_deepspeed_does_not_know_is_found(captchas, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"gradient_clippin": 0.1, "zero_optimization": {"stage": 2}}))
    (found,) = run_ranks(codes_told, 1, options_for(captchas, tmp_path, "--deepspeed_config", str(path)))
    code, seen, where = found[0]
    assert code == "unknown-key" and '"gradient_clipping"' in seen and "deepspeed.json" in where


def test_float16_of_a_checkpoint_with_another_range_is_found():
    options = config_of(fp16=True, from_pretrained=str(TINY_BASE))
    (finding,) = precision_findings(options, "cpu")
    assert (finding.code, finding.option) == ("precision", "--fp16")
    assert "and the run takes float16, which ends at 65,504" in finding.seen


def test_buckets_far_larger_than_what_trains_are_found():
    engine = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000, "overlap_comm": True}}
    (finding,) = bucket_findings(engine, trained=50_000_000, itemsize=2)
    assert finding.code == "bucket-size" and finding.seen.endswith("50,000,000 elements train: 1.9 GiB of buffers")
    assert bucket_findings(engine, trained=400_000_000, itemsize=2) == []


# Data


def test_samples_without_a_label_are_found():
    batch = {**tiny_batch((True, False)), "lengths": torch.tensor([20, 20]), "left_out": torch.tensor([0, 0])}
    settings = dict(image_length=9, max_length=20, max_broken_share=0.05)
    assert data_findings([batch], **settings) == []
    batch["labels"][1] = -100
    (finding,) = data_findings([batch], **settings)
    assert finding.code == "no-labels" and finding.seen == "1 of 2 samples looked at have no label"


def test_a_rank_with_fewer_batches_is_found():
    assert batch_count_findings([3, 3], "validation data") == []
    (finding,) = batch_count_findings([3, 2, 3], "validation data")
    assert (finding.code, finding.ranks) == ("unequal-batches", (1,))
    assert finding.seen == "batches of validation data: rank 0 3, rank 1 2, rank 2 3"

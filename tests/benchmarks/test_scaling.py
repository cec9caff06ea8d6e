"""The formulas of benchmarks/scaling give what two ranks really send, and what a model really holds."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

from benchmarks.scaling.communication import (
    DATA,
    MODEL,
    VERDICT,
    Collective,
    MicroBatch,
    Setting,
    data_parallel,
    model_parallel,
)
from benchmarks.scaling.report import SETTING, report
from benchmarks.scaling.sizes import Sizes
from sat_lora import LoraConfig, add_lora
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from tests.support.collectives import CountCollectives
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny import CONFIG, PATCHES, tiny_model
from tests.support.training_runs import engine_config, mixed_batch, step_together

RANK = 4
BATCH = MicroBatch(samples=2, length=20, images=1, vision_tokens=PATCHES + 1, labelled=2 * 4)  # tiny_batch()
NOTHING_KEPT = dict.fromkeys(
    ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0
)


def setting(checkpointing: bool = False) -> Setting:
    return Setting(sizes=Sizes(CONFIG), batch=BATCH, rank=RANK, size=2, checkpointing=checkpointing)


class Step(NamedTuple):
    """Of one rank."""

    seen: Counter  # what it sends
    base: int  # elements of the base
    trained: int  # elements of the adapters
    moments: int  # elements of Adam's two moments


def count_a_step(stage, parts, checkpointing, **zero):
    """The third step; ZeRO-3 compares the order of modules between ranks in the first two."""
    world = init_model_parallel(init_distributed(), parts)
    checkpoint = dict(checkpoint_activations=checkpointing, vit_checkpoint_activations=checkpointing)
    model = tiny_model(torch.bfloat16, model_parallel_size=parts, **checkpoint)
    add_lora(model, LoraConfig(r=RANK))
    model.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters()) - trained
    config = engine_config(stage, BATCH.samples, clip=1.0, bf16=True)
    config["zero_optimization"] |= zero
    engine = start_engine(model, adapter_optimizer(model, lr=1e-3), config)
    batch = mixed_batch(world.data_parallel_rank)
    for _ in range(2):
        step_together(engine, [batch], world)
    with CountCollectives() as count:
        step_together(engine, [batch], world)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # DeepSpeed's own holds ours
    moments = sum(s[name].numel() for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return Step(count.seen, base, trained, moments)


def sent_by_size(seen: Iterable[Collective]) -> Counter:
    """Bytes of payload per kind and group, whatever the number of collectives."""
    total = Counter()
    for collective, times in Counter(seen).items():
        total[collective.kind, collective.group] += times * collective.payload
    return total


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_data_parallel_collectives_are_those_that_are_made(stage):
    first, second = run_ranks(count_a_step, 2, stage, 1, False)
    assert first.seen == second.seen == Counter([VERDICT, *data_parallel(setting(), stage)])
    check_moments(first)


def check_moments(step: Step) -> None:
    """Each of two ranks holds a half of them."""
    assert step.moments == Sizes(CONFIG).adapter(RANK)


@pytest.mark.matrix
def test_small_buckets_send_as_many_bytes_in_more_collectives():
    step, _ = run_ranks(count_a_step, 2, 2, 1, False, reduce_bucket_size=3000)
    assert sum(step.seen.values()) > len([VERDICT, *data_parallel(setting(), 2)])
    assert sent_by_size(step.seen) == sent_by_size([VERDICT, *data_parallel(setting(), 2)])


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_zero_3_gathers_what_the_formula_says(checkpointing):
    step, _ = run_ranks(count_a_step, 2, 3, 1, checkpointing, **NOTHING_KEPT)
    assert sent_by_size(step.seen) == sent_by_size([VERDICT, *data_parallel(setting(checkpointing), 3)])
    check_moments(step)


@pytest.mark.matrix
def test_zero_3_gathers_less_if_it_may_keep_some():
    expected, gathers = sent_by_size([VERDICT, *data_parallel(setting(True), 3)]), ("all-gather", DATA)
    step, _ = run_ranks(count_a_step, 2, 3, 1, True)
    assert sent_by_size(step.seen)[gathers] < expected[gathers]
    assert {**sent_by_size(step.seen), gathers: 0} == {**expected, gathers: 0}


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.matrix), True])
def test_model_parallel_collectives_are_those_that_are_made(checkpointing):
    first, second = run_ranks(count_a_step, 2, 1, 2, checkpointing)
    assert first.seen == second.seen == Counter([VERDICT, *model_parallel(setting(checkpointing), 1)])


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_both_at_once_make_the_collectives_of_either(stage):
    """Four ranks, two of which share a model."""
    own, zero = setting(True), NOTHING_KEPT if stage == 3 else {}
    step, *_ = run_ranks(count_a_step, 4, stage, 2, True, **zero)
    expected = Counter([VERDICT, *data_parallel(own, stage, 2), *model_parallel(own, stage)])
    assert sent_by_size(step.seen) == sent_by_size(expected)
    assert stage == 3 or step.seen == expected  # how many gathers ZeRO-3 makes of it is its own affair


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_and_adapters_are_counted_right(parts):
    for step in run_ranks(count_a_step, parts, 1, parts, False):
        sizes = Sizes(CONFIG)
        assert (step.base, step.trained) == (sizes.weights(parts), sizes.adapter(RANK, parts))


def test_a_ring_sends_every_chunk_but_one_to_the_neighbour():
    """Two ranks exchange halves: to sum and to share the sums, or only one of the two."""
    assert Collective("all-reduce", 800, DATA).sent(2) == 400 + 400
    assert Collective("all-gather", 800, DATA).sent(8) == Collective("reduce-scatter", 800, DATA).sent(8) == 7 * 100
    assert Collective("all-reduce", 800, MODEL).sent(1) == 0


def test_cogvlm_has_17_billion_weights():
    """The visual experts, 6.5 billion beside a language model of 6.7, a ViT of 4.3 and a projector."""
    h, inner, layers, vocabulary = 4096, 11008, 32, 32000
    expert = layers * (4 * h * h + 3 * h * inner)
    llama_7b = 6_738_415_616  # as published, Vicuna included
    assert expert + 2 * vocabulary * h + (2 * layers + 1) * h == llama_7b
    vit = 63 * (4 * 1792**2 + 2 * 1792 * 15360)
    projector = 1792 * h + 3 * h * inner
    assert SETTING.sizes.weights() == pytest.approx(llama_7b + expert + vit + projector, rel=1e-3)


def page():
    return "\n".join(report()) + "\n"


@pytest.mark.matrix
@pytest.mark.timeout(400)
def test_the_page_is_what_the_script_prints():
    """In a process of its own, since it pretends ranks, and tests before it may have begun a group of this one."""
    (printed,) = run_ranks(page, 1, timeout=300)
    assert (ROOT / "benchmarks" / "scaling.md").read_text() == printed

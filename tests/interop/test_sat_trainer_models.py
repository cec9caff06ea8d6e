"""SAT's `training_main` on SAT's own models, and on models whose graph depends on the data."""

from functools import partial

import pytest
import torch

from sat_lora import add_lora, quantize_model
from sat_lora.adapters.read import read_adapter
from sat_lora.training.steps.loss import answer_loss_sum, count_answer_tokens
from tests.support.branching_cogvlm import branch_on_data
from tests.support.published_cogvlm import published, run_published
from tests.support.ranks import run_ranks
from tests.support.sat_subjects import SUBJECTS, adapt
from tests.support.sat_subjects import loss_of as loss_of_output
from tests.support.sat_trainer import (
    LORA,
    STEPS,
    difference,
    tiny_cogvlm,
    train_by_plain_sgd,
    train_by_sat,
)
from tests.support.tiny import WIDE, fill_adapters, randomise, tiny_batch, tiny_model

NAMED = ["chatglm2", "llama", "vit"]
OTHERS = ["chatglm", "chatglm3", "mixtral", "gpt2", "bert", "encoder-decoder", "t5"]


def build_subject(name, args=None):
    model = SUBJECTS[name].build(torch.float32, checkpoint_activations=getattr(args, "checkpoint_activations", False))
    adapt(model)
    return model


def loss_of_subject(name, model, seed):
    """Weighted by the seed, for the batch of a subject is always the same."""
    return loss_of_output(SUBJECTS[name].run(model)) * (1 + seed / 64)


def train_subjects(folder, names):
    """SAT's run of each, and the adapter of plain SGD."""
    outcomes = {}
    for name in names:
        build, loss = partial(build_subject, name), partial(loss_of_subject, name)
        options = ["--checkpoint-activations"] if name == "llama" else []
        run = train_by_sat(f"{folder}/{name}", build, stage=2, loss=loss, options=options)
        outcomes[name] = run, train_by_plain_sgd(build, [[seed] for seed in run.seeds], loss)
    return outcomes


@pytest.mark.parametrize("names", [NAMED, pytest.param(OTHERS, marks=pytest.mark.matrix)])
def test_models_of_sat_train(names, tmp_path):
    (outcomes,) = run_ranks(train_subjects, 1, str(tmp_path), names)
    for name, (run, plain) in outcomes.items():
        assert run.changed == [] and run.warnings == [] and len(run.trained) == 2 * SUBJECTS[name].count, name
        assert difference(run.adapter, plain) < 1e-5, name
        assert max(abs(values).max() for key, values in plain.items() if key.endswith("lora_B")) > 1e-4, name
        assert read_adapter(run.save).tensors.keys() == plain.keys()


def held_in_4_bits(args=None):
    model = tiny_model(config=WIDE)
    assert quantize_model(model, scheme="nf4")
    add_lora(model, LORA)
    fill_adapters(model)
    return model


def train_in_4_bits(folder, stages):
    return {stage: train_by_sat(f"{folder}/{stage}", held_in_4_bits, stage=stage, steps=2) for stage in stages}


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("stages", [[2], pytest.param([0, 1, 3], marks=pytest.mark.matrix)])
def test_adapters_train_on_a_base_in_4_bits_which_is_not_saved(stages, tmp_path):
    (runs,) = run_ranks(train_in_4_bits, 1, str(tmp_path), stages)
    for stage, run in runs.items():
        plain = train_by_plain_sgd(held_in_4_bits, [[seed] for seed in run.seeds])
        assert difference(run.adapter, plain) < 1e-5, stage
        saved = read_adapter(run.save)
        assert saved.base_quantization["scheme"] == "nf4" and saved.tensors.keys() == plain.keys()


def images_on_even_seeds(model, seed):
    """The batch of an odd seed is text alone."""
    batch = tiny_batch((True, False) if seed % 2 == 0 else (False, False), seed=seed)
    return answer_loss_sum(model, batch) / count_answer_tokens(batch["labels"])


def images_on_rank_0(loss, model, seed):
    """The other rank's batches are text alone: its seeds become odd."""
    return loss(model, seed_of_rank(seed, torch.distributed.get_rank()))


def seed_of_rank(seed, rank):
    return 2 * seed + rank


def branching_cogvlm(args=None):
    branch_on_data()
    return tiny_cogvlm(args, fixed_order=True)


def published_model(args=None):
    model = published()
    randomise(model, 0)
    add_lora(model, r=4, lora_alpha=8, fixed_order=True)
    fill_adapters(model)
    return model


def loss_of_published(model, seed):
    logits = run_published(model, seed, with_image=seed % 2 == 0)
    return logits.float().log_softmax(-1)[..., seed].mean().neg()


BRANCHING = {"cogvlm": (branching_cogvlm, images_on_even_seeds), "published": (published_model, loss_of_published)}


def train_branching(folder):
    return {
        name: train_by_sat(f"{folder}/{name}", build, stage=2, loss=partial(images_on_rank_0, loss))
        for name, (build, loss) in BRANCHING.items()
    }


def train_all_plainly(seeds):
    return {name: train_by_plain_sgd(build, seeds[name], loss) for name, (build, loss) in BRANCHING.items()}


def test_models_that_skip_what_has_no_token_train_at_zero_2_beside_a_rank_without_images(tmp_path):
    outcomes = run_ranks(train_branching, 2, str(tmp_path))
    seeds = {}
    for name in BRANCHING:
        steps = zip(*(outcome[name].seeds for outcome in outcomes))
        seeds[name] = [[seed_of_rank(seed, rank) for rank, seed in enumerate(step)] for step in steps]
    (expected,) = run_ranks(train_all_plainly, 1, seeds)
    for name in BRANCHING:
        runs = [outcome[name] for outcome in outcomes]
        plain = expected[name]
        assert all(len(run.seeds) == STEPS and run.changed == [] for run in runs), name
        assert difference(runs[0].adapter, plain) < 1e-5, name
        assert difference(runs[0].adapter, runs[1].adapter) == 0, name
        assert any("vit_model" in key for key in plain) and any("vision_" in key for key in plain), name
        assert all("mixins.lora." in key for key in runs[0].trained), name
        kept = [warning for warning in runs[0].warnings if "disable_untrainable_params" in warning]
        assert runs[0].warnings == kept and len(kept) == (name == "published"), name  # its class keeps ViT and boi

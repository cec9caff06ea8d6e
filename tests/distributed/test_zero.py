"""Training on several ranks gives what one process gives on the joined batch."""

import deepspeed
import pytest
import torch

from sat_lora import LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.adapter_file import whole_tensors
from sat_lora.mixin import adapters_of
from sat_lora.training.distributed import arrange, join
from sat_lora.training.engine import adapter_optimizer, start_engine
from sat_lora.training.loss import count_answer_tokens, sum_over_data_parallel
from sat_lora.training.step import train_step
from tests.distributed.ranks import run_ranks
from tests.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

CONFIG = LoraConfig(r=4, lora_alpha=8)


def engine_config(stage, micro_batch, accumulate=1, clip=0.0, bf16=False):
    return dict(
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulate,
        gradient_clipping=clip,
        # A threshold of 0, or parameters as small as these would all stay whole under ZeRO-3.
        zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        bf16=dict(enabled=bf16),
        steps_per_print=10**9,
    )


def step_together(engine, batches, world):
    tokens = sum_over_data_parallel(sum(count_answer_tokens(b["labels"]) for b in batches), device=world.device)
    return train_step(engine, batches, world, *tokens)


def sgd(model, lr):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def batch_for(rank: int, step: int = 0):
    """Rank 0 has images, every other is text-only, with another number of answer tokens."""
    return tiny_batch((True, False), seed=step) if rank == 0 else tiny_batch((False, False), seed=100 + step, answer=2)


def joined(batches):
    out = {key: torch.cat([b[key] for b in batches]) for key in batches[0] if key != "broken"}
    out["images"] = torch.cat([b["images"] for b in batches if b["image_embed_mask"].any()])
    return out


def adapter_values(model):
    return {k: t.float().numpy() for n, a in adapters_of(model).items() for k, t in whole_tensors(n, a).items()}


def steps_on_a_rank(stage, model_parallel, steps, lr, checkpoint=False, accumulate=1, folder=None):
    """`steps` plain SGD steps; with one step of rate 1, new = old - gradient shows the averaged gradient."""
    world = arrange(join(), model_parallel)
    model = tiny_model(
        model_parallel_size=model_parallel, checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint
    )
    add_lora(model, CONFIG)
    fill_adapters(model, std=0.1)
    model.train()
    engine = start_engine(model, sgd(model, lr), engine_config(stage, 2, accumulate))
    losses = []
    for step in range(steps):
        batches = [batch_for(world.data_parallel_rank, step)] * accumulate
        losses.append(step_together(engine, batches, world))
    if folder:
        save_adapter(engine.module, folder)
    return losses, adapter_values(engine.module)


def steps_alone(data_parallel, steps, lr):
    """The same in one process on the joined batch, in plain PyTorch."""
    arrange(join())
    model = tiny_model()
    add_lora(model, CONFIG)
    fill_adapters(model, std=0.1)
    model.train()
    optimizer, losses = sgd(model, lr), []
    for step in range(steps):
        batch = joined([batch_for(rank, step) for rank in range(data_parallel)])
        logits = logits_of(model, batch)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, adapter_values(model)


def worst_error(got, expected):
    assert got.keys() == expected.keys()
    return max(abs(got[k] - expected[k]).max() / max(abs(expected[k]).max(), 1e-12) for k in expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_images_on_one_rank_and_text_on_the_other_equal_one_process(stage):
    """One step of rate 1: the step is the gradient. Then four more."""
    for steps in (1, 5):
        (losses, values), (_, other) = run_ranks(steps_on_a_rank, 2, stage, 1, steps, 0.1)
        expected_losses, expected = run_ranks(steps_alone, 1, 2, steps, 0.1)[0]
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert worst_error(values, expected) < 1e-5
        assert worst_error(other, values) == 0


@pytest.mark.parametrize("stage, checkpoint", [(0, False), (2, True), (3, False)])
def test_two_model_parallel_ranks_equal_one_process(stage, checkpoint, tmp_path):
    (losses, values), (_, other) = run_ranks(
        steps_on_a_rank, 2, stage, 2, 5, 0.1, checkpoint=checkpoint, folder=str(tmp_path / "adapter")
    )
    expected_losses, expected = run_ranks(steps_alone, 1, 1, 5, 0.1)[0]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert worst_error(values, expected) < 1e-5
    assert worst_error(other, values) == 0
    load_and_compare(tmp_path / "adapter", expected)


def load_and_compare(folder, expected):
    model = tiny_model()
    load_adapter(model, folder)
    assert worst_error(adapter_values(model), expected) < 1e-5


def test_accumulated_micro_batches_equal_one_large_batch():
    """Twice the same micro-batch has the gradient of one."""
    (losses, values), _ = run_ranks(steps_on_a_rank, 2, 1, 1, 3, 0.1, accumulate=2)
    expected_losses, expected = run_ranks(steps_alone, 1, 2, 3, 0.1)[0]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert worst_error(values, expected) < 1e-5


def twenty_adam_steps(stage, bf16):
    world = arrange(join())
    model = tiny_model(torch.bfloat16 if bf16 else torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add_lora(model, CONFIG)
    model.train()
    optimizer = adapter_optimizer(model, lr=3e-3)
    engine = start_engine(model, optimizer, engine_config(stage, 2, clip=1.0, bf16=bf16))
    losses = [step_together(engine, [batch_for(world.rank)], world) for _ in range(20)]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        now = engine.module.state_dict()
        assert all(torch.equal(now[k], v) for k, v in before.items()), "a base weight moved"
    return losses


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_twenty_steps_of_mixed_ranks_complete_and_learn(stage, bf16):
    first, second = run_ranks(twenty_adam_steps, 2, stage, bf16)
    assert first == second
    assert first[-1] < 0.8 * first[0]


def save_from_layout(folder, model_parallel, stage):
    arrange(join(), model_parallel)
    model = tiny_model(model_parallel_size=model_parallel)
    add_lora(model, CONFIG)
    fill_adapters(model)
    model.train()
    engine = start_engine(model, sgd(model, 0.1), engine_config(stage, 2))
    save_adapter(engine.module, folder)


def logits_with_adapter(folder, model_parallel):
    arrange(join(), model_parallel)
    model = tiny_model(model_parallel_size=model_parallel).eval()
    load_adapter(model, folder)
    with torch.no_grad():
        return logits_of(model, tiny_batch()).numpy()


def test_every_layout_writes_the_same_bytes_and_loads_in_every_other(tmp_path):
    layouts = [(1, 1, 0), (2, 1, 1), (2, 1, 3), (2, 2, 0), (2, 2, 2), (2, 2, 3)]  # ranks, model parallel, ZeRO stage
    files = []
    for number, (ranks, model_parallel, stage) in enumerate(layouts):
        run_ranks(save_from_layout, ranks, str(tmp_path / str(number)), model_parallel, stage)
        files.append(
            [
                (tmp_path / str(number) / name).read_bytes()
                for name in ("adapter_model.safetensors", "adapter_config.json")
            ]
        )
    assert all(file == files[0] for file in files)
    alone = run_ranks(logits_with_adapter, 1, str(tmp_path / "3"), 1)[0]
    for got in run_ranks(logits_with_adapter, 2, str(tmp_path / "0"), 2):
        assert abs(got - alone).max() < 1e-5 * abs(alone).max()


def step_with_rate_zero(stage, bf16):
    world = arrange(join())
    model = tiny_model(torch.bfloat16 if bf16 else torch.float32)
    add_lora(model, CONFIG)
    model.train()
    engine = start_engine(model, adapter_optimizer(model, lr=1.0), engine_config(stage, 2, bf16=bf16))
    before = adapter_values(engine.module)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    step_together(engine, [batch_for(world.rank)], world)
    return worst_error(adapter_values(engine.module), before)


@pytest.mark.parametrize("stage, bf16", [(0, False), (0, True), (1, True), (2, False), (3, True)])
def test_the_rate_that_the_loop_sets_reaches_the_optimizer(stage, bf16):
    assert run_ranks(step_with_rate_zero, 2, stage, bf16) == [0, 0]

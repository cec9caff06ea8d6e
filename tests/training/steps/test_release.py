"""What is left of training when its engine has ended, and that evaluation takes no more memory than training took."""

import gc
import json
import shutil
import weakref

import pytest
import torch

from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm.checkpoints.sat_folder import save_weights
from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.lora.mixin import lora_mixins
from sat_lora.memory.live_memory import LiveBytes
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.partitioned import Partitioning
from sat_lora.training.steps.engine import adapter_optimizer, set_up_deepspeed, start_engine
from sat_lora.training.steps.optimizer_state import create_moments
from sat_lora.training.steps.release import end_training, free_memory
from tests.support.paths import TINY_BASE
from tests.support.ranks import run_ranks
from tests.support.tiny import logits_of, tiny_batch, tiny_model
from tests.support.training_runs import engine_config, step_together

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train_and_end(stage, dtype):
    """What lives after `end_training`: names of objects, bytes of tensors beyond the model; and how the model is."""
    world = init_model_parallel(init_distributed())
    config = engine_config(stage, 2, bf16=dtype == "bf16")
    with LiveBytes() as live:
        model = tiny_model(DTYPES[dtype]).train()
        if stage == 3:
            set_up_deepspeed()
            partitioning = Partitioning(config)
            for parameter in model.parameters():
                partitioning.partition(parameter)
        else:
            base_logits = logits_of(model, tiny_batch()).detach()
        add_lora(model, LoraConfig(r=4, target_modules=["language-mlp", "vit-attention"], modules_to_save=["boi"]))
        gc.collect()
        model_bytes = live.now
        optimizer = adapter_optimizer(model, lr=1e-2)
        engine = start_engine(model, optimizer, config)
        create_moments(engine)
        for step in range(2):
            step_together(engine, [tiny_batch(seed=step)], world)
        objects = {"engine": engine, "optimizer": optimizer, "wrapped optimizer": engine.optimizer}
        objects |= {f"moment {n}": moment for n, moment in enumerate(moments_of(optimizer))}
        alive = {name: weakref.ref(one) for name, one in objects.items()}
        trained = end_training(engine)
        del engine, optimizer, objects, model
        free_memory()
        left = [name for name, reference in alive.items() if reference() is not None]
        beyond = live.now - (model_bytes if stage != 3 else 0)
    if trained is None:
        return left, beyond, None
    hooks = [name for name, module in trained.named_modules() if "DeepSpeed" in str(hooks_of(module))]
    with_adapter = logits_of(trained, tiny_batch()).detach()
    for mixin in lora_mixins(trained).values():
        mixin.enabled = False
    is_base = torch.equal(logits_of(trained, tiny_batch()).detach(), base_logits)
    gradients = [name for name, parameter in trained.named_parameters() if parameter.grad is not None]
    return left, beyond, (hooks, gradients, is_base, torch.equal(with_adapter, base_logits))


def moments_of(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def hooks_of(module):
    return [
        hook.__qualname__
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if hasattr(hook, "__qualname__")
    ]


@pytest.mark.parametrize(
    "stage, dtype",
    [
        (2, "bf16"),
        *(
            pytest.param(stage, dtype, marks=pytest.mark.matrix)
            for stage in range(4)
            for dtype in DTYPES
            if (stage, dtype) != (2, "bf16")
        ),
    ],
)
def test_only_the_model_is_left_of_training(stage, dtype):
    ((left, beyond, model),) = run_ranks(train_and_end, 1, stage, dtype)
    assert left == []
    assert abs(beyond) < 1000, beyond
    if stage == 3:
        assert model is None
    else:
        hooks, gradients, is_base_when_disabled, is_base_when_enabled = model
        assert (hooks, gradients) == ([], []) and is_base_when_disabled and not is_base_when_enabled


def wide_base(folder):
    """The demo's base, wider, so that its weights are most of the memory."""
    config = json.loads((TINY_BASE / "model_config.json").read_text())
    config |= dict(hidden_size=512, inner_hidden_size=1024)
    model = build_cogvlm(config)
    save_weights(folder, config, model.state_dict())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_BASE / name, folder / name)
    return sum(parameter.nbytes for parameter in model.parameters())


def peaks_of_run(stage, folder, captchas, *more):
    """(bytes of the base, peak of the training steps, peak after them), in bytes of tensors of a run's process."""
    from sat_lora.training import evaluation, finetune
    from sat_lora.training.settings import deepspeed_config
    from tests.support.configs import parse_options

    init_model_parallel(init_distributed())
    base_bytes = wide_base(folder / "base")
    deepspeed_config.BUCKET = 100_000
    peaks, train, load = [], finetune.train, evaluation.load_base
    options = parse_options(
        [
            *("--from_pretrained", str(folder / "base"), "--version", "base", "--prompt", "CAPTCHA:"),
            *("--train-data", f"{captchas}/train", "--test-data", f"{captchas}/test", "--max_length", "64"),
            *("--save", str(folder), "--experiment-name", "run", "--num-workers", "0", "--batch-size", "4"),
            *("--train-iters", "2", "--zero-stage", str(stage), "--r", "2", *more),
        ]
    )
    with LiveBytes() as live:

        def measured_train(*args, **kwargs):
            live.peak = live.now
            train(*args, **kwargs)
            peaks.append(live.peak)
            live.peak = live.now

        def load_without_the_file(*args, **kwargs):
            peak = live.peak
            loaded = load(*args, **kwargs)
            live.peak = max(peak, live.now)  # a mapped file counts as a tensor while it is read
            return loaded

        finetune.train, evaluation.load_base = measured_train, load_without_the_file
        finetune.finetune(options)
        peaks.append(live.peak)
    return base_bytes, *peaks


@pytest.mark.parametrize(
    "stage, more",
    [
        (2, ("--modules_to_save", "boi")),
        pytest.param(0, (), marks=pytest.mark.matrix),
        pytest.param(3, (), marks=pytest.mark.matrix),
    ],
)
def test_evaluation_takes_no_more_memory_than_training(stage, more, tmp_path, captchas):
    ((base, training, evaluation),) = run_ranks(peaks_of_run, 1, stage, tmp_path, captchas, *more)
    assert training > base > 2e7
    assert evaluation <= 1.1 * training, (evaluation, training, base)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 12

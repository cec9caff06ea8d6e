"""SAT's models as folders that `from_pretrained` reads, tiny and random, and scripts of docs run on them."""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from sat_lora._sat_on_cpu import sat_on_cpu
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from tests.support.plain_rotary import PlainRotary, with_plain_rotary
from tests.support.sat_models import SIZES, chatglm2, llama, vit
from tests.support.tiny import randomise

MORE = {
    "llama2-7b": (llama, {}),
    "chatglm2-6b": (chatglm2, dict(use_qkv_bias=True, num_multi_query_heads=2)),
    "vit-base-patch16-224-in21k": (
        vit,
        dict(image_size=[12, 12], patch_size=4, pre_len=1, post_len=0, in_channels=3, num_classes=10, vocab_size=1),
    ),
}
RATE = 0.4  # of which SAT holds a twentieth for the first hundred steps of a fine-tuning
ENGINE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.0, "torch_adam": True}},
}


def write_folder(name: str, folder: Path) -> torch.nn.Module:
    """The model of that name, written as SAT writes one; its process is the only rank."""
    make, changes = MORE[name]
    model = with_plain_rotary(make())
    randomise(model, seed=0)
    (folder / name / "1").mkdir(parents=True)
    config = {**SIZES, "use_bias": name.startswith("vit"), **changes, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    (folder / name / "model_config.json").write_text(json.dumps(config))
    (folder / name / "latest").write_text("1")
    torch.save({"module": model.state_dict()}, folder / name / "1" / "mp_rank_00_model_states.pt")
    return model


def write_data(folder: Path, samples: int = 16) -> None:
    """`texts.pt`, token ids, and `images.pt`, images and classes: each two samples, again and again."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 10), generator=generator)
    torch.save(ids.repeat(samples // 2, 1), folder / "texts.pt")
    images = torch.randn(2, 3, 12, 12, generator=generator).repeat(samples // 2, 1, 1, 1)
    torch.save((images, torch.tensor([3, 7]).repeat(samples // 2)), folder / "images.pt")


def run_script(code: str, folder: str, name: str, steps: int = 8) -> tuple[list[float], list[str], list[str], str]:
    """(losses of the steps, what trained, what changed of the base, the run's folder) of a script of the docs.

    It runs in `folder`, on the CPU, with SAT's options of a run of that many steps.
    """
    work = Path(folder)
    os.chdir(work)
    init_model_parallel(init_distributed())
    base = {key: value.clone() for key, value in write_folder(name, work).state_dict().items()}
    write_data(work)
    (work / "engine.json").write_text(json.dumps(ENGINE))
    options = f"--mode finetune --experiment-name run --train-iters {steps} --num-workers 0 --lr {RATE} --split 1"
    options += f" --lr-decay-style constant --save checkpoints --save-interval {steps} --log-interval 1"
    data = "images.pt" if name.startswith("vit") else "texts.pt"
    sys.argv = ["script.py", *options.split(), "--train-data", data, "--deepspeed_config", "engine.json"]
    names: dict = {}
    losses: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(sat_on_cpu())
        _without_triton(stack)
        import sat.training.deepspeed_training as trainer

        main = trainer.training_main

        def noting(args, model, forward_step, create_dataset):
            def step(*given):
                loss, metrics = forward_step(*given)
                losses.append(float(loss))
                return loss, metrics

            return main(args, model, step, create_dataset)

        stack.enter_context(mock.patch.object(trainer, "training_main", noting))
        exec(code, names)
    model = names["model"]
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    state = model.state_dict()
    changed = [key for key, value in base.items() if not torch.equal(state[key], value)]
    return losses, trained, changed, names["args"].save


def _without_triton(stack: ExitStack) -> None:
    """Let models be built with a rotary embedding for the CPU."""
    from sat.model.official import chatglm2_model, llama_model

    for module in (llama_model, chatglm2_model):
        fast = module.FastRotaryEmbedding

        def plain(*args, fast=fast, **kwargs):
            return PlainRotary(fast(*args, **kwargs))

        stack.enter_context(mock.patch.object(module, "FastRotaryEmbedding", plain))

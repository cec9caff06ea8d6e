r"""The demo's captchas through SAT's own `training_main`, for those who have a script around it.

    deepspeed --num_gpus 1 finetune_demo/with_sat_trainer.py
    python finetune_demo/evaluate_cogvlm.py --adapter runs/with_sat_trainer-MM-DD-HH-MM \
        --from_pretrained finetune_demo/tiny_cogvlm --version base --max_length 64 --prompt CAPTCHA: \
        --test-data finetune_demo/captchas/test

What a script needs of sat_lora are the three lines marked so. Options of SAT given here come after those of DEFAULTS.
"""

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a clone, installed or not

import torch
from make_captchas import DEFAULT_OUT, make_captchas

from sat_lora import adapter_checkpoints, add_lora  # 1
from sat_lora._sat_on_cpu import sat_on_cpu
from sat_lora.cogvlm import load_cogvlm
from sat_lora.cogvlm.inputs.text import load_tokenizer
from sat_lora.data.samples import ImageTextDataset, collate, read_items
from sat_lora.training.steps.loss import answer_loss_sum, count_answer_tokens

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny_cogvlm"
DEFAULTS = """
--mode finetune --experiment-name with_sat_trainer --save runs --save-interval 350 --train-iters 700 --warmup 0.043
--lr-decay-style cosine --lr-decay-ratio 0.02 --eval-interval 100 --eval-iters 6 --eval-batch-size 32
--log-interval 10 --num-workers 2 --split 1
""".split()


def create_dataset(path: str, args) -> ImageTextDataset:
    """Return the samples of a folder: SAT's hook."""
    sizes = dict(image_size=tuple(args.base["eva_args"]["image_size"]), image_length=args.base["image_length"])
    texts = dict(version="base", prompt="CAPTCHA:", max_length=64)
    return ImageTextDataset(read_items([Path(path)]), load_tokenizer(str(BASE)), **texts, **sizes)


def forward_step(batches, model, args, timers):
    """Return the mean loss of the answers of the next batch, and no metrics: SAT's hook."""
    batch = next(batches)
    batch = {name: value.to(args.device) if hasattr(value, "to") else value for name, value in batch.items()}
    return answer_loss_sum(model, batch) / max(1, count_answer_tokens(batch["labels"])), {}


def main() -> None:
    """Train by SAT's loop, with the options of the command line behind those of DEFAULTS."""
    from sat import get_args
    from sat.training.deepspeed_training import training_main

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):  # started without a launcher
        os.environ.setdefault(name, value)
    data = ["--train-data", str(DEFAULT_OUT / "train"), "--valid-data", str(DEFAULT_OUT / "valid")]
    engine = ["--deepspeed_config", str(HERE / "sat_trainer.json")]
    with sat_on_cpu():  # changes nothing where there is a GPU
        args = get_args([*DEFAULTS, *data, *engine, *sys.argv[1:]])
        if args.rank == 0 and args.train_data[0].startswith(str(DEFAULT_OUT)):
            make_captchas(DEFAULT_OUT)
        torch.distributed.barrier()
        model, args.base = load_cogvlm(BASE, device=args.device, model_parallel_size=args.model_parallel_size)
        add_lora(model, r=16, lora_alpha=32)  # 2
        image_size = tuple(args.base["eva_args"]["image_size"])
        with adapter_checkpoints():  # 3: saves of the adapter alone
            training_main(args, model, forward_step, create_dataset, collate_fn=partial(collate, image_size=image_size))


if __name__ == "__main__":
    main()

"""What an option is when nobody sets it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import sat_lora
from sat_lora.cogvlm.inputs.prompts import VERSIONS
from sat_lora.files.foreign import read_json
from sat_lora.training.settings.lora_options import lora_defaults

# The settings for a real CogVLM. None: found out later, as the comment says.
DEFAULTS = {
    "train_data": None,  # required, unless the embedded demo runs
    "valid_data": None,  # then a part of --train-data, by --split
    "test_data": None,  # then nothing is generated after training
    "split": [1.0],
    "prompt": "What is this?",
    "special_tokens_in_text": False,
    "ignore_keys": [],
    "images_from": [],
    "names_are_answers": False,
    "max_broken_share": 0.05,
    "max_pixels": 89_478_485,  # where Pillow warns of a decompression bomb
    "num_workers": 2,
    "from_pretrained": None,  # then the embedded demo
    "trust_checkpoint": False,
    "any_base": False,
    "local_tokenizer": None,  # then the --from_pretrained folder
    "version": "chat",  # unless the base's config names another, see `version_of`
    "max_length": 1288,
    **lora_defaults(),
    "lr": 1e-4,
    "train_iters": None,  # then --epochs; if that is None too, one epoch
    "epochs": None,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup": 0.01,
    "lr_decay_style": "cosine",
    "min_lr_ratio": 0.0,
    "weight_decay": 0.0,
    "clip_grad": 1.0,
    "skip_nonfinite": 0,
    "betas": [0.9, 0.95],  # no option of its own; a DeepSpeed config's `optimizer` section sets it
    "eps": 1e-8,  # the same
    "seed": 1234,
    "zero_stage": 2,
    "deepspeed_config": None,
    "model_parallel_size": 1,
    "bf16": False,  # with neither, bf16 on CUDA and fp32 on CPU
    "fp16": False,
    "checkpoint_activations": False,
    "vit_checkpoint_activations": False,
    "distributed_backend": None,  # then nccl on CUDA, gloo on CPU
    "local_rank": 0,
    "experiment_name": "finetune",
    "save": None,  # then runs
    "resume": None,
    "any_data": False,
    "overwrite": False,
    "save_interval": 200,
    "keep": 3,
    "eval_interval": 200,
    "eval_iters": 0,
    "eval_batch_size": None,  # then --batch-size
    "valid_metrics": [],
    "log_interval": 10,
    "doctor": False,
    "watchdog_limit": 120.0,
    "replay": None,
    "shrink": None,  # then the doctor builds the whole model
    "mode": "finetune",
    "use_lora": True,
    "resume_dataloader": True,
    "skip_init": True,
    "ignore_pad_token_for_loss": True,
    "deepspeed": True,
}

# They belong to one start of a run.
NOT_RESUMED = frozenset(
    {"resume", "overwrite", "any_data", "local_rank", "distributed_backend", "trust_checkpoint", "any_base"}
    | {"doctor", "shrink", "replay"}
)

EMBEDDED_DEMO = Path(sat_lora.__file__).resolve().parents[1] / "finetune_demo"


def embedded_base(demo_folder: str | Path) -> dict:
    """What replaces DEFAULTS without --from_pretrained, whatever the data: the tiny base and what goes with it."""
    return {
        "from_pretrained": str(Path(demo_folder) / "tiny_cogvlm"),
        "version": "base",
        "max_length": 64,
        "zero_stage": 0,
    }


def demo_defaults(demo_folder: str | Path) -> dict:
    """What replaces DEFAULTS for the demo's own data on that base: minutes on a CPU.

    demo_folder: the folder that holds `tiny_cogvlm/` and `captchas/{train,valid,test}`.
    """
    captchas = Path(demo_folder) / "captchas"
    return {
        "train_data": [str(captchas / "train")],
        "valid_data": [str(captchas / "valid")],
        "test_data": [str(captchas / "test")],
        "prompt": "CAPTCHA:",
        "experiment_name": "demo",
        "batch_size": 32,
        "train_iters": 700,
        "lr": 3e-3,
        "warmup": 30 / 700,
        "min_lr_ratio": 0.02,
        "betas": [0.9, 0.98],
        "eval_interval": 100,
        "save_interval": 350,
    }


def is_demo_data(paths: Sequence[str | Path], demo_folder: str | Path) -> bool:
    """Whether all of these paths are the demo's captchas."""
    captchas = (Path(demo_folder) / "captchas").resolve()
    return all(Path(path).resolve().is_relative_to(captchas) for path in paths)


def version_of(base: str | Path) -> str | None:
    """The prompt format that the config of a base names; None: it names none, or cannot be read.

    SAT's model_config.json says it as text_processor_version, Hugging Face's config.json as template_version, whose
    names mean other prompts.
    """
    keys: tuple[tuple[str, str, Mapping[str, str]], ...]
    keys = (("model_config.json", "text_processor_version", {}), ("config.json", "template_version", VERSIONS))
    for file, key, versions in keys:
        try:
            version = read_json(Path(base) / file).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if version is not None:
            return versions.get(str(version), str(version))
    return None

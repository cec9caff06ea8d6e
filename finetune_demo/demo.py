"""The demo: a tiny base and captchas that come with the scripts, and settings that suit them: minutes on a CPU."""

import sys
from pathlib import Path

from sat_lora.training.settings.demo import Demo

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "valid", "test")


def demo_in(folder: str | Path) -> Demo:
    """Return the demo whose base is FOLDER/tiny_cogvlm and whose images are in FOLDER/captchas/{train,valid,test}."""
    captchas = Path(folder) / "captchas"
    return Demo(
        base={
            "from_pretrained": str(Path(folder) / "tiny_cogvlm"),
            "version": "base",
            "max_length": 64,
            "zero_stage": 0,
        },
        own={
            **{f"{split}_data": [str(captchas / split)] for split in SPLITS},
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
        },
        data_folder=captchas,
        make_data=lambda: _make_captchas(captchas),
        data_hint="finetune_demo/make_captchas.py writes the demo's data",
    )


def _make_captchas(folder: Path) -> None:
    """Write the captchas into the folder."""
    sys.path.insert(0, str(HERE))
    from make_captchas import make_captchas

    make_captchas(folder)


DEMO = demo_in(HERE)

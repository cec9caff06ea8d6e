"""Fine-tune CogVLM with LoRA: `sat-lora train` as a script.

    deepspeed finetune_demo/finetune_cogvlm.py                      # the tiny base on captcha images; a CPU will do
    deepspeed --num_gpus 8 finetune_demo/finetune_cogvlm.py --from_pretrained cogvlm-base-490 --train-data my_images

`torchrun` and plain `python` start it just as well. `--help` lists the options.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Run as the options say, and return the exit status, see `sat_lora.commands.train`."""
    from sat_lora.commands.train import script_main

    return script_main(argv, __file__, _demo())


def _demo():
    """Return the demo, which lies beside this script."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    from demo import DEMO

    return DEMO


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(
            f"finetune_cogvlm.py: error: {error} for {sys.executable}; see Two commands in README.md", file=sys.stderr
        )
        sys.exit(2)
    run_script("finetune_cogvlm.py", main)

"""Compare a CogVLM base with base + adapter on images whose answers are known, by greedy generation.

    python finetune_demo/evaluate_cogvlm.py --run runs/demo            # what a run was trained and tested with
    deepspeed --num_gpus 8 finetune_demo/evaluate_cogvlm.py --from_pretrained BASE --adapter ADAPTER --test-data IMAGES

Several ranks share the images. Prints a table and writes it to --out, or into the run folder of the adapter as
evaluation.json; what is of another adapter, base or test data than the evaluation there goes to evaluation-2.json, ...
"""

import sys

NAME = "evaluate_cogvlm.py"


def main(argv: list[str] | None = None) -> int:
    """Evaluate, and return the exit status: 0, 2 for a mistake, 130 for Ctrl-C."""
    from sat_lora.commands.evaluate import run_evaluation
    from sat_lora.terminal.edge import run_command

    return run_command(NAME, lambda: run_evaluation(argv, NAME, __doc__))


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(f"{NAME}: error: {error} in {sys.executable}; README.md says how to install", file=sys.stderr)
        sys.exit(2)
    run_script(NAME, main)

"""Pack folders of images and files of samples into WebDataset tar shards: `sat-lora pack` as a script.

python finetune_demo/pack_shards.py my_images --out shards --samples-per-shard 1000
"""

import sys

NAME = "pack_shards.py"


def main(argv: list[str] | None = None) -> int:
    """Pack, and return the exit status: 0, 2 for a mistake, 130 for Ctrl-C."""
    from sat_lora.commands.pack import run_packing
    from sat_lora.terminal.edge import run_command

    return run_command(NAME, lambda: run_packing(argv, NAME))


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(f"{NAME}: error: {error} in {sys.executable}; README.md says how to install", file=sys.stderr)
        sys.exit(2)
    run_script(NAME, main)

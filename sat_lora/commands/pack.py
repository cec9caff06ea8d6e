"""`sat-lora pack`, which finetune_demo/pack_shards.py is as a script: samples as tar shards."""

import argparse
from pathlib import Path

from sat_lora.errors import DataError
from sat_lora.files.paths import missing_path, packed_shards
from sat_lora.printable import shell_line
from sat_lora.terminal.option_types import positive_int

NAME = "sat-lora pack"
ABOUT = "pack images and answers into tar shards"


def add(commands) -> None:
    """Add the command to the sub-parsers of `sat-lora`. It parses its options, --help among them, itself."""
    pack = commands.add_parser("pack", help=ABOUT, add_help=False, takes_more=True)
    pack.set_defaults(run_command=lambda options: run_packing(options.more), takes_more=True)


def build_parser(name: str = NAME) -> argparse.ArgumentParser:
    """Return the OptionParser of the program of that name."""
    from sat_lora.data.reading import Reading
    from sat_lora.terminal.option_parser import OptionParser
    from sat_lora.training.settings.config import KNOWN

    example = f"example: {name} images/ more.jsonl --out shards --samples-per-shard 1000"
    parser = OptionParser(prog=name, description="Pack images and answers into tar shards.", epilog=example)
    parser.add_argument("data", nargs="+", help="folders of images, or files of samples (json, csv, parquet)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    parser.add_argument("--samples-per-shard", type=positive_int, default=1000, metavar="N", help="(default: 1000)")
    for field in Reading.__dataclass_fields__:
        if field in KNOWN:
            KNOWN[field].add_to(parser)
    return parser


def run_packing(argv: list[str] | None, name: str = NAME) -> int:
    """Pack as the options say, and return 0. Raises a SatLoraError for a user's mistake.

    argv: the options; None takes those of the process. name: of the program, in its messages and help.
    """
    options = build_parser(name).parse_args(argv)
    _check_early(options)
    from sat_lora.data.samples import reading_options
    from sat_lora.data.shards.pack import pack_shards

    reading = reading_options(options)
    shards, samples = pack_shards(
        options.data, options.out, options.samples_per_shard, overwrite=options.overwrite, **reading
    )
    print(f"{samples} samples written; train with\n  --train-data {shell_line([shards])}")
    return 0


def _check_early(options: argparse.Namespace) -> None:
    """Raise, before anything slow is imported, DataError where data is not there, and ConfigError where shards are
    there that may not be replaced.
    """
    wanted = "give a folder of images or a .jsonl file"
    problems = [problem for path in options.data if (problem := missing_path(path, wanted))]
    if problems:
        raise DataError("\n".join(problems))
    packed_shards(Path(options.out), options.overwrite)

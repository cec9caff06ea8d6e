"""`sat-lora pack`, which finetune_demo/pack_shards.py is as a script: samples as tar shards."""

import argparse
from pathlib import Path

from sat_lora.commands.parts import examples
from sat_lora.errors import DataError
from sat_lora.files.paths import missing_path, packed_shards
from sat_lora.printable import shell_line
from sat_lora.terminal.option_types import positive_int

ABOUT = "pack images and answers into tar shards"
IGNORE_KEYS = "keys of records and turns to pass over"
READING = (
    "ignore_keys",
    "images_from",
    "names_are_answers",
    "columns",
    "data_format",
    "image_mark",
    "images_per_sample",
)
"""The options that `read_items` takes."""


def add(commands) -> None:
    """Add the command and its options to the sub-parsers of `sat-lora`."""
    example = "sat-lora pack images/ more.jsonl --out shards --samples-per-shard 1000"
    pack = commands.add_parser("pack", help=ABOUT, **examples(example))
    add_options(pack)
    pack.set_defaults(run_command=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of packing to a parser."""
    parser.add_argument("data", nargs="+", help="folders of images, or files of samples (json, csv, parquet)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    parser.add_argument("--samples-per-shard", type=positive_int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--ignore-keys", nargs="+", default=(), metavar="KEY", help=IGNORE_KEYS)
    parser.add_argument("--images-from", nargs="+", default=(), metavar="DIR", help="folders they may lead to by ..")
    parser.add_argument("--columns", nargs="+", default=(), metavar="OURS=THEIRS", help="such as prompt=question")
    parser.add_argument("--data-format", metavar="NAME", help="the layout, where it is not to be recognised")
    parser.add_argument("--image-mark", default="<image>", metavar="TEXT", help="what stands for an image in a text")
    parser.add_argument("--images-per-sample", type=positive_int, default=1, metavar="N", help="most (default: 1)")
    names = "of folders file names are the answers, whatever texts lie in or beside them"
    parser.add_argument("--names-are-answers", action="store_true", help=names)


def run(options: argparse.Namespace) -> int:
    """Pack as the options say, and return 0. Raises a SatLoraError for a user's mistake."""
    _check_early(options)
    from sat_lora.data.shards.pack import pack_shards

    reading = {name: getattr(options, name) for name in READING}
    reading["overwrite"] = options.overwrite
    shards, samples = pack_shards(options.data, options.out, options.samples_per_shard, **reading)
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

"""Pack folders of images and files of samples into WebDataset tar shards.

python finetune_demo/pack_shards.py my_images --out shards --samples-per-shard 1000
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

READING = ("ignore_keys", "images_from", "names_are_answers", "columns", "data_format", "image_mark")
"""The options that `read_items` takes."""


def pack_shards(
    data: Sequence[str | Path],
    out: str | Path,
    samples_per_shard: int = 1000,
    *,
    overwrite: bool = False,
    **reading: Sequence[str] | bool,
) -> tuple[str, int]:
    """Write the items of `data`, in their order, and return (what --train-data takes, how many samples).

    A sample is KEY.json {"prompt", "answer"}, with its turns before, and the image's file as it is, with its own
    suffix, or with that of its format where it has none that is known. What is in `out` is as it was until all shards
    are written. reading: further arguments of `read_items`. Raises DataError where an image is missing, or is no file,
    or there is nothing to pack; ConfigError where `out` holds shards, which stay unless `overwrite` replaces all of
    them.
    """
    from sat_lora.data.samples import read_items
    from sat_lora.errors import DataError
    from sat_lora.printable import printable

    out = Path(out)
    before = _shards_in(out, overwrite)
    items = read_items(data, **reading)
    if not items:
        raise DataError(f"{printable(', '.join(map(str, data)))}: no samples there, so there is nothing to pack")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as draft:
        _write(items, Path(draft), samples_per_shard)
        for path in before:
            path.unlink()
        for path in sorted(Path(draft).iterdir()):
            path.rename(out / path.name)
    last = (len(items) - 1) // samples_per_shard
    numbers = f"{{000000..{last:06d}}}" if last else "000000"
    return str(out / f"shard-{numbers}.tar"), len(items)


def _write(items: Sequence, folder: Path, samples_per_shard: int) -> None:
    """Write the items as shards into the folder. Raises DataError where an image cannot be read."""
    from webdataset import ShardWriter  # seconds of imports, that a wrong option does without

    from sat_lora.cogvlm.inputs.pictures import SUFFIXES, suffix_of
    from sat_lora.errors import DataError
    from sat_lora.printable import printable

    with ShardWriter(str(folder / "shard-%06d.tar"), maxcount=samples_per_shard, maxsize=1e12, verbose=0) as writer:
        for number, item in enumerate(items):
            if item.more_images:
                raise DataError(f"{printable(item.place)}: several images; a sample of a shard has one")
            texts = {"answer": item.answer, **({"prompt": item.prompt} if item.prompt is not None else {})}
            turns = {name: value for name in ("history", "system") if (value := getattr(item, name))}
            unicode = json.dumps({**texts, **turns}, ensure_ascii=False)
            content = (unicode if _is_unicode(unicode) else json.dumps({**texts, **turns})).encode()
            sample = {"__key__": f"{number:09d}", "json": content}
            if item.image is not None:
                content = _content(item)
                suffix = item.image.suffix.lower() if isinstance(item.image, Path) else ""
                sample[(suffix if suffix in SUFFIXES else suffix_of(content))[1:]] = content
            writer.write(sample)


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can write a text. Half a character it cannot: that is packed as it was escaped, and left to
    whoever reads it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(item) -> bytes:
    """Return the bytes of an item's image. Raises DataError where it cannot be read."""
    from sat_lora.cogvlm.inputs.pictures import file_limit
    from sat_lora.data.samples import picture_content
    from sat_lora.errors import DataError
    from sat_lora.files.foreign import read_bytes
    from sat_lora.printable import printable

    try:
        content = picture_content(item.image)
        return content if isinstance(content, bytes) else read_bytes(content, file_limit())
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        shown = printable(item.name or item.image)
        raise DataError(f"{shown}: cannot be packed: {problem}; mend the file or the path") from error


def main(argv: list[str] | None = None) -> int:
    """Pack, and return the exit status: 0, 2 for a mistake, 130 for Ctrl-C."""
    from sat_lora.terminal.edge import run_command

    return run_command("pack_shards.py", lambda: _pack(argv))


def build_parser():
    """Return the OptionParser of this script."""
    from sat_lora.terminal.option_parser import OptionParser
    from sat_lora.terminal.option_types import positive_int

    parser = OptionParser(
        prog="pack_shards.py",
        description="Pack images and answers into tar shards.",
        epilog="example: python finetune_demo/pack_shards.py images/ more.jsonl --out shards --samples-per-shard 1000",
    )
    parser.add_argument("data", nargs="+", help="folders of images, or files of samples (json, csv, parquet)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    parser.add_argument("--samples-per-shard", type=positive_int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--ignore-keys", nargs="+", default=(), metavar="KEY", help="keys of .jsonl lines to pass over")
    parser.add_argument("--images-from", nargs="+", default=(), metavar="DIR", help="folders they may lead to by ..")
    parser.add_argument("--columns", nargs="+", default=(), metavar="OURS=THEIRS", help="such as prompt=question")
    parser.add_argument("--data-format", metavar="NAME", help="the layout, where it is not to be recognised")
    parser.add_argument("--image-mark", default="<image>", metavar="TEXT", help="what stands for an image in a text")
    names = "of folders file names are the answers, whatever texts lie in or beside them"
    parser.add_argument("--names-are-answers", action="store_true", help=names)
    return parser


def _pack(argv: list[str] | None) -> int:
    """Pack as the options say, and return the exit status. Raises a SatLoraError for a user's mistake."""
    from sat_lora.printable import shell_line

    options = build_parser().parse_args(argv)
    _check_early(options)
    reading = {name: getattr(options, name) for name in READING}
    reading["overwrite"] = options.overwrite
    shards, samples = pack_shards(options.data, options.out, options.samples_per_shard, **reading)
    print(f"{samples} samples written; train with\n  --train-data {shell_line([shards])}")
    return 0


def _check_early(options: argparse.Namespace) -> None:
    """Raise, before anything slow is imported, DataError where data is not there, and ConfigError where shards are
    there that may not be replaced.
    """
    from sat_lora.errors import DataError
    from sat_lora.files.paths import missing_path

    wanted = "give a folder of images or a .jsonl file"
    problems = [problem for path in options.data if (problem := missing_path(path, wanted))]
    if problems:
        raise DataError("\n".join(problems))
    _shards_in(Path(options.out), options.overwrite)


def _shards_in(out: Path, overwrite: bool) -> list[Path]:
    """Return the shards that are in `out` already, in order. Raises ConfigError where nothing may replace them."""
    from sat_lora.errors import ConfigError
    from sat_lora.printable import printable

    shards = sorted(out.glob("shard-[0-9]*.tar"))
    if shards and not overwrite:
        count = f"{len(shards)} shard{'s' * (len(shards) > 1)}"
        raise ConfigError(
            f"--out: {printable(out)} holds {count} ({printable(shards[0].name)}, ...); nothing was changed. Give "
            "another folder, or replace them (--overwrite)"
        )
    return shards


if __name__ == "__main__":
    try:
        from sat_lora.terminal.edge import run_script
    except ModuleNotFoundError as error:
        print(f"pack_shards.py: error: {error} in {sys.executable}; README.md says how to install", file=sys.stderr)
        sys.exit(2)
    run_script("pack_shards.py", main)

"""Pack folders of images LABEL.png and .jsonl files into WebDataset tar shards.

python finetune_demo/pack_shards.py my_images --out shards --samples-per-shard 1000
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from webdataset import ShardWriter

from sat_lora.cogvlm.pictures import SUFFIXES, file_limit, suffix_of
from sat_lora.errors import DataError, SatLoraError
from sat_lora.foreign import printable, read_bytes
from sat_lora.training.data import read_items
from sat_lora.training.option_types import positive_int


def pack_shards(data: Sequence[str | Path], out: str | Path, samples_per_shard: int = 1000) -> tuple[str, int]:
    """Write the items of `data`, in their order; returns (what --train-data takes, samples).

    A sample is KEY.json {"prompt", "answer"} and the image's file as it is, with its own suffix, or with that of its
    format where it has none that is known. DataError: an image is missing, or is no file.
    """
    items, out = read_items(data), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    last = max(0, (len(items) - 1) // samples_per_shard)
    with ShardWriter(str(out / "shard-%06d.tar"), maxcount=samples_per_shard, maxsize=1e12, verbose=0) as writer:
        for number, item in enumerate(items):
            texts = {"answer": item.answer, **({"prompt": item.prompt} if item.prompt is not None else {})}
            sample = {"__key__": f"{number:09d}", "json": json.dumps(texts).encode()}
            if item.image is not None:
                content = _content(item.image)
                suffix = item.image.suffix.lower()
                sample[(suffix if suffix in SUFFIXES else suffix_of(content))[1:]] = content
            writer.write(sample)
    numbers = f"{{000000..{last:06d}}}" if last else "000000"
    return str(out / f"shard-{numbers}.tar"), len(items)


def _content(image: Path) -> bytes:
    try:
        return read_bytes(image, file_limit())
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(f"{printable(image)}: cannot be packed: {problem}; mend the file or the path") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Pack images and answers into tar shards.",
        epilog="example: python finetune_demo/pack_shards.py images/ more.jsonl --out shards --samples-per-shard 1000",
    )
    parser.add_argument("data", nargs="+", help="folders of images LABEL.png, or .jsonl files")
    parser.add_argument("--out", required=True, help="folder of the shards; those of the same number are replaced")
    parser.add_argument("--samples-per-shard", type=positive_int, metavar="N", default=1000, help="(default: 1000)")
    options = parser.parse_args(argv)
    try:
        shards, samples = pack_shards(options.data, options.out, options.samples_per_shard)
    except (SatLoraError, OSError) as error:
        print(f"pack_shards.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{samples} samples written; train with\n  --train-data '{shards}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())

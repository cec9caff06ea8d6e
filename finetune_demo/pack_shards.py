"""Pack folders of images LABEL.png and .jsonl files into WebDataset tar shards.

python finetune_demo/pack_shards.py my_images --out shards --samples-per-shard 1000
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from webdataset import ShardWriter

from sat_lora.errors import SatLoraError
from sat_lora.training.data import read_items


def pack_shards(
    data: Sequence[str | Path], out: str | Path, samples_per_shard: int = 1000, **reading: Sequence[str]
) -> tuple[str, int]:
    """Write the items of `data`, in their order; returns (what --train-data takes, samples). reading: of `read_items`.

    A sample is KEY.json {"prompt", "answer"} and the image's file as it is, with its own suffix.
    """
    items, out = read_items(data, **reading), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    last = max(0, (len(items) - 1) // samples_per_shard)
    with ShardWriter(str(out / "shard-%06d.tar"), maxcount=samples_per_shard, maxsize=1e12, verbose=0) as writer:
        for number, item in enumerate(items):
            texts = {"answer": item.answer, **({"prompt": item.prompt} if item.prompt is not None else {})}
            content = json.dumps(texts, ensure_ascii=not all(map(_is_unicode, texts.values()))).encode()
            sample = {"__key__": f"{number:09d}", "json": content}
            if item.image is not None:
                sample[item.image.suffix[1:].lower()] = item.image.read_bytes()
            writer.write(sample)
    numbers = f"{{000000..{last:06d}}}" if last else "000000"
    return str(out / f"shard-{numbers}.tar"), len(items)


def _is_unicode(text: str) -> bool:
    """Half a character is none: it is packed as it was escaped, and left to who reads it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Pack images and answers into tar shards.",
        epilog="example: python finetune_demo/pack_shards.py images/ more.jsonl --out shards --samples-per-shard 1000",
    )
    parser.add_argument("data", nargs="+", help="folders of images LABEL.png, or .jsonl files")
    parser.add_argument("--out", required=True, help="folder of the shards; those of the same number are replaced")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--ignore-keys", nargs="+", default=(), metavar="KEY", help="keys of .jsonl lines to pass over")
    parser.add_argument("--images-from", nargs="+", default=(), metavar="DIR", help="folders they may lead to by ..")
    options = parser.parse_args(argv)
    reading = dict(ignore_keys=options.ignore_keys, images_from=options.images_from)
    try:
        shards, samples = pack_shards(options.data, options.out, options.samples_per_shard, **reading)
    except (SatLoraError, OSError) as error:
        print(f"pack_shards.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{samples} samples written; train with\n  --train-data '{shards}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Small pictures of every format and tar shards with seeded damage: each is read, or is a DataError.

python -m tests.cases.mutated_pictures --times 10000
"""

import argparse
import io
import random
import resource
import tarfile
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy
from PIL import Image, ImageCms

from sat_lora import DataError
from sat_lora.cogvlm.inputs.pictures import read_picture
from sat_lora.data.samples import BrokenSample
from sat_lora.data.shards.shards import find_records
from tests.support.picture_files import encoded

SECONDS = 5.0  # of processor time, for one small file
MAX_PIXELS = 1 << 20
_NUMBERS = (0, 1, 7, 127, 128, 255, 256, 32767, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


@cache
def pictures() -> dict[str, bytes]:
    """Small sound pictures, by a name that tells format and kind."""
    noise = numpy.random.default_rng(0).integers(0, 256, (23, 31, 4), dtype=numpy.uint8)
    rgba, rgb = Image.fromarray(noise), Image.fromarray(noise[:, :, :3])
    grey, deep = rgb.convert("L"), Image.fromarray(noise[:, :, 0].astype(numpy.uint16) * 257)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {f"{kind} rgb": encoded(rgb, kind) for kind in "PNG JPEG BMP DIB TIFF PPM GIF PCX SGI TGA QOI".split()}
    made |= {f"{kind} rgba": encoded(rgba, kind) for kind in ("PNG", "TIFF", "TGA", "QOI", "WEBP", "GIF")}
    made |= {f"{kind} deep": encoded(deep, kind) for kind in ("PNG", "TIFF", "PPM")}
    made |= {f"{kind} one bit": encoded(grey.convert("1"), kind) for kind in ("PNG", "TIFF", "PPM", "BMP")}
    made |= {f"TIFF {name}": encoded(rgb, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")}
    more = dict(icc_profile=profile, exif=turned)
    made |= {f"{kind} profile": encoded(rgb, kind, **more) for kind in ("PNG", "JPEG", "WEBP")}
    made |= {f"{kind} film": encoded(rgb, kind, save_all=True, append_images=[rgb]) for kind in ("GIF", "PNG", "MPO")}
    made["ICO"] = encoded(rgba.resize((16, 16)), "ICO", sizes=[(16, 16)])
    made["JPEG CMYK"] = encoded(rgb.convert("CMYK"), "JPEG", progressive=True)
    made["PNG palette"] = encoded(rgb.quantize(16), "PNG", transparency=3)
    made["TIFF float"] = encoded(Image.fromarray(noise[:, :, 0].astype(numpy.float32)), "TIFF")
    made["TIFF LAB"] = encoded(Image.frombytes("LAB", rgb.size, rgb.tobytes()), "TIFF")
    for kind in ("JPEG2000", "AVIF"):
        if kind in Image.SAVE:
            made[kind] = encoded(rgb, kind)
    return made


@cache
def shards() -> dict[str, bytes]:
    """Small sound tar shards of every kind of header."""
    picture, made = encoded(Image.new("RGB", (5, 5)), "PNG"), {}
    for kind, name in ((tarfile.USTAR_FORMAT, "ustar"), (tarfile.GNU_FORMAT, "gnu"), (tarfile.PAX_FORMAT, "pax")):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=kind) as tar:
            long = "" if kind == tarfile.USTAR_FORMAT else "long/" * 30
            for number in range(3):
                for suffix, data in (("png", picture), ("json", b'{"answer": "7", "prompt": "which?"}')):
                    info = tarfile.TarInfo(f"{long}é{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            for link, target in ((tarfile.LNKTYPE, f"{long}é0.png"), (tarfile.SYMTYPE, "é1.png")):
                info = tarfile.TarInfo(f"{long}{int(link)}.png")
                info.type, info.linkname = link, target
                tar.addfile(info)
                info = tarfile.TarInfo(f"{long}{int(link)}.txt")
                info.size = 1
                tar.addfile(info, io.BytesIO(b"7"))
        made[name] = content.getvalue().rstrip(b"\0") + b"\0" * 1024
    return made


def mutated(content: bytes, generator: random.Random) -> bytes:
    """`content` with one to four mutations, half of them in its first bytes, where headers are."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        size = len(content)
        start = generator.randrange(max(1, min(size, generator.choice([32, 160, 700, size, size]))))
        stop = min(size, start + generator.randint(1, 40))
        match generator.choice("flip byte number number cut remove insert repeat zeros word".split()):
            case "flip" if start < size:
                content[start] ^= 1 << generator.randrange(8)
            case "byte":
                content[start : start + 1] = generator.randbytes(1)
            case "number":
                width = generator.choice([1, 2, 4])
                value = generator.choice(_NUMBERS) & ((1 << 8 * width) - 1)
                content[start : start + width] = value.to_bytes(width, generator.choice(["big", "little"]))
            case "cut" if generator.random() < 0.3:
                del content[start:]
            case "remove":
                del content[start:stop]
            case "insert":
                content[start:start] = generator.randbytes(stop - start)
            case "repeat":
                content[start:start] = content[start:stop] * generator.randint(1, 3)
            case "zeros":
                content[start:stop] = bytes(stop - start)
            case "word":
                words = (b"777777777777", b"-0000000001", b"99999999999999999999", b"\xff" * 12, b"[" * 300, b"../" * 9)
                word = generator.choice(words)
                content[start : start + len(word)] = word
    return bytes(content)


def with_right_sums(content: bytes) -> bytes:
    """A tar file whose headers, where each used to begin, have the sum of their bytes again: past the first check."""
    content = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        if content[start + 257 : start + 262] == b"ustar":
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content)


def count_outcomes(times: int, seed: int, folder: Path) -> Counter:
    """How many mutated files were read or refused, by kind; AssertionError: anything else, or one that took long."""
    generator, outcomes = random.Random(seed), Counter()
    sources = [*(("picture", *item) for item in pictures().items()), *(("shard", *item) for item in shards().items())]
    sources += sources[-3:] * 4
    for number in range(times):
        kind, name, content = sources[number % len(sources)]
        content = mutated(content, generator)
        if kind == "shard" and generator.random() < 0.8:
            content = with_right_sums(content)
        started = time.process_time()
        try:
            outcome = _read(content) if kind == "picture" else _read_shard(content, folder / "mutated.tar")
        except DataError as error:
            outcome = "refused"
            if not str(error).isprintable():
                raise AssertionError(f"mutation {number} of seed {seed}, {name}: {str(error)!r}") from error
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}, {name}: {error!r}") from error
        taken = time.process_time() - started
        if taken > SECONDS:
            raise AssertionError(f"mutation {number} of seed {seed}, {name}: took {taken:.1f} s")
        outcomes[f"{kind} {outcome}"] += 1
    return outcomes


def _read(content: bytes) -> str:
    picture = read_picture(content, max_pixels=MAX_PIXELS, name="mutated")
    if picture.mode != "RGB" or picture.width * picture.height > MAX_PIXELS:
        raise AssertionError(f"{picture.mode}, {picture.size}")
    return "read"


def _read_shard(content: bytes, path: Path) -> str:
    path.write_bytes(content)
    for record in find_records(str(path)):
        item = record.read(MAX_PIXELS)
        is_read = not isinstance(item, BrokenSample) and item.image is not None
        if is_read and item.image not in content:
            raise AssertionError(f"{item.name}: an image that is not in the shard")
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(count_outcomes(options.times, options.seed, Path(folder))))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()

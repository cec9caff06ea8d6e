"""Write the demo's captchas: OUT/{train,valid,test}/NNN/STRING.png, 112 x 112 pixels, three digits each.

The file's stem is the label, as in the published CAPTCHA data; the folders NNN are there because a string has several
images. No string of one set appears in another, so the test asks for reading, not for recognising.
"""

import argparse
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pool
from pathlib import Path

import captcha.image
from PIL import Image
from tqdm import tqdm

DEFAULT_OUT = Path(__file__).resolve().parent / "captchas"
IMAGES = {"train": 8000, "valid": 200, "test": 500}
STRINGS = {"train": 850, "valid": 50, "test": 100}
SIZE = 112


class Captcha(captcha.image.ImageCaptcha):
    """Three large digits side by side, turned by up to 20 degrees; dots, curve and warp as the package has them."""

    character_rotate = (-20, 20)
    word_space_probability = 1.0  # no random spaces
    word_offset_dx = 0.1  # little overlap

    def __init__(self) -> None:
        super().__init__(width=SIZE, height=SIZE, font_sizes=(50, 56))


class SeededDraws:
    """A stand-in for the module `secrets`, with the functions that captcha 0.7 draws with, from a seeded generator."""

    def __init__(self, seed: str):
        rng = random.Random(seed)
        self.choice = rng.choice
        self.randbits = rng.getrandbits
        self.randbelow = rng.randrange


@contextmanager
def seeded_draws(seed: str) -> Iterator[None]:
    """Make the captcha package repeatable: it (0.7.1) draws from the operating system and takes no seed."""
    secrets = captcha.image.secrets
    captcha.image.secrets = SeededDraws(seed)
    try:
        yield
    finally:
        captcha.image.secrets = secrets


def draw_captcha(text: str, seed: str) -> Image.Image:
    """Return the (112, 112) RGB captcha of a string; the same for the same seed."""
    with seeded_draws(seed):
        return Captcha().generate_image(text).convert("RGB")


def split_strings(seed: int) -> dict[str, list[str]]:
    """Return the strings of the three sets by their names: all strings of three digits, shuffled and dealt."""
    strings = [f"{number:03d}" for number in range(1000)]
    random.Random(f"{seed} strings").shuffle(strings)
    strings_by_set = {}
    start = 0
    for name, count in STRINGS.items():
        strings_by_set[name] = strings[start : start + count]
        start += count
    return strings_by_set


def plan(name: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Return (path below OUT, seed) of each image of one set: all its strings once in 000, once more in 001, and so on.

    An image's seed comes from its path, so neither the other images nor the number of workers change it.
    """
    strings = split_strings(seed)[name]
    paths = (f"{name}/{i // len(strings):03d}/{strings[i % len(strings)]}.png" for i in range(count))
    return [(path, f"{seed} {path}") for path in paths]


def _write(job: tuple[Path, str]) -> None:
    """Write the captcha of a (file, seed)."""
    file, seed = job
    draw_captcha(file.stem, seed).save(file, compress_level=1)  # speed, not size


def make_captchas(
    out: str | Path = DEFAULT_OUT,
    *,
    train: int = IMAGES["train"],
    valid: int = IMAGES["valid"],
    test: int = IMAGES["test"],
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Write that many images of each set, unless `out` exists, and return `out`. A folder that exists is complete.

    workers: processes; None takes one per core.
    """
    out = Path(out)
    if out.exists():
        print(f"captchas: already at {out}")
        return out
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    counts = {"train": train, "valid": valid, "test": test}
    jobs = [(partial / path, key) for name, count in counts.items() for path, key in plan(name, count, seed)]
    try:
        for folder in sorted({file.parent for file, _ in jobs}):
            folder.mkdir(parents=True)
        with Pool(workers or os.cpu_count()) as pool:
            written = pool.imap_unordered(_write, jobs, chunksize=32)
            for _ in tqdm(written, total=len(jobs), desc="captchas", unit=" images", disable=None):
                pass
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"captchas: {', '.join(f'{count} {name}' for name, count in counts.items())} at {out}")
    return out


def main(argv: list[str] | None = None) -> int:
    """Write the captchas, and return the exit status: 0, 2 for a mistake, 130 for Ctrl-C."""
    from sat_lora.terminal.edge import run_command

    return run_command("make_captchas.py", lambda: _make(argv))


def _make(argv: list[str] | None) -> None:
    """Write the captchas that the options ask for."""
    texts = dict(description="Write the demo's captchas.", out="folder to write; nothing happens if it exists")
    make_captchas(**options_of(argv, "make_captchas.py", DEFAULT_OUT, **texts))


def options_of(argv: list[str] | None, prog: str, default_out: Path, *, description: str, out: str) -> dict:
    """Return the options of a program that makes captchas, by name: those of `make_captchas`.

    description, out: of the program and of --out, in its help.
    """
    from sat_lora.terminal.option_parser import OptionParser
    from sat_lora.terminal.option_types import count, number, positive_int

    parser = OptionParser(
        prog=prog,
        description=description,
        epilog=f"example: python finetune_demo/{prog} --out mine --train 2000 --seed 1",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=default_out, help=out)
    for name, images in IMAGES.items():
        parser.add_argument(f"--{name}", type=count, default=images, help=f"of the {STRINGS[name]} {name} strings")
    parser.add_argument("--seed", type=number(int, "a whole number"), default=0, help="of every draw")
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count(), help="processes; no image depends on them"
    )
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    from sat_lora.terminal.edge import run_script

    run_script("make_captchas.py", main)

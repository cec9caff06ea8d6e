"""Adapter files with seeded damage, loaded one after the other: each loads, or is an AdapterError and no harm done.

python -m tests.support.mutated_adapters --times 10000
"""

import argparse
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from sat_lora import AdapterError, load_adapter
from sat_lora.adapters.save_load import read_adapter
from tests.support.adapter_folders import CONFIG, WEIGHTS, assert_unchanged, snapshot, write_tiny_adapter
from tests.support.tiny import tiny_model

# What a random byte hardly ever makes.
WORDS = [
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"1e300", b"9" * 400, b"null", b"true", b'""', b"[]", b"{}", b'"q"'),
    *(b"F16", b"F64", b"I32", b"F4", b"F8_E4M3", b"C64", b"BOOL", b"9223372036854775808", b"[" * 3000, b"\\ud800"),
]


def mutated(content: bytes, generator: random.Random) -> bytes:
    """`content` with one to three mutations, half of them in the first kilobytes, where text is."""
    for _ in range(generator.randint(1, 3)):
        size = len(content)
        reach = generator.choice([8, 200, 4000, size, size, size])
        start = generator.randrange(max(1, min(size, reach)))
        stop = min(size, start + generator.randint(1, 40))
        piece = content[start:stop]
        kind = generator.choice(["flip", "byte", "cut", "remove", "insert", "repeat", "swap", "word", "number"])
        if kind == "flip" and piece:
            content = content[:start] + bytes([piece[0] ^ 1 << generator.randrange(8)]) + content[start + 1 :]
        elif kind == "byte":
            content = content[:start] + generator.randbytes(1) + content[start + 1 :]
        elif kind == "cut":
            content = content[:start]
        elif kind == "remove":
            content = content[:start] + content[stop:]
        elif kind == "insert":
            content = content[:start] + generator.randbytes(stop - start) + content[start:]
        elif kind == "repeat":
            content = content[:stop] + piece + content[stop:]
        elif kind == "swap":
            content = content[:start] + piece[::-1] + content[stop:]
        else:
            content = _with_word(content, start, generator, digits=kind == "number")
    return content


def _with_word(content: bytes, start: int, generator: random.Random, *, digits: bool) -> bytes:
    """One of WORDS in place of the next value, or of the next number, of JSON."""
    wanted = b"0123456789" if digits else b'0123456789"tfn['
    first = next((i for i in range(start, min(len(content), start + 500)) if content[i] in wanted), start)
    last = next((i for i in range(first + 1, min(len(content), first + 100)) if content[i] in b',]}\n":'), first)
    return content[:first] + generator.choice(WORDS) + content[last:]


def count_outcomes(folder: Path, pristine: Path, times: int, seed: int = 0) -> Counter:
    """How many mutated copies of `pristine`, in `folder`, loaded or were refused; AssertionError: anything else."""
    generator, outcomes = random.Random(seed), Counter()
    model = tiny_model()
    before = snapshot(model)
    originals = {name: (pristine / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    for number in range(times):
        spoiled = generator.choice([WEIGHTS, CONFIG])
        for name, content in originals.items():
            (folder / name).write_bytes(mutated(content, generator) if name == spoiled else content)
        start = time.process_time()
        try:
            try:
                load_adapter(model, folder)
            finally:
                if time.process_time() - start > 1:
                    outcomes["took over a second"] += takes_over_a_second(folder)
        except AdapterError as error:
            outcomes["refused"] += 1
            if str(folder) not in str(error):
                raise AssertionError(f"mutation {number}: the message names no file: {error}") from error
            assert_unchanged(model, before)
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {error!r} instead of an AdapterError") from error
        else:
            outcomes["loaded"] += 1
            check_loaded(folder)
            model = tiny_model()
    return outcomes


def takes_over_a_second(folder: Path) -> bool:
    """Whether loading takes so much processor time once more: at first, the process may have paid for another thing."""
    model = tiny_model()
    start = time.process_time()
    with suppress(Exception):  # it has been seen
        load_adapter(model, folder)
    return time.process_time() - start > 1


def check_loaded(folder: Path) -> None:
    """What loaded is finite."""
    saved = read_adapter(folder)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in saved.tensors.values()):
        raise AssertionError(f"{folder}: loaded with values that are not finite")
    if not all(math.isfinite(entry.scale) for entry in saved.layers.values()):
        raise AssertionError(f"{folder}: loaded with a scale that is not finite")


def main() -> None:
    from sat_lora.parallel.distributed import init_distributed, init_model_parallel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    init_model_parallel(init_distributed())
    folder = Path(tempfile.mkdtemp())
    try:
        pristine = write_tiny_adapter(folder / "pristine")
        (folder / "mutated").mkdir()
        print(dict(count_outcomes(folder / "mutated", pristine, options.times, options.seed)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

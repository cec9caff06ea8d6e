"""`kill -9` at random instants of saving: afterwards the old adapter or the new one loads, and the next save cleans up.

    python -m tests.support.kill_saving --times 200

A child saves two adapters in turn, without end; its parent kills it after a random part of two saves.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from sat_lora.adapters.format import SavedAdapter, write_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.lora.config import LoraConfig
from tests.support.ranks import process_context

CONTENTS = (1, 2)


def adapter_of(content: int) -> SavedAdapter:
    """An adapter of 4 MiB whose every value is `content`."""
    tensors = {f"layer{n}.weight": torch.full((256, 1024), float(content)) for n in range(4)}
    return SavedAdapter(LoraConfig(seed=content), str(content), {}, tuple(tensors), tensors)


def content_of(folder: Path) -> int:
    """Which of the two it is. AdapterError: unreadable; AssertionError: parts of both."""
    saved = read_adapter(folder)
    values = {float(value) for tensor in saved.tensors.values() for value in tensor.unique()}
    if values != {float(saved.config.seed)} or saved.base_fingerprint != str(saved.config.seed):
        raise AssertionError(f"{folder}: weights {values} beside the config of {saved.config.seed}")
    return saved.config.seed


def save_without_end(folder: str, ready) -> None:
    """Tell the seconds of one save once the first two are there, then go on until killed."""
    torch.set_num_threads(1)
    adapters = [adapter_of(content) for content in CONTENTS]
    start = time.perf_counter()
    for adapter in adapters:
        write_adapter(folder, adapter)
    ready.send((time.perf_counter() - start) / 2)
    while True:
        for adapter in adapters:
            write_adapter(folder, adapter)


def kill_saves(folder: Path, times: int, seed: int = 0) -> Counter:
    """Kill `times` writers of folder/adapter. Counts what was there then, and what was found beside it."""
    generator, found = random.Random(seed), Counter()
    context = process_context()
    target = folder / "adapter"
    for _ in range(times):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_without_end, args=(str(target), sender), daemon=True)
        process.start()
        sender.close()
        try:
            seconds = receiver.recv()
            time.sleep(generator.uniform(0, 2 * seconds))
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        found[f"adapter {content_of(target)}"] += 1
        found["leftovers"] += os.listdir(folder) != [target.name]
        write_adapter(target, adapter_of(CONTENTS[0]))
        if os.listdir(folder) != [target.name] or content_of(target) != CONTENTS[0]:
            raise AssertionError(f"after one more save: {os.listdir(folder)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        print(dict(kill_saves(folder, options.times, options.seed)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""What a run needs to go on where it stopped: DeepSpeed's state of the adapters, and every rank's random state."""

import random
import shutil
from pathlib import Path

import numpy
import torch

from sat_lora.errors import CheckpointError


def save_checkpoint(engine, folder: Path, step: int) -> None:
    """Optimizer, adapters and random states after `step` steps; the base is not in it. Every rank has to call it.

    Only the newest is kept; it is removed after the new one and its `latest` pointer are there.
    """
    tag = str(step)
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, exclude_frozen_parameters=True)
    rank = torch.distributed.get_rank()
    torch.save(_random_state(), folder / tag / f"random_state_rank_{rank:05d}.pt")
    torch.distributed.barrier()
    if rank == 0:
        for old in folder.iterdir():
            if old.is_dir() and old.name != tag:
                shutil.rmtree(old)


def load_checkpoint(engine, folder: Path) -> int:
    """Continue from the newest checkpoint in `folder`; returns the number of steps done."""
    latest = folder / "latest"
    if not latest.is_file():
        raise CheckpointError(f"--resume: {folder} holds no checkpoint (no `latest`); was --save-interval reached?")
    tag = latest.read_text(encoding="utf-8").strip()
    path, state = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    if path is None:
        found = ", ".join(sorted(file.name for file in (folder / tag).glob("*"))) or "nothing"
        raise CheckpointError(f"--resume: DeepSpeed cannot read {folder / tag}; found there: {found}")
    own = folder / tag / f"random_state_rank_{torch.distributed.get_rank():05d}.pt"
    if own.is_file():
        _set_random_state(torch.load(own, weights_only=True))
    return state["step"]


def _random_state() -> dict:
    kind, keys, *rest = numpy.random.get_state()
    numpy_state = (kind, torch.from_numpy(keys.astype(numpy.int64)), *rest)  # a tensor loads without unpickling numpy
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

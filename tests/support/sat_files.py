"""SAT checkpoints as SAT itself would write them."""

from pathlib import Path

import torch

FILE = "mp_rank_{:02d}_model_states.pt"


def write_step(folder: Path, *contents, step: str = "3000") -> None:
    """The files of one step as SAT names them, one per model-parallel rank."""
    (folder / step).mkdir(parents=True, exist_ok=True)
    for rank, content in enumerate(contents):
        torch.save(content, folder / step / FILE.format(rank))
    (folder / "latest").write_text(step)


def cut_by_sat(model: torch.nn.Module, size: int) -> list[dict]:
    """The state dict of each of `size` ranks: cut by SAT's own `partition`, layer by layer, as its `mp_split` does."""
    shards = [dict(model.state_dict()) for _ in range(size)]
    for name, module in model.named_modules():
        if hasattr(module, "partition"):
            weights, biases = module.partition(size)
            for rank, shard in enumerate(shards):
                shard[f"{name}.weight"] = weights[rank]
                if biases:
                    shard[f"{name}.bias"] = biases[rank]
    return shards

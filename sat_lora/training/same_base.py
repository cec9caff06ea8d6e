"""The base of a run: the same on every rank, and on a resumed run the one that it was trained on."""

from pathlib import Path

import torch

from sat_lora.adapters.read import base_of_adapter
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.errors import AdapterError, CheckpointError
from sat_lora.lora.base_identity import BaseIdentity
from sat_lora.parallel.distributed import gather_lists, run_on_all_ranks
from sat_lora.training.settings.config import TrainConfig


def base_of_run(config: TrainConfig, before: BaseIdentity | None = None) -> BaseIdentity:
    """Return which base --from_pretrained is. Every rank has to call it; each reads some values of every tensor.

    before: the base of the run to resume, as the checkpoint has it; None: as its adapter has it. Raises
    CheckpointError on every rank where a rank's files hold another base than rank 0's, or the base is not the one of
    the run to resume, and --any-base was not given.
    """
    base = run_on_all_ranks(lambda: BaseWeights(config.model.base, trust=config.start.trust_checkpoint).identity)
    run_on_all_ranks(_refuse_other_than_first, base, config.model.base)
    if config.start.resume is not None and not config.start.any_base:
        run_on_all_ranks(_refuse_other_than_before, base, before, config.model.base, config.run_folder)
    return base


def _refuse_other_than_first(base: BaseIdentity, folder: str) -> None:
    """Raise CheckpointError where a rank has another base than rank 0. Every rank has to call it."""
    if len(set(gather_lists([base.digest]))) == 1:
        return
    first = [base]
    torch.distributed.broadcast_object_list(first, src=0)
    differences = gather_lists([first[0].difference(base)])
    others = {rank: difference for rank, difference in enumerate(differences) if difference is not None}
    if others:
        rank, difference = next(iter(others.items()))
        raise CheckpointError(
            f"--from_pretrained: {folder} is not the same base on every rank: on rank {', '.join(map(str, others))} "
            f"other than on rank 0 (rank {rank}: {difference}); give every machine the same files"
        )


def _refuse_other_than_before(base: BaseIdentity, before: BaseIdentity | None, folder: str, run_folder: str) -> None:
    """Raise CheckpointError where the base is not the one before; nothing where nobody knows that one."""
    if before is None:
        try:
            before = base_of_adapter(Path(run_folder) / "adapter")
        except (AdapterError, OSError):  # no adapter was left; what the checkpoint needs is checked where it is read
            return
    difference = before.difference(base)
    if difference is not None:
        raise CheckpointError(
            f"--resume: {folder} has {difference} than the base of this run: it was "
            f"{before.title}, this is {base.title}; give its own base, or insist with --any-base"
        )

"""The one door to SwissArmyTransformer (SAT): imports it quietly and hands on the names used here.

SAT 0.4.12 logs at import, and DeepSpeed 0.19.8 warns that there is no accelerator on a CPU machine.
A library that is imported should be silent, so both are muted for the import; afterwards SAT logs as it would
without this package. Runs and commands of this package's own ask for less, by `quiet_sat`.
"""

import importlib.metadata
import logging
import os
import warnings
from typing import NoReturn

from sat_lora.errors import VersionError

OLDEST = "0.4.10"  # of those that the registry has and in which all names are; docs/any-sat-model.md has the table


def _refuse(error: ImportError) -> NoReturn:
    """Raise VersionError for a SAT that lacks what this package needs; the error itself where there is none at all."""
    try:
        version = importlib.metadata.version("SwissArmyTransformer")
    except importlib.metadata.PackageNotFoundError:
        raise error from None
    if error.name != "sat" and not str(error.name).startswith("sat."):
        raise error  # what SAT itself needs
    raise VersionError(
        f"SwissArmyTransformer {version} lacks what sat_lora needs of it ({error}); from {OLDEST} on it is there: "
        "pip install 'SwissArmyTransformer>=0.4.12,<0.5'"
    ) from error


_disabled = logging.root.manager.disable
logging.disable(max(_disabled, logging.WARNING))
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sat import mpu
        from sat.model.base_model import BaseMixin, BaseModel, non_conflict
        from sat.model.official.vit_model import ImagePatchEmbeddingMixin, ViTProperty
        from sat.mpu import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, checkpoint
        from sat.mpu.utils import split_tensor_along_last_dim
        from sat.ops.layernorm import RMSNorm
        from sat.transformer_defaults import HOOKS_DEFAULT
except ImportError as error:
    _refuse(error)
finally:
    logging.disable(_disabled)

# SAT calls torch's activation checkpointing without saying which kind; both sides mean the reentrant one.
warnings.filterwarnings("ignore", message="torch.utils.checkpoint: the use_reentrant parameter")


def quiet_sat() -> None:
    """Let SAT log warnings and worse alone, unless SAT_LOGLEVEL or LOGLEVEL says otherwise."""
    if "SAT_LOGLEVEL" not in os.environ and "LOGLEVEL" not in os.environ:
        logging.getLogger("sat").setLevel(logging.WARNING)


__all__ = [
    "HOOKS_DEFAULT",
    "BaseMixin",
    "BaseModel",
    "ColumnParallelLinear",
    "ImagePatchEmbeddingMixin",
    "RMSNorm",
    "RowParallelLinear",
    "ViTProperty",
    "VocabParallelEmbedding",
    "checkpoint",
    "mpu",
    "non_conflict",
    "quiet_sat",
    "split_tensor_along_last_dim",
]

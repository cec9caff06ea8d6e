"""Modules under the names that they had before: importing one gives the module of today and a DeprecationWarning."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "sat_lora.adapter_file": "sat_lora.adapters.save_load",
    "sat_lora.adapter_format": "sat_lora.adapters.format",
    "sat_lora.combine": "sat_lora.adapters.combine",
    "sat_lora.config": "sat_lora.lora.config",
    "sat_lora.inspect_adapter": "sat_lora.adapters.inspect",
    "sat_lora.merge_checkpoint": "sat_lora.adapters.merge",
    "sat_lora.mixin": "sat_lora.lora.mixin",
    "sat_lora.optimizer_groups": "sat_lora.lora.optimizer_groups",
    "sat_lora.placement": "sat_lora.lora.apply",
    "sat_lora.summary": "sat_lora.lora.summary",
    "sat_lora.targets": "sat_lora.lora.targets",
    "sat_lora.cogvlm.checkpoint": "sat_lora.cogvlm.checkpoints.load",
    "sat_lora.cogvlm.generation": "sat_lora.cogvlm.decoding.generate",
    "sat_lora.cogvlm.image": "sat_lora.cogvlm.inputs.image",
    "sat_lora.cogvlm.model": "sat_lora.cogvlm.network.model",
    "sat_lora.cogvlm.text": "sat_lora.cogvlm.inputs.text",
    "sat_lora.doctor.before_run": "sat_lora.doctor.diagnose",
    "sat_lora.doctor.examination": "sat_lora.doctor.examine",
    "sat_lora.training.distributed": "sat_lora.parallel.distributed",
    "sat_lora.training.options": "sat_lora.training.settings.options",
}


class _Finder(MetaPathFinder, Loader):
    """Finds the names of MOVED, and those alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)  # one module under both names, not a copy


def install() -> None:
    """Make the old names importable; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

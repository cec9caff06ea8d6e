"""Modules under the names that they had before: importing one gives that of today and a DeprecationWarning."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED_TO = {
    "terminal": ("edge option_parser training.option_types progress training.notice plot_text"),
    "files": ("paths patterns foreign atomic step_folders weight_files host_copies"),
    "parallel": (
        "sharding partitioned cogvlm.weightless cogvlm.gradient_sum cogvlm.network.gradient_sum "
        "training.distributed training.agreement training.rendezvous training.launch training.stop_signals"
    ),
    "findings": ("doctor.findings>finding doctor.codes"),
    "lora.deltas": ("functional>low_rank delta_kernels dora initialize kinds>layers merging"),
    "lora": (
        "config targets adapter delta_hook mixin gradient_order trained>base_parameters placement>apply summary "
        "optimizer_groups base_identity live_base"
    ),
    "cogvlm": ("interop.cogvlm_layers>layer_names"),
    "cogvlm.inputs": ("cogvlm.text cogvlm.tokens cogvlm.prompts cogvlm.image cogvlm.pictures"),
    "cogvlm.network": (
        "cogvlm.attention cogvlm.experts cogvlm.fused cogvlm.kernels cogvlm.rotary cogvlm.routing cogvlm.head "
        "cogvlm.recompute cogvlm.vision cogvlm.model cogvlm.key_value_cache cogvlm.norm>model"
    ),
    "cogvlm.decoding": ("cogvlm.generation>generate cogvlm.answer cogvlm.captured_step cogvlm.sampling"),
    "cogvlm.checkpoints": (
        "cogvlm.checkpoint>load cogvlm.sat_folder cogvlm.hugging_face_folder interop.hugging_face_names "
        "cogvlm.base_weights"
    ),
    "adapters": (
        "adapter_format>format adapter_file>save_load combine combine_checks combine_factors "
        "inspect_adapter>inspect merge_checkpoint>merge verify_merge>verify"
    ),
    "data": (
        "training.data>samples training.item_files training.item_keys training.layouts training.folders "
        "training.formats training.answer_lists training.answer_lengths"
    ),
    "data.shards": ("training.tar_members training.shards training.shard_checks"),
    "data.batches": ("training.shard_stream training.sampler training.sources"),
    "watchdog": (
        "doctor.trace doctor.rank_files doctor.rank_state doctor.testimony doctor.flight_record doctor.nccl_log "
        "doctor.evidence doctor.verdict doctor.paragraph doctor.places doctor.watchdog doctor.replay"
    ),
    "training.settings": ("training.defaults>config training.lora_options training.deepspeed_file training.schedule"),
    "commands": ("training.options>flat_options training.deepspeed_config>flat_options"),
    "commands.adapters": (
        "commands.combine commands.export_adapter commands.import_adapter commands.inspect_adapter commands.merge"
    ),
    "training.steps": (
        "training.engine training.step training.loss training.nonfinite training.optimizer_state "
        "training.zero3_linear training.zero_norm training.release training.random_state training.broken_samples "
        "training.checkpoint"
    ),
    "training.runs": (
        "training.run_folder training.run_lock training.results training.progress>step_progress training.space"
    ),
    "training.runs.logs": "training.run_logs training.loss_plot",
    "memory": ("doctor.memory>components doctor.estimate doctor.estimate_run doctor.live_memory doctor.memory_report"),
    "doctor.model_checks": (
        "doctor.passes doctor.checkpointing doctor.gradients doctor.parallelism doctor.reachability "
        "doctor.trained_set doctor.values"
    ),
    "doctor.run_checks": (
        "doctor.collectives doctor.configuration doctor.data doctor.optimization doctor.packages doctor.space "
        "doctor.environment"
    ),
    "doctor": ("doctor.before_run>diagnose doctor.examination>examine"),
}
"""The modules of each folder that had another name, below `sat_lora`; `a>b` where the last part has changed too."""


def _moved() -> dict[str, str]:
    names = {}
    for folder, modules in _MOVED_TO.items():
        for word in modules.split():
            old, _, new = word.partition(">")
            names[f"sat_lora.{old}"] = f"sat_lora.{folder}.{new or old.rpartition('.')[2]}"
    return names


MOVED = _moved()
"""The name of today by the one of before."""


class _Finder(MetaPathFinder, Loader):
    """Finds the names of MOVED, and those alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MOVED[old]
        warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)  # one module under both names, not a copy


def install() -> None:
    """Make the old names importable; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

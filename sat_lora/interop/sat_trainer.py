"""SAT's own training loop, `sat.training.deepspeed_training.training_main`, with saves of the adapter alone.

with adapter_checkpoints():
    training_main(args, model, forward_step, create_dataset)
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from sat_lora.adapters.read import is_adapter_folder
from sat_lora.adapters.save_load import load_adapter, save_adapter
from sat_lora.files.atomic import replace_text
from sat_lora.files.step_folders import LATEST, follow, point_to
from sat_lora.lora.apply import mixins_called
from sat_lora.lora.base_parameters import keep_trained_set
from sat_lora.lora.mixin import lora_mixins, refuse_branches

MODULES = ("sat.training.model_io", "sat.training.deepspeed_training", "sat.model.base_model")
"""Modules of SAT that call `save_checkpoint` or `load_checkpoint` by a name of their own."""
SETUP = "setup_model_untrainable_params_and_optimizer"
"""The function of `training_main` that makes the engine, after everything a script can do to the model."""


@contextmanager
def adapter_checkpoints(name: str = "lora") -> Iterator[None]:
    """Inside, SAT's `save_checkpoint` writes the adapter called `name` alone, and its `load_checkpoint` restores it.

    SAVE/ITERATION is then an adapter folder, which `sat-lora merge`, `export` and `inspect` read, SAVE/latest names the
    newest, and SAVE/model_config.json is SAT's. A model without such an adapter, or whose adapter `merge_lora` has put
    into the weights for good, is saved as SAT does. What is loaded from a folder that SAT itself has written is loaded
    by SAT; for a folder of an adapter a `prefix` means nothing. SAT keeps no state of the optimizer, so neither does
    this. At every ZeRO stage every rank takes part in a save. What trains is what the LoRA mixins say, also where a
    script sets `disable_untrainable_params` on the model itself. Raises AdapterError on every rank where a save cannot
    be written, or where what is loaded does not fit the model.
    """
    from sat.training import deepspeed_training, model_io

    replaced = {
        "save_checkpoint": _saves_adapters(model_io.save_checkpoint, name),
        "load_checkpoint": _loads_adapters(model_io.load_checkpoint, name),
        SETUP: _keeps_trained_set(getattr(deepspeed_training, SETUP)),
    }
    with ExitStack() as stack:
        for module in map(sys.modules.get, MODULES):
            for function, instead in replaced.items():
                if module is not None and hasattr(module, function):
                    stack.enter_context(mock.patch.object(module, function, instead))
        yield


def _keeps_trained_set(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return SAT's `setup_model_untrainable_params_and_optimizer` for models whose LoRA mixins say what trains.

    That holds too where a script has set `disable_untrainable_params` on the model after it had added the mixins.
    """

    def setup(args: Namespace, model: nn.Module, *more: Any, **kw_args: Any) -> Any:
        """Return the engine and its optimizer. Raises ConfigError for ZeRO-3 on a model that may skip layers."""
        mixins = lora_mixins(model)
        if mixins:
            keep_trained_set(model)
        if (args.deepspeed_config or {}).get("zero_optimization", {}).get("stage") == 3:
            refuse_branches(mixins)
        return original(args, model, *more, **kw_args)

    return setup


def _saves_adapters(original: Callable[..., None], name: str) -> Callable[..., None]:
    """Return SAT's `save_checkpoint` for models with an adapter called `name`; `original` serves all others."""

    def save_checkpoint(iteration: int, model: nn.Module, optimizer: Any, lr_scheduler: Any, args: Namespace) -> None:
        """Write SAVE/ITERATION, then SAVE/latest and SAVE/model_config.json. Every rank calls it."""
        module = _inner(model)
        if not any(mixin.targets or mixin.trained.tensors for mixin in mixins_called(module, name).values()):
            original(iteration, model, optimizer, lr_scheduler, args)
            return
        root = Path(args.save)
        save_adapter(module, root / str(iteration), name=name)
        if torch.distributed.get_rank() == 0:
            from sat.training.model_io import extract_model_specific_args_to_dump

            config = extract_model_specific_args_to_dump(args, module)
            replace_text(root / "model_config.json", json.dumps(config, indent=4))
            point_to(root, LATEST, iteration)
        torch.distributed.barrier()

    return save_checkpoint


def _loads_adapters(original: Callable[..., int], name: str) -> Callable[..., int]:
    """Return SAT's `load_checkpoint` that takes folders of adapters too; `original` reads all others."""

    def load_checkpoint(
        model: nn.Module,
        args: Namespace,
        load_path: str | None = None,
        prefix: str = "",
        specific_iteration: int | None = None,
    ) -> int:
        """Return the iteration to go on from: 0 for a fine-tuning, as SAT does."""
        root = Path(load_path if load_path is not None else args.load)
        folder = root / str(specific_iteration) if specific_iteration is not None else follow(root)
        if not is_adapter_folder(folder):
            return original(model, args, load_path, prefix, specific_iteration)
        load_adapter(_inner(model), folder, name=name)
        mode = getattr(args, "mode", "inference")
        if mode == "inference":
            _inner(model).eval()
        is_step = folder.name.isdigit()
        return int(folder.name) if mode != "finetune" and is_step else 0

    return load_checkpoint


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside DeepSpeed's engine, or the model itself."""
    inner: nn.Module = getattr(model, "module", model)
    return inner

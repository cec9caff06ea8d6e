"""SAT's own training loop, `sat.training.deepspeed_training.training_main`, with saves of the adapter alone.

with adapter_checkpoints():
    training_main(args, model, forward_step, create_dataset)
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from sat_lora.adapters.read import is_adapter_folder, missing_problem
from sat_lora.adapters.save_load import load_adapter, save_adapter
from sat_lora.adapters.whole_model import is_whole_model
from sat_lora.errors import AdapterError, ConfigError
from sat_lora.files.atomic import replace_text
from sat_lora.files.foreign import read_bytes
from sat_lora.files.step_folders import LATEST, follow, point_to
from sat_lora.lora.base_parameters import keep_trained_set
from sat_lora.lora.mixin import lora_mixins, refuse_branches
from sat_lora.parallel.distributed import run_on_all_ranks
from sat_lora.parallel.sharding import model_parallel_layout
from sat_lora.terminal.notice import warn

MODULES = ("sat.training.model_io", "sat.training.deepspeed_training", "sat.model.base_model")
"""Modules of SAT in which its functions are looked up, also where somebody has put others in their place."""
SETUP = "setup_model_untrainable_params_and_optimizer"
"""The function of `training_main` that makes the engine, after everything a script can do to the model."""
POINTER_LIMIT = 64  # bytes of `latest`
MOST_PARTS = 100  # their numbers have two digits


@contextmanager
def adapter_checkpoints(name: str = "lora") -> Iterator[None]:
    """Inside, SAT's `save_checkpoint` writes the adapter called `name` alone, and its `load_checkpoint` restores it.

    SAVE/ITERATION is then an adapter folder, which `sat-lora merge`, `export` and `inspect` read, SAVE/latest names the
    newest, and SAVE/model_config.json is SAT's. A model without adapters, or whose adapter `merge_lora` has put into
    the weights for good, is saved as SAT does. What is loaded from a folder that SAT itself has written is loaded by
    SAT; for a folder of an adapter a `prefix` means nothing. SAT keeps no state of the optimizer, so neither does this.
    At every ZeRO stage every rank takes part in a save. What trains is what the LoRA mixins say, also where a script
    sets `disable_untrainable_params` on the model itself. In `training_main` raises, on every rank: AdapterError where
    a save cannot be written, or where there is nothing to load or it does not fit the model; ConfigError, before the
    engine is made, where a LoRA mixin has another name, for its part would not be saved. These functions of SAT are
    replaced wherever a module has them, a script that has imported them by name included.
    """
    from sat.training import deepspeed_training, model_io

    replaced = {
        "save_checkpoint": _saves_adapters(model_io.save_checkpoint, name),
        "load_checkpoint": _loads_adapters(model_io.load_checkpoint, name),
        SETUP: _keeps_trained_set(getattr(deepspeed_training, SETUP), name),
    }
    homes = [module for module in map(sys.modules.get, MODULES) if module is not None]
    instead_of = {
        id(getattr(module, function)): instead
        for module in homes
        for function, instead in replaced.items()
        if hasattr(module, function)
    }
    # `from_pretrained` may load on one rank of a machine alone; in the trainer all of them do.
    together = _loads_adapters(model_io.load_checkpoint, name, run_on_all_ranks)
    original_of = {id(instead): getattr(deepspeed_training, function) for function, instead in replaced.items()}
    original_of[id(together)] = deepspeed_training.load_checkpoint
    with ExitStack() as stack:
        stack.callback(_exchange, original_of)  # what was imported by name inside
        for module, name_there, function in _imported(instead_of.keys()):
            stack.enter_context(mock.patch.object(module, name_there, instead_of[id(function)]))
        stack.enter_context(mock.patch.object(deepspeed_training, "load_checkpoint", together))
        yield


def _exchange(instead_of: dict[int, Any]) -> None:
    """Put other objects where an imported module still has those that are given by `id`."""
    for module, name, content in _imported(instead_of.keys()):
        setattr(module, name, instead_of[id(content)])


def _imported(functions: Container[int]) -> list[tuple[ModuleType, str, Any]]:
    """Return (module, its name for it, object) wherever an imported module has one of these objects, given by `id`."""
    places = []
    for module in [*sys.modules.values()]:
        if isinstance(module, ModuleType):
            names = [*vars(module).items()]
            places += [(module, name, content) for name, content in names if id(content) in functions]
    return places


def _keeps_trained_set(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return SAT's `setup_model_untrainable_params_and_optimizer` for models whose LoRA mixins say what trains.

    That holds too where a script has set `disable_untrainable_params` on the model after it had added the mixins.
    """

    def setup(args: Namespace, model: nn.Module, *more: Any, **kw_args: Any) -> Any:
        """Return the engine and its optimizer. Raises ConfigError for ZeRO-3 on a model that may skip layers.

        Raises ConfigError also for LoRA mixins of another name.
        """
        mixins = lora_mixins(model)
        others = _called_otherwise(model, name)
        if others:
            present = sorted({path.rpartition(".")[2] for path in _adapting(model)})
            advice = f"give adapter_checkpoints({present[0]!r})" if len(present) == 1 else "give all of them one name"
            raise ConfigError(
                f"adapter_checkpoints: saves hold the adapter called {name!r} alone, and {', '.join(others)} would be "
                f"lost; {advice}, or leave adapter_checkpoints out"
            )
        if mixins:
            keep_trained_set(model)
        if (args.deepspeed_config or {}).get("zero_optimization", {}).get("stage") == 3:
            refuse_branches(mixins)
        return original(args, model, *more, **kw_args)

    return setup


def _adapting(model: nn.Module) -> list[str]:
    """Return the names of the model's LoRA mixins that train something."""
    return [path for path, mixin in lora_mixins(model).items() if mixin.targets or mixin.trained.tensors]


def _called_otherwise(model: nn.Module, name: str) -> list[str]:
    """Return the names of the model's LoRA mixins that train something and are not called `name`."""
    return [path for path in _adapting(model) if path.rpartition(".")[2] != name]


def _saves_adapters(original: Callable[..., None], name: str) -> Callable[..., None]:
    """Return SAT's `save_checkpoint` for models with an adapter called `name`; `original` serves all others."""
    from sat.training import model_io

    def save_checkpoint(iteration: int, model: nn.Module, optimizer: Any, lr_scheduler: Any, args: Namespace) -> None:
        """Write SAVE/ITERATION, with SAT's FusedEmaAdam its averages as SAVE/ITERATION-ema too, then SAVE/latest and
        SAVE/model_config.json. Every rank calls it.
        """
        module = _inner(model)
        others = _called_otherwise(module, name)
        if others:  # of a loop that is not SAT's: nothing is lost
            warn(
                f"adapter_checkpoints saves {name!r} alone, and the model has {', '.join(others)}: the whole of it is "
                "saved, as SAT does"
            )
        if others or not _adapting(module):
            original(iteration, model, optimizer, lr_scheduler, args)
            return
        root = Path(args.save)
        save_adapter(module, root / str(iteration), name=name)
        if type(getattr(optimizer, "optimizer", None)).__name__ == "FusedEmaAdam":  # of SAT; it keeps averages as well
            model_io.update_ema_parameters_to_model(optimizer)
            save_adapter(module, root / f"{iteration}-ema", name=name)
            model_io.restore_ema_parameters_back(optimizer)
        is_first = torch.distributed.get_rank() == 0
        run_on_all_ranks(lambda: _name_newest(root, iteration, args, module) if is_first else None)

    return save_checkpoint


def _name_newest(root: Path, iteration: int, args: Namespace, model: nn.Module) -> None:
    """Write ROOT/model_config.json as SAT does, and let ROOT/latest name the iteration."""
    from sat.training.model_io import extract_model_specific_args_to_dump

    config = extract_model_specific_args_to_dump(args, model)
    replace_text(root / "model_config.json", json.dumps(config, indent=4))
    point_to(root, LATEST, iteration)


def _alone(step: Callable[..., Any], *args: Any) -> Any:
    return step(*args)


def _loads_adapters(original: Callable[..., int], name: str, run: Callable[..., Any] = _alone) -> Callable[..., int]:
    """Return SAT's `load_checkpoint` that takes folders of adapters too; `original` reads all others.

    run: calls a function that may fail with the arguments behind it, for `run_on_all_ranks` where every rank loads.
    """

    def load_checkpoint(
        model: nn.Module,
        args: Namespace,
        load_path: str | None = None,
        prefix: str = "",
        specific_iteration: int | None = None,
    ) -> int:
        """Return the iteration to go on from: 0 for a fine-tuning, as SAT does."""
        root = Path(load_path if load_path is not None else args.load)
        folder: Path | None = run(_adapter_folder, root, specific_iteration)
        if folder is None:
            return original(model, args, load_path, prefix, specific_iteration)
        run(partial(load_adapter, name=name), _inner(model), folder)
        mode = getattr(args, "mode", "inference")
        if mode == "inference":
            _inner(model).eval()
        is_step = folder.name.isdigit()
        return int(folder.name) if mode != "finetune" and is_step else 0

    return load_checkpoint


def _adapter_folder(root: Path, iteration: int | None) -> Path | None:
    """Return the adapter that is to be loaded, of the newest iteration if None is given; None where SAT has saved.

    Raises AdapterError where there is neither: SAT itself would leave without an error, or fail on one rank.
    """
    folder = follow(root) if iteration is None else root / str(iteration)
    if is_adapter_folder(folder):
        return folder
    home = root / (_tag_in(root) if iteration is None else str(iteration))
    if is_adapter_folder(home):
        return home
    _, size = model_parallel_layout()
    parts = [part for part in range(MOST_PARTS) if (home / f"mp_rank_{part:02d}_model_states.pt").is_file()]
    if parts == [*range(size)]:
        return None
    if is_whole_model(home):
        ranks = ", ".join(map(str, parts))
        raise AdapterError(
            f"{home} has the parts of model-parallel ranks {ranks}, and here --model-parallel-size is {size}: give "
            "the one that it was saved with; an adapter, as adapter_checkpoints saves one, fits any"
        )
    problem = missing_problem(home if home.is_dir() else root)
    raise AdapterError(f"{root}: neither a model that SAT has saved nor an adapter: {problem}")


def _tag_in(root: Path) -> str:
    """Return the folder that ROOT/latest names, as SAT reads it; "" where it names none."""
    try:
        text = read_bytes(root / LATEST, POINTER_LIMIT).decode("utf-8", "replace").strip()
    except (OSError, ValueError):
        return ""
    is_iteration = text.isascii() and text.isdigit() and int(text) > 0
    return str(int(text)) if is_iteration else text if text == "release" else ""


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside DeepSpeed's engine, or the model itself."""
    inner: nn.Module = getattr(model, "module", model)
    return inner

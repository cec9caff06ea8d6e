"""A model folder in SAT's layout: read, loaded slice by slice, written.

FOLDER/latest                                 a step number, or `release`
FOLDER/<that>/mp_rank_00_model_states.pt      the state dict under `module`; one file per model-parallel rank
FOLDER/model_config.json
"""

import json
import pickle
import re
from pathlib import Path

import numpy
import torch
from torch import nn

from sat_lora.cogvlm.model import CogVLMModel, build_cogvlm
from sat_lora.errors import CheckpointError
from sat_lora.sharding import REPLICATED, Sharding, model_parallel_layout, sharding_of

# SAT stores the random states of Python and numpy beside the weights. These few names rebuild a numpy array and nothing
# else; whatever else a pickle asks for is refused.
_RANDOM_STATE_TYPES = [
    (numpy._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (numpy._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    numpy.ndarray,
    numpy.dtype,
    numpy.dtypes.UInt32DType,
]

TRUST = "if you trust whoever made it, --trust-checkpoint unpickles the whole file and so runs any code that is in it"


def read_config(folder: str | Path) -> dict:
    """The content of FOLDER/model_config.json."""
    path = _model_folder(folder) / "model_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object with the model's sizes, got {type(config).__name__}")
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """The files of the newest step in a SAT model folder, one per model-parallel rank, in rank order."""
    folder = _model_folder(folder)
    step = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    files = sorted((folder / step).glob("mp_rank_*_model_states.pt")) if step else []
    numbers = [file.name.split("_")[2] for file in files]
    if not files or numbers != [f"{rank:02d}" for rank in range(len(files))]:
        raise CheckpointError(
            f"{folder}: `latest` says {step!r}, so {folder / step}/mp_rank_00_model_states.pt (and 01, 02, ... without "
            f"gaps) should be there; found {[file.name for file in files] or _listing(folder / step)}"
        )
    return files


def _model_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_file():
        home = folder.parent.parent if folder.suffix == ".pt" else folder.parent
        raise CheckpointError(f"{folder} is a file; give the model folder that holds `latest`, perhaps {home}")
    wanted = ("latest", "model_config.json")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        found = _listing(folder) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} is not a SAT model folder: looked for {', '.join(wanted)} and "
            f"<latest>/mp_rank_00_model_states.pt; missing {', '.join(missing)}; found: {found}"
        )
    return folder


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "nothing"


def map_weights(file: Path, *, trust: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in one SAT checkpoint file, memory-mapped: nothing is read before it is used.

    trust: unpickle whatever the file holds, which runs any code that its maker put there.
    """
    try:
        with torch.serialization.safe_globals(_RANDOM_STATE_TYPES):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=not trust)
    except pickle.UnpicklingError as error:  # torch's own text advises to unpickle everything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        problem = "damaged" if trust else "damaged; nothing was run"
        if refused and not trust:
            problem = f"it asks for {refused[1]}, only tensors and random states are read; nothing was run; {TRUST}"
        raise CheckpointError(f"{file}: cannot be read as a SAT checkpoint: {problem}") from error
    except (ImportError, AttributeError) as error:  # of a trusted pickle
        raise CheckpointError(f"{file}: unpickling it asks for what is not installed here: {error}") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file}: cannot be read as a SAT checkpoint: {error}") from error
    state = content.get("module") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        keys = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: expected a state dict under the key `module`; found {keys}")
    return state


def shardings_of(model: nn.Module) -> dict[str, Sharding]:
    """How each entry of `model.state_dict()` is cut over the model-parallel ranks."""
    modules = dict(model.named_modules())
    found = {}
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        found[name] = sharding_of(modules[owner], leaf) if owner in modules else REPLICATED
    return found


def load_weights(model: nn.Module, folder: str | Path, *, trust: bool = False) -> None:
    """Fill `model` from a SAT folder saved at any model-parallel size; every name and shape has to fit.

    trust: see `map_weights`.
    """
    files = weight_files(folder)
    states = [map_weights(file, trust=trust) for file in files]
    rank, size = model_parallel_layout()
    targets, shardings = model.state_dict(), shardings_of(model)
    mine = states[rank : rank + 1] if len(states) == size else states
    problems = [f"missing {name}" for name in targets if any(name not in state for state in mine)]
    problems += [f"unexpected {name}" for name in sorted(set().union(*mine) - targets.keys())]
    sources = {}
    for name in targets.keys() & set.intersection(*map(set, mine)):
        parts = [state[name] for state in mine]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            problems.append(f"{name}: not a tensor")
            continue
        try:
            whole = shardings[name].unshard(parts)
        except RuntimeError as error:
            problems.append(f"{name}: the parts of the ranks do not join: {error}")
            continue
        source = whole if len(states) == size else shardings[name].shard(whole, rank, size)
        if source.shape != targets[name].shape:
            problems.append(f"{name}: shape {tuple(source.shape)}, the model has {tuple(targets[name].shape)}")
        sources[name] = source
    if problems:
        shown = "\n  ".join(sorted(problems)[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise CheckpointError(
            f"{files[0]} does not fit the model of {folder}/model_config.json, {len(problems)} problems:\n  {shown}"
        )
    with torch.no_grad():
        for name, source in sources.items():
            targets[name].copy_(source)


def load_cogvlm(folder: str | Path, *, trust: bool = False, **settings) -> tuple[CogVLMModel, dict]:
    """A CogVLM with the weights of a SAT folder, and its config. `settings` go to `build_cogvlm`.

    trust: see `map_weights`.
    """
    config = read_config(folder)
    weight_files(folder)  # fail before the model is built
    model = build_cogvlm(config, skip_init=True, **settings)
    load_weights(model, folder, trust=trust)
    return model, config


def save_weights(folder: str | Path, config: dict, state: dict[str, torch.Tensor], step: str = "release") -> None:
    """Write an unsharded state dict and its config in SAT's layout."""
    folder = Path(folder)
    (folder / step).mkdir(parents=True, exist_ok=True)
    torch.save({"module": state}, folder / step / "mp_rank_00_model_states.pt")
    config = {**config, "model_parallel_size": 1}
    (folder / "model_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "latest").write_text(step + "\n", encoding="utf-8")

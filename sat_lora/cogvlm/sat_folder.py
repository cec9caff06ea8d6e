"""A model folder in SAT's layout: read and written.

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

from sat_lora.errors import CheckpointError
from sat_lora.weight_files import Layout, make_sat_file

PARTS = ("latest", "model_config.json")

# SAT stores the random states of Python and numpy beside the weights. These few names rebuild a numpy array and nothing
# else; whatever else a pickle asks for is refused.
_RANDOM_STATE_TYPES = [
    (numpy._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (numpy._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    numpy.ndarray,
    numpy.dtype,
    numpy.dtypes.UInt32DType,
]


class SatFolder:
    """A SAT checkpoint, of any model-parallel size. CheckpointError: there is none, or it is incomplete."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if folder.is_file():
            home = folder.parent.parent if folder.suffix == ".pt" else folder.parent
            raise CheckpointError(f"{folder} is a file; give the model folder that holds `latest`, perhaps {home}")
        missing = [name for name in PARTS if not (folder / name).is_file()]
        if missing:
            found = listing(folder) if folder.is_dir() else "no such folder"
            raise CheckpointError(
                f"{folder} is not a SAT model folder: looked for {', '.join(PARTS)} and "
                f"<latest>/mp_rank_00_model_states.pt; missing {', '.join(missing)}; found: {found}"
            )
        self.path = folder

    def config(self) -> dict:
        """The content of model_config.json."""
        return read_object(self.path / "model_config.json")

    def files(self) -> list[Path]:
        """The files of the newest step, one per model-parallel rank, in rank order."""
        step = (self.path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        home = self.path / step
        files = sorted(home.glob("mp_rank_*_model_states.pt")) if step else []
        numbers = [file.name.split("_")[2] for file in files]
        if not files or numbers != [f"{rank:02d}" for rank in range(len(files))]:
            raise CheckpointError(
                f"{self.path}: `latest` says {step!r}, so {home}/mp_rank_00_model_states.pt (and 01, 02, ... without "
                f"gaps) should be there; found {[file.name for file in files] or listing(home)}"
            )
        return files

    @property
    def saved_ranks(self) -> int:
        """The model-parallel size at which it was saved."""
        return len(self.files())

    def map(self, rank: int) -> dict[str, torch.Tensor]:
        """What one saved rank holds: SAT's names, mapped tensors."""
        return map_weights(self.files()[rank])

    def own_name(self, name: str) -> str | None:
        """What a parameter is called in the files."""
        return name


def listing(folder: Path) -> str:
    """Some names in a folder, for an error."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "nothing"


def read_object(path: Path) -> dict:
    """A JSON file that has to hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def map_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in one SAT checkpoint file, memory-mapped: nothing is read before it is used."""
    try:
        with torch.serialization.safe_globals(_RANDOM_STATE_TYPES):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to unpickle everything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        problem = f"it asks for {refused[1]}, only tensors and random states are read" if refused else "damaged"
        raise CheckpointError(f"{file}: cannot be read as a SAT checkpoint: {problem}; nothing was run") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a SAT checkpoint: {error}; if it was cut short, copy it again"
        ) from error
    state = content.get("module") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        keys = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: expected a state dict under the key `module`; found {keys}")
    return state


def save_weights(folder: str | Path, config: dict, state: dict[str, torch.Tensor], step: str = "release") -> None:
    """Write an unsharded state dict and its config in SAT's layout."""
    torch.save({"module": state}, _make_folder(folder, config, 1, step) / "mp_rank_00_model_states.pt")


def make_sat_weights(folder: str | Path, config: dict, layouts: list[Layout]) -> list[dict[str, torch.Tensor]]:
    """A SAT folder with one file per layout, that is per model-parallel rank: their tensors, to be written to."""
    home = _make_folder(folder, config, len(layouts), "release")
    return [make_sat_file(home / f"mp_rank_{rank:02d}_model_states.pt", one) for rank, one in enumerate(layouts)]


def _make_folder(folder: str | Path, config: dict, ranks: int, step: str) -> Path:
    folder = Path(folder)
    (folder / step).mkdir(parents=True, exist_ok=True)
    config = {**config, "model_parallel_size": ranks}
    if "model_parallel_size" in config.get("eva_args", {}):
        config["eva_args"] = {**config["eva_args"], "model_parallel_size": ranks}
    (folder / "model_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "latest").write_text(step + "\n", encoding="utf-8")
    return folder / step

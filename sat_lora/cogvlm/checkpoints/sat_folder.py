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

from sat_lora.cogvlm.checkpoints.quantized_files import QuantizationNote, joined, note_in, refuse_codes
from sat_lora.cogvlm.sizes import size_problems
from sat_lora.errors import CheckpointError
from sat_lora.files.foreign import LFS_POINTER, is_lfs_pointer, read_bytes, read_json, stand_in
from sat_lora.files.paths import BASE_WANTED, missing_base, names_in
from sat_lora.files.paths import SAT_PARTS as PARTS
from sat_lora.files.weight_files import Layout, make_sat_file
from sat_lora.printable import printable

NAME_LIMIT = 1 << 12  # bytes of `latest`
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"}
_CUT_BY_COLUMNS = "transformer.layers.0.attention.dense"
LORA2 = re.compile(r"\.matrix_[AB]\.\d+$")
ADAPTERS = re.compile(r"(^|\.)mixins\.[^.]+\.adapters\.[^.]+\.\w+$")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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


class SatFolder:
    """A SAT checkpoint, of any model-parallel size. trust: see `map_weights`.

    Raises CheckpointError if there is none, or it is incomplete.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False):
        folder = Path(folder)
        if folder.is_file():
            home = folder.parent.parent if folder.suffix == ".pt" else folder.parent
            if folder.suffix in ARCHIVES:
                raise CheckpointError(f"{folder} is a file; unpack the archive and give the model folder in it")
            raise CheckpointError(f"{folder} is a file; give the model folder that holds `latest`, perhaps {home}")
        problem = missing_base(folder)
        if problem:
            raise CheckpointError(problem)
        missing = [name for name in PARTS if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} is not a SAT model folder: looked for {', '.join(PARTS)} and "
                f"<latest>/mp_rank_00_model_states.pt; missing {', '.join(missing)}; found: {listing(folder)}"
                + (_step_to_name(folder) if missing == ["latest"] else _nearby(folder))
            )
        self.path = folder
        self._trust = trust

    def config(self) -> dict:
        """Return the content of model_config.json. Raises CheckpointError if a size in it is none."""
        path = self.path / "model_config.json"
        content = read_object(path)
        problems = size_problems(content)
        if problems:
            raise CheckpointError(f"{path}: {'; '.join(problems)}")
        return content

    def files(self) -> list[Path]:
        """Return the files of the newest step, one per model-parallel rank, in rank order."""
        instead = stand_in(self.path / "latest")
        if instead is not None:
            raise CheckpointError(f"{self.path / 'latest'}: cannot be read: {instead}")
        try:
            content = read_bytes(self.path / "latest", NAME_LIMIT)
            if is_lfs_pointer(content):
                raise ValueError(LFS_POINTER)
            step = content.decode("utf-8-sig", "replace").strip()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / 'latest'}: cannot be read: {error}") from error
        if Path(step).name != step or step == ".." or len(step) > 255 or not step.isprintable():
            raise CheckpointError(
                f"{self.path}: `latest` says {step[:80]!r}, which is not the name of a folder in there: a step number, "
                "or `release`"
            )
        home = self.path / step
        files = sorted(home.glob("mp_rank_*_model_states.pt")) if step else []
        numbers = [file.name.split("_")[2] for file in files]
        if not files or numbers != [f"{rank:02d}" for rank in range(len(files))]:
            raise CheckpointError(
                f"{self.path}: `latest` says {step!r}, so {home}/mp_rank_00_model_states.pt (and 01, 02, ... without "
                f"gaps) should be there; found {[file.name for file in files] or listing(home)}"
                + (_unfinished(home) if home.is_dir() else f"; in {self.path} there are {listing(self.path)}")
            )
        return files

    def check(self, state: dict[str, torch.Tensor]) -> None:
        """Raise CheckpointError if the first file, which holds `state`, is cut for more ranks than there are files."""
        content = self.config()
        files = self.files()
        rows, columns = (_size(state, name, dim) for name, dim in (("mixins.lm.lm_head", 0), (_CUT_BY_COLUMNS, 1)))
        vocabulary = content.get("vocab_size", 0)
        hidden = content.get("hidden_size")
        ranks = vocabulary // rows if rows else 1
        is_said = content.get("model_parallel_size") == ranks
        is_part = rows * ranks == vocabulary and (is_said or columns * ranks == hidden)
        if ranks > len(files) and is_part:
            lost = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(len(files), ranks)]
            why = "the first is cut for so many"
            if is_said:
                why = f"model_config.json says model_parallel_size {ranks}"
            raise CheckpointError(
                f"{files[0].parent} has {len(files)} of {ranks} files: {why}, and {', '.join(lost[:8])} "
                f"{'is' if len(lost) == 1 else 'are'} missing; copy all of them"
            )

    @property
    def saved_ranks(self) -> int:
        """The model-parallel size at which it was saved."""
        return len(self.files())

    def map(self, rank: int) -> dict[str, torch.Tensor]:
        """Return what one saved rank holds: mapped tensors by SAT's names, of a quantised base QuantizedWeights too."""
        file = self.files()[rank]
        state = map_weights(file, trust=self._trust)
        note = self.note()
        if note is not None:
            return joined(state, note, file)
        refuse_codes(state, file)
        return state

    def note(self) -> QuantizationNote | None:
        """Return what the config says of quantised weights; None where they are whole."""
        return note_in(self.config(), self.path)

    def own_name(self, name: str) -> str | None:
        """Return what a parameter is called in the files: as it is called here."""
        return name


def _size(state: dict, name: str, dim: int) -> int:
    """Return the size of a linear's weight along `dim`; 0 where there is no such weight."""
    weight = state.get(f"{name}.weight")
    return weight.shape[dim] if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0


def _step_to_name(folder: Path) -> str:
    """Return what to write into the `latest` that is missing, as the end of a sentence, where that can be seen."""
    steps = [name for name in names_in(folder) if (folder / name / "mp_rank_00_model_states.pt").is_file()]
    if len(steps) != 1:
        return _nearby(folder)
    return f"; latest is a text with the name of the folder of the weights: write {printable(steps[0])} into it"


def _unfinished(home: Path) -> str:
    """Return what to do about weights in there that lie under another suffix, as the end of a sentence."""
    others = [name for name in names_in(home) if name.startswith("mp_rank_") and not name.endswith(".pt")]
    if not others:
        return ""
    is_packed = Path(others[0]).suffix in ARCHIVES
    return f"; {printable(others[0])} {'is packed: unpack it' if is_packed else 'is a download that did not end'}"


def _nearby(folder: Path) -> str:
    """Return what to give instead of a folder that is no model's, as the end of a sentence, where that can be seen."""
    above = [home for home in (folder.parent, folder.parent.parent) if all((home / name).is_file() for name in PARTS)]
    names = names_in(folder)
    below = [name for name in names if all((folder / name / part).is_file() for part in PARTS)]
    if above or below:
        return f"; give {above[0] if above else folder / printable(below[0])}"
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in names):
        return (
            "; of a Hugging Face folder only .safetensors are read, save the model again with safe_serialization=True"
        )
    if any(name.endswith(".safetensors") for name in names):
        return "; a Hugging Face folder has model.safetensors, or model.safetensors.index.json beside its parts"
    if any(Path(name).suffix in ARCHIVES for name in names):
        return "; unpack the archive"
    return f"; give {BASE_WANTED}"


def listing(folder: Path) -> str:
    """Return some names in a folder, for an error."""
    names = [printable(name) for name in names_in(folder)]
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "nothing"


def read_object(path: Path) -> dict:
    """Return the object of a JSON file. Raises CheckpointError if it cannot be read, or holds anything else."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        instead = stand_in(path) if path.exists() else None
        raise CheckpointError(f"{path}: cannot be read as JSON: {instead or error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def map_weights(file: Path, *, trust: bool = False) -> dict[str, torch.Tensor]:
    """Return the state dict in one SAT checkpoint file, memory-mapped: nothing is read before it is used.

    trust: unpickle whatever the file holds, which runs any code that its maker put there.
    """
    instead = stand_in(file, archive=True)
    if instead is not None:
        raise CheckpointError(f"{file}: cannot be read as a SAT checkpoint: {instead}")
    try:
        with torch.serialization.safe_globals(_RANDOM_STATE_TYPES):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=not trust)
    except pickle.UnpicklingError as error:  # torch's own text advises to unpickle everything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        problem = "damaged, copy it again" if trust else "damaged, copy it again; nothing was run"
        if refused and not trust:
            problem = f"it asks for {refused[1]}, only tensors and random states are read; nothing was run; {TRUST}"
        raise CheckpointError(f"{file}: cannot be read as a SAT checkpoint: {problem}") from error
    except (ImportError, AttributeError) as error:  # of a trusted pickle
        raise CheckpointError(f"{file}: unpickling it asks for what is not installed here: {error}") from error
    except Exception as error:  # a damaged pickle makes torch raise KeyError, IndexError, struct.error, ...
        text = str(error).strip().partition("\n")[0][:300]
        if "_use_new_zipfile_serialization" in str(error):
            text = "it is in the format that torch wrote before 1.6, which cannot be mapped; load and save it again"
        raise CheckpointError(
            f"{file}: cannot be read as a SAT checkpoint: {text or type(error).__name__}; if it was cut short, copy it "
            "again"
        ) from error
    state = content.get("module") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        keys = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file}: expected a state dict under the key `module`; found {printable(keys)}")
    return state


def weight_problems(state: dict) -> list[str]:
    """Return what of a state dict is no weight of a base: other types, dtypes, and pairs of SAT's own LoRA."""
    pairs = [name for name in state if LORA2.search(str(name))]
    if pairs:
        return [
            f"it was trained with SAT's lora2 ({printable(pairs[0])}, ...); make an adapter of it with `sat-lora "
            "import --from lora2`, and give the base that it was trained on here"
        ]
    adapters = [name for name in state if ADAPTERS.search(str(name))]
    if adapters:
        return [
            f"it has LoRA of sat_lora in it ({printable(adapters[0])}, ...); give the base that it was trained on here "
            "and this folder as the adapter"
        ]
    if state and all(str(name).startswith("module.") for name in state):
        return [
            "each of its names begins with `module.`, as those of a model wrapped for data parallelism do; save the "
            "state dict of the model inside"
        ]
    return [
        f"{printable(name)}: dtype {tensor.dtype}; weights are float32, bfloat16, float16 or float64, and a quantised "
        "model is not a base"
        for name, tensor in state.items()
        if torch.is_tensor(tensor) and tensor.dtype not in WEIGHT_DTYPES
    ]


def save_weights(folder: str | Path, config: dict, state: dict[str, torch.Tensor], step: str = "release") -> None:
    """Write an unsharded state dict and its config in SAT's layout."""
    torch.save({"module": state}, _make_folder(folder, config, 1, step) / "mp_rank_00_model_states.pt")


def make_sat_weights(folder: str | Path, config: dict, layouts: list[Layout]) -> list[dict[str, torch.Tensor]]:
    """Make a SAT folder with a file per layout, one for each model-parallel rank; return their tensors by name.

    The tensors are to be written to.
    """
    home = _make_folder(folder, config, len(layouts), "release")
    return [make_sat_file(home / f"mp_rank_{rank:02d}_model_states.pt", layout) for rank, layout in enumerate(layouts)]


def _make_folder(folder: str | Path, config: dict, ranks: int, step: str) -> Path:
    folder = Path(folder)
    (folder / step).mkdir(parents=True, exist_ok=True)
    config = {**config, "model_parallel_size": ranks}
    if "model_parallel_size" in config.get("eva_args", {}):
        config["eva_args"] = {**config["eva_args"], "model_parallel_size": ranks}
    (folder / "model_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "latest").write_text(step + "\n", encoding="utf-8")
    return folder / step

"""What a PEFT adapter folder holds, under whichever of PEFT's names.

`save_pretrained` leaves out what the model in memory has in its names: the adapter's own, which stands in
`lora_A.NAME.weight` and `modules_to_save.NAME.weight`, and `base_layer` and `original_module`, under which the base's
own weights lie. Trainers that save a state dict as it is, and DeepSpeed's zero_to_fp32, keep all of that, and may put
`module.` in front and the names of torch's wrappers in between.
"""

import dataclasses
import itertools
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from sat_lora.adapters.format import CONFIG, MAGNITUDE, TENSOR_DTYPES, WEIGHTS
from sat_lora.cogvlm.checkpoints.hugging_face_names import sat_name
from sat_lora.errors import AdapterError
from sat_lora.files.foreign import read_json, stand_in
from sat_lora.lora.base_identity import same_values
from sat_lora.printable import printable

PICKLED = "adapter_model.bin"
PICKLED_WHOLE = "pytorch_model.bin"  # of DeepSpeed's zero_to_fp32
BESIDE = "non_lora_trainables.bin"  # of LLaVA's trainer
_PREFIXES = ("module.", "base_model.model.")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch
_LEAVES = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": MAGNITUDE,
}  # fmt: skip
_WRAPPED = ("base_layer", "original_module")
_ENOUGH = 40  # problems; more are not looked for


def read_peft_folder(folder: Path) -> tuple[Path, dict, dict[str, torch.Tensor]]:
    """Return (the folder with the files, config, tensors by the names in the file).

    An adapter that is not called `default` is saved by PEFT in a folder of its name: with one of them below `folder`,
    that is meant. A pickled file is read without running anything in it.
    Raises AdapterError, which names the file and the cause.
    """
    folder = _adapter_folder(folder)
    names = (WEIGHTS, PICKLED, PICKLED_WHOLE)
    weights = next((folder / name for name in names if (folder / name).is_file()), None)
    missing = [] if weights is not None else [f"{WEIGHTS} or {PICKLED}"]
    missing += [] if (folder / CONFIG).is_file() else [CONFIG]
    if weights is None or missing:
        raise AdapterError(
            f"{folder} is not a PEFT adapter folder: {', '.join(missing)} missing; found: {_listing(folder)}"
        )
    config = _read_config(folder / CONFIG)
    if (folder / BESIDE).exists():
        raise AdapterError(
            f"{folder}: {BESIDE} holds weights that were trained whole, which would be lost; save them in the adapter, "
            "by PEFT's modules_to_save, or, if they are not to be used, take the file away"
        )
    is_pickled = weights.name != WEIGHTS
    instead = stand_in(weights, archive=is_pickled)
    if instead is not None:
        raise AdapterError(f"{weights}: cannot be read as a PEFT adapter: {instead}")
    return folder, config, _read_pickled(weights) if is_pickled else _read_safetensors(weights)


def _adapter_folder(folder: Path) -> Path:
    if folder.is_file():
        raise AdapterError(f"{folder} is a file; give the PEFT adapter's folder, which holds {CONFIG}")
    if not folder.exists():
        raise AdapterError(f"{folder} is not a PEFT adapter folder: it does not exist")
    if (folder / CONFIG).is_file():
        return folder
    below = [path for path in sorted(itertools.islice(folder.iterdir(), 1000)) if (path / CONFIG).is_file()]
    if len(below) > 1:
        raise AdapterError(f"{folder} holds several adapters, {', '.join(printable(p.name) for p in below)}; give one")
    return below[0] if below else folder


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in itertools.islice(os.scandir(folder), 1000))[:12]
    return ", ".join(map(printable, names)) or "nothing"


def _read_config(path: Path) -> dict:
    try:
        config = read_json(path)
        if not isinstance(config, dict) or "sat_lora" in config:
            raise ValueError("already an adapter of sat_lora" if isinstance(config, dict) else "not a PEFT LoRA")
        if config.get("peft_type") != "LORA":
            raise ValueError(f"not a PEFT LoRA, its peft_type is {str(config.get('peft_type'))[:40]!r}")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read as a PEFT adapter: {stand_in(path) or error}") from error
    return config


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    # safetensors 0.8 meets a dtype that torch or its own binding lacks with whatever comes first.
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise AdapterError(f"{path}: cannot be read as a PEFT adapter: {str(error)[:300]}") from error


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to unpickle everything
        problem = "it is damaged, or asks for more than tensors; nothing was run; save it again as safetensors"
        raise AdapterError(f"{path}: cannot be read as a PEFT adapter: {problem}") from error
    except Exception as error:  # a damaged pickle makes torch raise KeyError, IndexError, struct.error, ...
        text = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise AdapterError(f"{path}: cannot be read as a PEFT adapter: {text}") from error
    for name in ("state_dict", "module", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise AdapterError(f"{path}: cannot be read as a PEFT adapter: expected a dictionary of tensors by name")
    # Tensors of a pickle may share memory, which safetensors does not write.
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in content.items()}


@dataclasses.dataclass
class PeftContent:
    """The tensors of a PEFT file, sorted by what they are."""

    pairs: dict[str, dict[str, torch.Tensor]]
    """The tensors "A", "B" and DoRA's magnitude, by Hugging Face's name of the module."""
    trained: dict[str, torch.Tensor]
    """What was trained whole, by SAT's name of the parameter."""
    problems: list[str]

    @classmethod
    def of(cls, tensors: Mapping[str, object], config: dict, base: Mapping[str, torch.Tensor]) -> "PeftContent":
        """Return the content of `tensors`, with problems for those that have no place.

        base: by SAT's names, to tell what was trained from what was saved along.
        """
        content = cls({}, {}, [])
        adapters: dict[str | None, str] = {}
        with_adapter_names = any(_is_marked(key) for key in tensors)
        for key, tensor in tensors.items():
            if len(content.problems) >= _ENOUGH:
                content.problems.append("and more")
                break
            problem = _tensor_problem(tensor)
            if problem is not None:
                content.problems.append(f"{printable(key)}: {problem}")
                continue
            adapter = content._take(key, tensor, config, base, with_adapter_names)
            adapters.setdefault(adapter, key)
        named = [printable(name) for name in adapters if name is not None]
        if len(named) > 1:
            content.problems.append(
                f"holds several adapters, {', '.join(named)}; save one alone by save_pretrained, with selected_adapters"
            )
        return content

    def _take(
        self, key: str, tensor: torch.Tensor, config: dict, base: Mapping[str, torch.Tensor], with_adapter_names: bool
    ) -> str | None:
        """Put a tensor where it belongs; return the adapter's name in its own name, None without one."""
        parts = _without_prefix(key).split(".")
        place = next((number for number, part in enumerate(parts) if part in _LEAVES), None)
        if place is not None:
            module = _module_named(".".join(part for part in parts[:place] if part not in _WRAPPED))
            rest = parts[place + 1 :]
            names = rest[:-1] if rest and rest[-1] == "weight" else rest
            if module is None:
                self.problems.append(f"{printable(key)}: CogVLM has no such module")
            elif len(names) > 1 or "bias" in rest:
                self.problems.append(f"{printable(key)}: not a name of PEFT's LoRA; save it by save_pretrained")
            elif _LEAVES[parts[place]] in self.pairs.setdefault(module, {}):
                self.problems.append(f"{printable(key)}: the same tensor of {module} is there twice")
            else:
                self.pairs[module][_LEAVES[parts[place]]] = tensor
            return names[0] if names else None
        if "modules_to_save" in parts:
            place = parts.index("modules_to_save")
            rest = parts[place + 1 :]
            self._take_whole(key, ".".join([*parts[:place], *rest[1:]]), tensor)
            return rest[0] if rest else None
        name = ".".join(part for part in parts if part not in _WRAPPED)
        wrapped = len(name) < len(".".join(parts))
        if wrapped or (with_adapter_names and not _is_named(name, config.get("modules_to_save"))):
            self._compare(key, name, tensor, base)  # a weight of the base, saved along
        else:
            self._take_whole(key, name, tensor)
        return None

    def _take_whole(self, key: str, name: str, tensor: torch.Tensor) -> None:
        parameter = _sat_name(name)
        if parameter is None:
            self.problems.append(f"{printable(key)}: CogVLM has no such module")
        elif parameter in self.trained:
            self.problems.append(f"{printable(key)}: {parameter} is there twice")
        else:
            self.trained[parameter] = tensor

    def _compare(self, key: str, name: str, tensor: torch.Tensor, base: Mapping[str, torch.Tensor]) -> None:
        parameter = _sat_name(name)
        if parameter is None or parameter not in base:
            if not name.endswith("inv_freq"):  # computed, and saved by some versions
                self.problems.append(f"{printable(key)}: CogVLM has no such module")
        elif base[parameter].shape != tensor.shape:
            self.problems.append(f"{printable(key)}: {tuple(tensor.shape)}, --base has {tuple(base[parameter].shape)}")
        elif not bool(same_values(base[parameter].float(), tensor.float()).all()):
            self.problems.append(
                f"{printable(key)}: a weight of the base that was saved along, and --base has other values there; give "
                "the base that it was trained on"
            )


def _is_marked(key: str) -> bool:
    """Return whether a key is one of the model in memory: with the adapter's name, or around a wrapped layer."""
    parts = key.split(".")
    if "modules_to_save" in parts or any(part in parts for part in _WRAPPED):
        return True
    place = next((number for number, part in enumerate(parts) if part in ("lora_A", "lora_B")), None)
    return place is not None and parts[place + 1 :] not in ([], ["weight"])


def _is_named(name: str, modules: object) -> bool:
    """Return whether `modules_to_save` names the module of that parameter: by PEFT's rule, as a name's end."""
    parents = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]
    ends = [modules] if isinstance(modules, str) else modules if isinstance(modules, list) else []
    return any(parent == end or parent.endswith(f".{end}") for parent in parents for end in ends)


def _tensor_problem(tensor: object) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__}, no tensor"
    if tensor.dtype not in TENSOR_DTYPES:
        return f"dtype {tensor.dtype}, a floating-point dtype is wanted"
    if not bool(torch.isfinite(tensor).all()):
        return "holds values that are not finite"
    return None


def _without_prefix(key: str) -> str:
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    while name.startswith(_PREFIXES):
        name = name.removeprefix(next(prefix for prefix in _PREFIXES if name.startswith(prefix)))
    return name


def _module_named(name: str) -> str | None:
    """Return Hugging Face's name of a module; names of a model without its head begin one level lower."""
    return next((module for module in (name, f"model.{name}") if sat_name(module) is not None), None)


def _sat_name(name: str) -> str | None:
    return sat_name(_module_named(name) or "")

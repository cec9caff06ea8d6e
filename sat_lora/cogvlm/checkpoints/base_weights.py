"""The weights of a model folder by name, each as a whole tensor, whatever the folder's kind and cut."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoints.hugging_face_folder import ROTARY, HuggingFaceFolder, is_computed
from sat_lora.cogvlm.checkpoints.load import open_folder, shardings_of
from sat_lora.cogvlm.checkpoints.quantized_files import QuantizationNote
from sat_lora.cogvlm.checkpoints.sat_folder import weight_problems
from sat_lora.cogvlm.families import family_of
from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.errors import CheckpointError, ConfigError
from sat_lora.files.weight_files import Layout
from sat_lora.lora.base_identity import BaseIdentity, identity_of
from sat_lora.parallel.sharding import Sharding, model_parallel_layout
from sat_lora.printable import printable
from sat_lora.quantized.quantized_weight import whole as decoded


class BaseWeights(Mapping[str, torch.Tensor]):
    """The whole tensors of a model folder by their SAT names, mapped.

    A tensor takes memory when it is asked for and has to be joined. trust: see `map_weights`.
    Raises CheckpointError if a part is missing.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False):
        self._source = open_folder(folder, trust=trust)
        self.config = self._source.config()
        self._parts = [self._source.map(rank) for rank in range(self._source.saved_ranks)]
        self._source.check(self._parts[0])
        for number, part in enumerate(self._parts):
            foreign = [name for name, value in part.items() if not torch.is_tensor(value)]
            problems = [f"{printable(name)}: not a tensor" for name in foreign]
            problems += [f"{printable(name)} only in some of them" for name in part.keys() ^ self._parts[0].keys()]
            problems += weight_problems(part)
            if problems:
                file = self._source.files()[number]
                raise CheckpointError(f"{file}: cannot be used: {'; '.join(sorted(problems)[:20])}")
        # What a folder of the other kind leaves out because it is computed.
        self._computed = self._missing_buffers()

    @property
    def folder(self) -> Path:
        """The folder that they are in."""
        return self._source.path

    @property
    def note(self) -> QuantizationNote | None:
        """What the folder says of quantised weights, which are decoded when they are asked for; None: all are whole."""
        return self._source.note()

    @property
    def hugging_face_config(self) -> dict | None:
        """The content of a Hugging Face folder's config.json; None for a SAT folder."""
        return self._source.own_config() if isinstance(self._source, HuggingFaceFolder) else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each tensor, by name."""
        return {name: shape for name, (shape, _) in self.layout.items()}

    @cached_property
    def layout(self) -> Layout:
        """The whole shape and the dtype of each tensor, by name.

        They are in the order of SAT's files, in which the other kind's are not: so one that was made of SAT's gives the
        same file again.
        """
        ranks = len(self._parts)
        tensors = {**self._parts[0], **self._computed}
        if isinstance(self._source, HuggingFaceFolder):
            order = {name: number for number, name in enumerate(self._model.state_dict())}
            tensors = dict(sorted(tensors.items(), key=lambda entry: order.get(entry[0], len(order))))
        return {
            name: (
                self._sharding(name).full_shape(tensor.shape, ranks) if ranks > 1 else tuple(tensor.shape),
                tensor.dtype,
            )
            for name, tensor in tensors.items()
        }

    def layouts_for(self, ranks: int) -> list[Layout]:
        """Return the shapes and dtypes that each of `ranks` model-parallel ranks holds.

        Raises ConfigError if a size does not divide.
        """
        if ranks == 1:
            return [self.layout]
        shapes = {
            name: self._sharding(name).saved_shape(torch.Size(shape), 1, ranks)
            for name, (shape, _) in self.layout.items()
        }
        uneven = [name for name, shape in shapes.items() if shape is None]
        if uneven:
            raise ConfigError(f"--model-parallel-size: {ranks} does not divide {', '.join(uneven[:8])}")
        layout = {name: (shape, self.layout[name][1]) for name, shape in shapes.items() if shape is not None}
        return [layout] * ranks

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._computed:
            return self._computed[name]
        parts = [decoded(part[name]) for part in self._parts]
        return parts[0] if len(parts) == 1 else self._sharding(name).unshard(parts)

    def shard(self, name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """Return the part of a whole tensor that `rank` of `ranks` holds."""
        return whole if ranks == 1 else self._sharding(name).shard(whole, rank, ranks)

    @cached_property
    def identity(self) -> BaseIdentity:
        """Which base this is; a few values of each tensor are read. A quantised one is the base that it was made of."""
        if self.note is not None:
            return self.note.base
        folder = self._source.path.resolve()
        family = family_of(self.config).title
        return identity_of(self.shapes, self._values_at, name=folder.name, family=family)

    def _values_at(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Return the elements of a tensor at flat positions of the whole: (n,)."""
        if name in self._computed or len(self._parts) == 1:
            part = self._computed.get(name)
            return elements(self._parts[0][name] if part is None else part, index)
        parts = [part[name] for part in self._parts]
        sharding = self._sharding(name)
        if sharding.dim is None:
            return elements(parts[0], index)
        shape = self.shapes[name]
        places = [*torch.unravel_index(index, shape)]
        owners, places[sharding.dim] = sharding.place(places[sharding.dim], shape[sharding.dim], len(parts))
        by_rank = torch.stack([part[tuple(places)].float() for part in parts])
        return by_rank.gather(0, owners[None])[0]

    def _sharding(self, name: str) -> Sharding:
        if name not in self._shardings:
            raise CheckpointError(
                f"{self._source.path}: {printable(name)} is no parameter of a {family_of(self.config).title}, so its "
                "cut is not known"
            )
        return self._shardings[name]

    @cached_property
    def _model(self):
        _, size = model_parallel_layout()  # of this process; how a parameter is cut does not depend on it
        return build_cogvlm(self.config, device="meta", model_parallel_size=size)

    @cached_property
    def _shardings(self) -> dict[str, Sharding]:
        return shardings_of(self._model)

    def _missing_buffers(self) -> dict[str, torch.Tensor]:
        present = self._parts[0]
        lacks_rotary = self._source.own_name(ROTARY) is None
        if not lacks_rotary and not family_of(self.config).has_cross_vision:
            return {}
        dtype = next(iter(present.values())).dtype
        computed = (name for name in self._model.state_dict() if is_computed(name) or (lacks_rotary and name == ROTARY))
        missing = [name for name in computed if name not in present]
        state = self._model.state_dict()
        return {name: state[name].to(dtype) for name in missing}


def elements(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the elements at flat positions, (n,); no more of a mapped tensor is read."""
    return tensor[torch.unravel_index(index, tensor.shape)] if tensor.dim() else tensor.reshape(1)[index]

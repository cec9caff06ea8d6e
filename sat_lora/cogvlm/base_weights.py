"""The weights of a model folder by name, each as a whole tensor, whatever the folder's kind and cut."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from sat_lora.cogvlm.checkpoint import open_folder, shardings_of
from sat_lora.cogvlm.hugging_face_folder import ROTARY, HuggingFaceFolder
from sat_lora.cogvlm.model import build_cogvlm
from sat_lora.errors import CheckpointError, ConfigError
from sat_lora.sharding import Sharding
from sat_lora.weight_files import Layout


class BaseWeights(Mapping[str, torch.Tensor]):
    """Mapped; a tensor takes memory when it is asked for and has to be joined. CheckpointError: a part is missing.

    trust: see `map_weights`.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False):
        self._source = open_folder(folder, trust=trust)
        self.config = self._source.config()
        self._parts = [self._source.map(rank) for rank in range(self._source.saved_ranks)]
        for number, part in enumerate(self._parts):
            problems = [f"{name}: not a tensor" for name, value in part.items() if not torch.is_tensor(value)]
            problems += [f"{name} only in some of them" for name in part.keys() ^ self._parts[0].keys()]
            if problems:
                file = self._source.files()[number]
                raise CheckpointError(f"{file}: cannot be used: {'; '.join(sorted(problems)[:20])}")
        # What a folder of the other kind leaves out because it is computed.
        self._computed = {} if self._source.own_name(ROTARY) else self._buffers()

    @property
    def hugging_face_config(self) -> dict | None:
        """The content of a Hugging Face folder's config.json; None for a SAT folder."""
        return self._source.own_config() if isinstance(self._source, HuggingFaceFolder) else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each."""
        return {name: shape for name, (shape, _) in self.layout.items()}

    @cached_property
    def layout(self) -> Layout:
        """Names, whole shapes and dtypes."""
        ranks = len(self._parts)
        known = {**self._parts[0], **self._computed}
        return {
            name: (
                self._sharding(name).full_shape(tensor.shape, ranks) if ranks > 1 else tuple(tensor.shape),
                tensor.dtype,
            )
            for name, tensor in known.items()
        }

    def layouts_for(self, ranks: int) -> list[Layout]:
        """What each of `ranks` model-parallel ranks holds. ConfigError: a size does not divide."""
        if ranks == 1:
            return [self.layout]
        uneven = [
            name
            for name, (shape, _) in self.layout.items()
            if self._sharding(name).saved_shape(torch.Size(shape), 1, ranks) is None
        ]
        if uneven:
            raise ConfigError(f"--model-parallel-size: {ranks} does not divide {', '.join(uneven[:8])}")
        own = {
            n: (self._sharding(n).saved_shape(torch.Size(s), 1, ranks), dtype) for n, (s, dtype) in self.layout.items()
        }
        return [own] * ranks

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._computed:
            return self._computed[name]
        parts = [part[name] for part in self._parts]
        return parts[0] if len(parts) == 1 else self._sharding(name).unshard(parts)

    def shard(self, name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """The part of a whole tensor that `rank` of `ranks` holds."""
        return whole if ranks == 1 else self._sharding(name).shard(whole, rank, ranks)

    def _sharding(self, name: str) -> Sharding:
        if name not in self._shardings:
            raise CheckpointError(f"{self._source.path}: {name} is no parameter of a CogVLM, so its cut is not known")
        return self._shardings[name]

    @cached_property
    def _model(self):
        return build_cogvlm(self.config, device="meta")

    @cached_property
    def _shardings(self) -> dict[str, Sharding]:
        return shardings_of(self._model)

    def _buffers(self) -> dict[str, torch.Tensor]:
        dtype = next(iter(self._parts[0].values())).dtype
        return {name: buffer.to(dtype) for name, buffer in self._model.named_buffers()}

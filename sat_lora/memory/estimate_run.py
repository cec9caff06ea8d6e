"""`estimate` for the options of a run."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_lora.cogvlm.checkpoints.load import read_config, shortened
from sat_lora.cogvlm.checkpoints.quantized_files import KEY
from sat_lora.cogvlm.families import family_of, is_published, published_config
from sat_lora.cogvlm.inputs.films import MOST_FRAMES, TOUCHING
from sat_lora.cogvlm.sizes import missing_sizes, size_problems
from sat_lora.errors import CheckpointError, ConfigError
from sat_lora.files.foreign import read_json
from sat_lora.lora.config import LoraConfig
from sat_lora.memory.components import Memory
from sat_lora.memory.estimate import estimate
from sat_lora.quantization.config import Quantization
from sat_lora.training.settings.config import TrainConfig
from sat_lora.training.settings.deepspeed_config import base_dtype, settle


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `estimate` and its parts take for a run."""

    sizes: dict[str, Any]
    lora: LoraConfig
    engine: dict[str, Any]
    """DeepSpeed's config."""
    data_parallel_size: int
    on_device: bool
    partition_quantized: bool
    """Whether ZeRO-3 shares quantised weights too."""
    step: Mapping[str, Any]
    """The arguments of `fake_step`, but for those that follow from `engine`."""

    @property
    def memory(self) -> Memory:
        """The estimate."""
        return estimate(self.sizes, self.lora, self.engine, **self.ranks, **self.step)

    @property
    def ranks(self) -> dict[str, Any]:
        """What `memory_of` takes beside the model, the engine's config and the activations."""
        return dict(
            data_parallel_size=self.data_parallel_size,
            on_device=self.on_device,
            partition_quantized=self.partition_quantized,
        )


def estimate_run(config: TrainConfig, *, ranks: int, device: str = "cuda", layers: int | None = None) -> Memory:
    """Return the memory of a rank among `ranks`. layers: of each transformer, at most. device: as for `settle`.

    Raises ConfigError and CheckpointError as a run does.
    """
    sizes = sizes_of(config.model.base)
    return plan_of(config, sizes if layers is None else shortened(sizes, layers), ranks=ranks, device=device).memory


def plan_of(config: TrainConfig, sizes: dict[str, Any], *, ranks: int, device: str = "cuda") -> Plan:
    """Return the plan of a run with a base of these sizes. Raises ConfigError as a run does."""
    mp_size = config.parallel.model_parallel_size
    if ranks < 1 or ranks % mp_size:
        raise ConfigError(f"--gpus: got {ranks}, wanted a multiple of --model-parallel-size {mp_size}")
    if config.problems:
        raise ConfigError("; ".join(config.problems))
    settled = settle(config, device=device, environ={"WORLD_SIZE": str(ranks)})
    config = settled.config
    length = config.model.max_length
    image = "an image"
    shortest = sizes["image_length"] + 4
    if family_of(sizes).takes_frames:
        image = f"the {MOST_FRAMES} frames of a film"
        number = 0 if config.model.version == TOUCHING else 1
        shortest = (sizes["image_length"] + 2 + number) * MOST_FRAMES + 2
    if length < shortest:
        raise ConfigError(f"--max_length: {length} is too short, {image} and two tokens take {shortest}")
    step = dict(
        dtype=base_dtype(config.precision),
        batch_size=config.schedule.batch_size,
        length=length,
        model_parallel_size=mp_size,
        checkpoint_activations=config.checkpointing.checkpoint_activations,
        vit_checkpoint_activations=config.checkpointing.vit_checkpoint_activations,
        checkpoint_offload=config.checkpointing.checkpoint_offload and device.startswith("cuda"),
        quantize=_quantization_of(config, sizes),
    )
    return Plan(
        sizes=sizes,
        lora=config.lora,
        engine=settled.engine,
        data_parallel_size=ranks // mp_size,
        on_device=device.startswith("cuda"),
        partition_quantized=config.quantization.quantize_partition,
        step=step,
    )


def _quantization_of(config: TrainConfig, sizes: dict) -> Quantization | None:
    """Return how the base of a run is quantised: as the options say, or as its folder was; None where it is whole."""
    asked = config.quantization.of(config.lora)
    if asked is None and KEY in sizes:
        return Quantization.from_dict(sizes[KEY])
    return asked


def sizes_of(path: str | Path) -> dict:
    """Return the content of a model_config.json, the sizes of the model in a folder, or of a published one by its name.

    Raises CheckpointError if it is neither.
    """
    path = Path(path)
    if is_published(path):
        return published_config(path.name)
    if path.suffix != ".json":
        return read_config(path)
    try:
        config = read_json(path)
        if not isinstance(config, dict) or not {"image_length", "eva_args", "num_layers"} <= config.keys():
            raise ValueError("no image_length, eva_args and num_layers in it; it is no CogVLM's")
        problems = size_problems(config) or [f"no {name}" for name in missing_sizes(config)]
        if problems:
            raise ValueError("; ".join(problems))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--from_pretrained: {path} cannot be read as a model_config.json: {error}") from error
    return config


def main() -> int:
    """Answer `memory_report`: a request as JSON on standard input, the answer as the last line of standard output."""
    request = json.load(sys.stdin)
    config = TrainConfig.of_flat(request.pop("settings"), request.pop("given"))
    print(json.dumps(dataclasses.asdict(estimate_run(config, **request))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

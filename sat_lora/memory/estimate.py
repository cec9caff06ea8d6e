"""The memory of a run that nobody has started: CogVLM's own code, run once on tensors without memory.

torch's fake tensors have shapes and storages of a size, and no bytes; its fake process group has as many ranks as one
likes, and does nothing. So a step of any size at any layout is counted as it would be, in seconds and on any machine.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from sat_lora._sat import mpu
from sat_lora.cogvlm.families import cross_image_size
from sat_lora.cogvlm.inputs.films import MOST_FRAMES
from sat_lora.cogvlm.network import recompute
from sat_lora.cogvlm.network.attention import CAUSAL
from sat_lora.cogvlm.network.head import LabelledRows
from sat_lora.cogvlm.network.model import CogVLMModel, build_cogvlm
from sat_lora.cogvlm.network.routing import TokenRouting
from sat_lora.lora.apply import add_lora
from sat_lora.lora.config import LoraConfig
from sat_lora.memory.components import Memory, memory_of
from sat_lora.memory.live_memory import LiveBytes
from sat_lora.parallel.distributed import destroy
from sat_lora.quantization.config import Quantization
from sat_lora.quantization.select import select_layers
from sat_lora.quantized.layers import put_quantized
from sat_lora.quantized.quantized_weight import QuantizedWeight
from sat_lora.training.steps.zero3_linear import linear_of_zero3


def estimate(
    config: dict,
    lora: LoraConfig,
    engine: dict,
    *,
    data_parallel_size: int = 1,
    on_device: bool = True,
    partition_quantized: bool = False,
    **step: Any,
) -> Memory:
    """Return the memory of a rank that trains, for a process without a process group of its own.

    config: content of a model_config.json. engine: DeepSpeed's config. on_device: False for a run on a CPU.
    partition_quantized: under ZeRO-3 quantised weights are partitioned as well. step: what `fake_step` takes. Raises
    ConfigError if the config or a target does not fit.
    """
    model, activations = fake_step(config, lora, **step, **ways_of(engine))
    return memory_of(
        model,
        engine,
        data_parallel_size=data_parallel_size,
        activations=activations,
        on_device=on_device,
        partition_quantized=partition_quantized,
    )


def ways_of(engine: dict) -> dict[str, Any]:
    """Return `partitioned` and `accumulated` of `fake_step` for a config of DeepSpeed's."""
    partitioned = engine.get("zero_optimization", {}).get("stage") == 3
    # ZeRO-3 keeps what comes beside its own memory, until a bucket is full.
    accumulated = not partitioned and engine.get("gradient_accumulation_steps", 1) > 1
    return dict(partitioned=partitioned, accumulated=accumulated)


def fake_model(
    config: dict,
    lora: LoraConfig,
    *,
    dtype: torch.dtype,
    model_parallel_size: int = 1,
    quantize: Quantization | None = None,
) -> CogVLMModel:
    """Return a rank's part of a model with adapters, without memory, for `memory_of`. The arguments: of `fake_step`."""
    with _in_fake_memory(config, lora, quantize, dtype=dtype, model_parallel_size=model_parallel_size) as model:
        return model


def fake_step(
    config: dict,
    lora: LoraConfig,
    *,
    dtype: torch.dtype,
    batch_size: int,
    length: int,
    labelled: int | None = None,
    model_parallel_size: int = 1,
    checkpoint_activations: bool = False,
    vit_checkpoint_activations: bool = False,
    checkpoint_offload: bool = False,
    partitioned: bool = False,
    accumulated: bool = False,
    quantize: Quantization | None = None,
) -> tuple[CogVLMModel, int]:
    """Return (the model, a rank's part of it without memory; bytes of activations at their peak).

    The step is one of `batch_size` rows of `length` tokens, each with an image, and `labelled` of them to be learnt, by
    default all but the image's. partitioned: as under ZeRO-3. accumulated: the gradients are added to those of a step
    before, which are not counted. checkpoint_offload: as on CUDA, where the host is not the device. quantize: how the
    base is quantised; a weight is then decoded as on a CPU, in parts.
    """
    switches = dict(
        checkpoint_activations=checkpoint_activations,
        vit_checkpoint_activations=vit_checkpoint_activations,
        checkpoint_offload=checkpoint_offload,
    )
    layout = dict(dtype=dtype, model_parallel_size=model_parallel_size)
    with (
        _in_fake_memory(config, lora, quantize, **layout, **switches) as model,
        _as_in_a_run(model, partitioned=partitioned),
    ):
        peak = _peak_of_a_step(model, config, batch_size, length, labelled)
        if accumulated:
            peak = _peak_of_a_step(model, config, batch_size, length, labelled)
        return model, peak


@contextmanager
def _in_fake_memory(
    config: dict, lora: LoraConfig, quantize: Quantization | None, *, model_parallel_size: int, **settings
) -> Iterator[CogVLMModel]:
    """Give the model with its adapters inside, where tensors have no memory. settings: those of `build_cogvlm`."""
    with _pretended_ranks(model_parallel_size):
        model = build_cogvlm(config, device="meta", model_parallel_size=model_parallel_size, **settings)
        layers = {} if quantize is None else select_layers(model, quantize)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _give_fake_memory(model)
            if quantize is not None:
                for layer in layers.values():
                    put_quantized(layer, QuantizedWeight.of(layer.weight, quantize.weight_scheme))
            add_lora(model, lora)
            yield model.train()


@contextmanager
def _pretended_ranks(model_parallel_size: int):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=model_parallel_size)
    mpu.initialize_model_parallel(model_parallel_size)
    try:
        yield
    finally:
        destroy()


def _give_fake_memory(model: CogVLMModel) -> None:
    """Give each parameter a fake tensor: on "meta" some operations of a step, such as autocast, refuse to run."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
                )
                fake.__dict__.update(parameter.__dict__)
                module._parameters[leaf] = fake


@contextmanager
def _as_in_a_run(model: CogVLMModel, *, partitioned: bool):
    """Let things be inside as in a run, not as on these tensors: recomputation without a GPU, ZeRO-3's own ways."""
    with ExitStack() as stack:
        # Both want real random states, on CUDA DeepSpeed's function for the layers too; they keep the same tensors.
        layers = partial(checkpoint, use_reentrant=True, preserve_rng_state=False)
        stack.enter_context(mock.patch.object(recompute, "checkpoint", layers))
        stack.enter_context(mock.patch.object(recompute, "HostCopy", _CopyElsewhere))
        rows = partial(checkpoint, preserve_rng_state=False)
        stack.enter_context(mock.patch.object(recompute, "checkpoint_in_one_graph", rows))
        if partitioned:
            for parameter in model.parameters():
                parameter.ds_id = None  # adapters then fuse no product with a weight
                parameter.ds_status = None
            # Its linear keeps the input, whether the weight trains or not.
            stack.enter_context(mock.patch.object(torch.nn.functional, "linear", linear_of_zero3))
        yield


class _CopyElsewhere:
    """Stands for `HostCopy`, of which a device knows nothing: all that is left is what the tensor was like."""

    def __init__(self, tensor: torch.Tensor):
        self._like = tensor.to("meta")

    def on_device(self) -> torch.Tensor:
        """Return a tensor like the one that was copied."""
        return torch.empty(self._like.shape, dtype=self._like.dtype)


def _peak_of_a_step(model: CogVLMModel, config: dict, rows: int, length: int, labelled: int | None) -> int:
    """Return the bytes of a forward and a backward pass at their peak, beside parameters and their gradients.

    A row has one image, or as many frames of a film as there can be, and as its length has room for.
    """
    patches = config["image_length"]
    vit = config["eva_args"]
    places = patches + 2
    each = max(1, min(MOST_FRAMES, (length - 1) // places)) if model.family.takes_frames else 1
    tokens = rows * length
    answers = rows * max(1, length - each * places) if labelled is None else rows * labelled
    ids = torch.zeros(rows, length, dtype=torch.int64)
    images = torch.zeros(rows * each, 3, *vit["image_size"])

    def indices(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64)

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
        cross_size = cross_image_size(config)
        more = {}
        if cross_size is not None:
            more = dict(cross_images=torch.zeros(rows, 3, *cross_size), cross_rows=indices(rows))
        routing = TokenRouting(indices(tokens), indices(tokens), rows * (patches + 1))
        seen = dict(
            **more,
            images=images,
            image_places=indices(rows * each * places),
            routing=routing if model.family.has_vision_experts else None,
            labelled=LabelledRows(indices(answers), indices(answers)),
        )
        _loss(model, ids, seen).backward()
    return live.peak


def _loss(model: CogVLMModel, ids: torch.Tensor, seen: dict) -> torch.Tensor:
    """Return the loss, a scalar, as in training.

    seen: what CogVLMModel.forward finds out by looking at its batch, here without values.
    """
    rope = model.mixins["rotary"].rotary_emb(ids, model.mixins["eva"].boi.dtype)
    return super(CogVLMModel, model).forward(ids, ids, None, **seen, rope=rope, attention_kind=CAUSAL)[0]

"""The memory of a run that nobody has started: CogVLM's own code, run once on tensors without memory.

torch's fake tensors have shapes and storages of a size, and no bytes; its fake process group has as many ranks as one
likes, and does nothing. So a step of any size at any layout is counted as it would be, in seconds and on any machine.
"""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from sat_lora._sat import mpu
from sat_lora.cogvlm.attention import CAUSAL
from sat_lora.cogvlm.model import CogVLMModel, build_cogvlm
from sat_lora.cogvlm.routing import TokenRouting
from sat_lora.config import LoraConfig
from sat_lora.doctor.live_memory import LiveBytes
from sat_lora.doctor.memory import Memory, memory_of
from sat_lora.placement import add_lora
from sat_lora.training.distributed import stop
from sat_lora.training.loss import answer_loss_sum
from sat_lora.training.zero3_linear import linear_of_zero3


def estimate(
    config: dict, lora: LoraConfig, engine: dict, *, data_parallel_size: int = 1, on_device: bool = True, **step
) -> Memory:
    """Of a rank that trains. config: content of a model_config.json. engine: DeepSpeed's config. step: `fake_step`'s.

    on_device: False for a run on a CPU. For a process without a process group of its own. ConfigError: the config or a
    target does not fit.
    """
    partitioned = engine.get("zero_optimization", {}).get("stage") == 3
    model, activations = fake_step(config, lora, partitioned=partitioned, **step)
    return memory_of(model, engine, data_parallel_size=data_parallel_size, activations=activations, on_device=on_device)


def fake_step(
    config: dict,
    lora: LoraConfig,
    *,
    dtype: torch.dtype,
    batch_size: int,
    length: int,
    model_parallel_size: int = 1,
    checkpoint_activations: bool = False,
    vit_checkpoint_activations: bool = False,
    partitioned: bool = False,
) -> tuple[CogVLMModel, int]:
    """(the model, a rank's part of it without memory; bytes of activations at their peak).

    The step is one of `batch_size` rows of `length` tokens, each with an image. partitioned: as under ZeRO-3.
    """
    with _pretended_ranks(model_parallel_size):
        model = build_cogvlm(
            config,
            device="meta",
            dtype=dtype,
            model_parallel_size=model_parallel_size,
            checkpoint_activations=checkpoint_activations,
            vit_checkpoint_activations=vit_checkpoint_activations,
        )
        with FakeTensorMode(allow_non_fake_inputs=True):
            _give_fake_memory(model)
            add_lora(model, lora)
            model.train()
            with _as_in_a_run(model, partitioned=partitioned):
                return model, _peak_of_a_step(model, config, batch_size, length)


@contextmanager
def _pretended_ranks(model_parallel_size: int):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=model_parallel_size)
    mpu.initialize_model_parallel(model_parallel_size)
    try:
        yield
    finally:
        stop()


def _give_fake_memory(model: CogVLMModel) -> None:
    """On the device "meta" some operations that a step makes, autocast for one, refuse to run."""
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
    """What a run would do otherwise than these tensors: recompute where there is no GPU, and ZeRO-3's own ways."""
    with ExitStack() as stack:
        # On CUDA SAT checkpoints with DeepSpeed's function, which wants real random states; it keeps the same tensors.
        function = partial(checkpoint, use_reentrant=True, preserve_rng_state=False)
        stack.enter_context(_replaced(sys.modules["sat.model.transformer"], "checkpoint", function))
        if partitioned:
            for parameter in model.parameters():
                parameter.ds_id = parameter.ds_status = None  # adapters then take over no product with a weight
            # Its linear keeps the input, whether the weight trains or not.
            stack.enter_context(_replaced(torch.nn.functional, "linear", linear_of_zero3))
        yield


@contextmanager
def _replaced(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _peak_of_a_step(model: CogVLMModel, config: dict, rows: int, length: int) -> int:
    """Bytes of a forward and a backward pass at their peak, parameters aside."""
    patches, vit = config["image_length"], config["eva_args"]
    places, vision, tokens = rows * (patches + 2), rows * (patches + 1), rows * length
    ids, whole = torch.zeros(rows, length, dtype=torch.int64), torch.empty
    images = torch.zeros(rows, 3, *vit["image_size"])
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        routing = TokenRouting(*(whole(count, dtype=torch.int64) for count in (vision, tokens - vision, tokens)))
        _loss(model, ids, images, routing, whole(places, dtype=torch.int64)).backward()
    return live.peak


def _loss(
    model: CogVLMModel, ids: torch.Tensor, images: torch.Tensor, routing: TokenRouting, places: torch.Tensor
) -> torch.Tensor:
    """As in training; given what CogVLMModel.forward finds out by looking at its batch, of which there are shapes."""
    rope = model.mixins["rotary"].rotary_emb(ids, model.mixins["eva"].boi.dtype)
    batch = dict(images=images, image_places=places, routing=routing, rope=rope, attention_kind=CAUSAL)
    return answer_loss_sum(super(CogVLMModel, model).forward(ids, ids, None, **batch)[0], ids)

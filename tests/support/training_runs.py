"""Five training steps of the tiny CogVLM, once by our engine in some layout and once in plain PyTorch in one process.

Both find named arrays: `loss` of every step, `logits`, the whole `gradient` and its `norm` of the first step, and the
whole adapter after the last with `SGD` and with `Adam`; and `initial file` and `file`, the bytes of the adapter's files
when fresh and when filled. B is not zero when training starts, and dropout is 0.
"""

from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from sat_lora import LoraConfig, add_lora, load_adapter, save_adapter
from sat_lora.adapters.save_load import whole_tensors
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.distributed import World, init_distributed, init_model_parallel, run_on_all_ranks
from sat_lora.parallel.sharding import gathered, model_parallel_layout, over_model_parallel
from sat_lora.training.steps.checkpoint import RunState, gather_checkpoint, save_checkpoint
from sat_lora.training.steps.engine import start_engine
from sat_lora.training.steps.loss import count_answer_tokens, sum_over_data_parallel
from sat_lora.training.steps.step import train_step
from tests.support.tiny import fill_adapters, logits_of, tiny_batch, tiny_model

CONFIG = LoraConfig(r=4, lora_alpha=8)
STEPS = 5
FILES = ("adapter_model.safetensors", "adapter_config.json")
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
}
BatchFor = Callable[[int, int], dict]  # from data-parallel rank and step


def engine_config(stage: int, micro_batch: int, accumulate: int = 1, clip: float = 0.0, bf16: bool = False) -> dict:
    return dict(
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulate,
        gradient_clipping=clip,
        # A threshold of 0, or parameters as small as these would all stay whole under ZeRO-3.
        zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        bf16=dict(enabled=bf16),
        steps_per_print=10**9,
    )


def mixed_batch(rank: int, step: int = 0) -> dict:
    """Rank 0 has images, every other is text-only, with another number of answer tokens."""
    if rank == 0:
        return tiny_batch((True, False), seed=step)
    return tiny_batch((False, False), seed=100 + step + 10 * rank, answer=2)


def image_batch(rank: int, step: int = 0) -> dict:
    return tiny_batch((True, False), seed=step + 10 * rank)


def text_batch(rank: int, step: int = 0) -> dict:
    return mixed_batch(rank + 1, step)


def joined(batches: list[dict]) -> dict:
    """The batches of all ranks as one."""
    keys = {key: None for batch in batches for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return {key: torch.cat([batch[key] for batch in batches if key in batch]) for key in keys}


def sgd(model: torch.nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def step_together(engine, batches: list[dict], world: World) -> float:
    """One `train_step` on this rank's micro-batches."""
    tokens = sum_over_data_parallel(sum(count_answer_tokens(b["labels"]) for b in batches), device=world.device)
    return train_step(engine, batches, world, *tokens).loss


def save_now(engine, folder: Path, state: RunState, world: World, samples: int, run: dict | None = None) -> None:
    """A checkpoint in `folder`, there on return; every rank has to call it."""
    gathered = gather_checkpoint(engine, state, world, samples, run=run)
    run_on_all_ranks(lambda: save_checkpoint(folder, gathered) if world.is_main else None)


def adapter_values(model: torch.nn.Module) -> dict[str, numpy.ndarray]:
    """The whole tensors of the adapter, in float32."""
    return {k: t.float().numpy() for n, a in adapters_of(model).items() for k, t in whole_tensors(n, a).items()}


def saved_files(model: torch.nn.Module, folder: str) -> list[bytes]:
    """The bytes of the adapter's files, as this layout writes them to `folder`."""
    save_adapter(model, folder)
    return [(Path(folder) / name).read_bytes() for name in FILES]


def train_in_layout(
    model_parallel: int,
    stage: int,
    checkpoint: bool,
    dtype: torch.dtype,
    batch_for: BatchFor,
    adapter: str,
    folder: str,
    model_of: Callable[..., torch.nn.Module] = tiny_model,
) -> dict:
    """What this rank finds. adapter: the file to start from; folder: an empty one. Every rank has to call it.

    model_of: makes the base, given a dtype and settings.

    With `rank`, of data parallelism, and `replicas agree`: whether what model-parallel ranks hold whole is the same on
    all of them.
    """
    world = init_model_parallel(init_distributed(), model_parallel)
    settings = dict(
        model_parallel_size=model_parallel, checkpoint_activations=checkpoint, vit_checkpoint_activations=checkpoint
    )
    fresh = model_of(dtype, **settings)
    add_lora(fresh, CONFIG)
    found = {"rank": world.data_parallel_rank, "initial file": saved_files(fresh, f"{folder}/initial")}
    agree = True
    for name, optimizer in OPTIMIZERS.items():
        model = model_of(dtype, **settings).train()
        load_adapter(model, adapter)
        parameters = [p for p in model.parameters() if p.requires_grad]
        engine = start_engine(model, optimizer(parameters), engine_config(stage, 2, bf16=dtype == torch.bfloat16))
        found["file"] = saved_files(engine.module, f"{folder}/loaded")
        run = _steps(engine, world, batch_for)
        found = {**run, **found, name: adapter_values(engine.module)}
        agree &= _replicas_agree(engine.module)
    return {**found, "replicas agree": agree}


def _steps(engine, world: World, batch_for: BatchFor) -> dict:
    """Steps by `train_step`, with a look at the logits before and, before the optimizer moves, at the gradients."""
    with torch.no_grad():
        logits = logits_of(engine, batch_for(world.data_parallel_rank, 0))
    found: dict = {"loss": {}, "logits": {"logits": logits.float().numpy()}}

    def see_gradient():
        found.setdefault("gradient", _whole_gradient(engine.module))
        norm = _norm_without_optimizer(engine)
        take_step()
        norm = engine.get_global_grad_norm() if norm is None else norm
        found.setdefault("norm", {"norm": numpy.array(float(norm))})

    take_step, engine.step = engine.step, see_gradient
    for step in range(STEPS):
        loss = step_together(engine, [batch_for(world.data_parallel_rank, step)], world)
        found["loss"][f"step {step}"] = numpy.array(loss)
    return found


def _whole_gradient(model: torch.nn.Module) -> dict[str, numpy.ndarray]:
    """The gradient of every adapter parameter, gathered to the full tensor, in float32."""
    from deepspeed.utils import safe_get_full_grad

    return {
        f"{name}.{leaf}": over_model_parallel(safe_get_full_grad(p), adapter.shardings[leaf]).float().numpy().copy()
        for name, adapter in adapters_of(model).items()
        for leaf, p in adapter.named_parameters()
    }


def _norm_without_optimizer(engine) -> torch.Tensor | None:
    """The norm that DeepSpeed 0.19.8 clips by at stage 0 in float32, where it has no optimizer of its own to ask."""
    from deepspeed.runtime.utils import clip_grad_norm_

    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    return clip_grad_norm_(engine.module.parameters(), max_norm=float("inf"), mpu=engine.mpu)


def worst_error(got: dict[str, numpy.ndarray], expected: dict[str, numpy.ndarray]) -> float:
    """The largest error of any value, relative to the largest value of its tensor; both of the same names."""
    if got.keys() != expected.keys():
        raise AssertionError(f"other tensors: {sorted(got.keys() ^ expected.keys())}")
    return max(float(abs(got[k] - expected[k]).max() / max(abs(expected[k]).max(), 1e-12)) for k in expected)


def _replicas_agree(model: torch.nn.Module) -> bool:
    """Whether every adapter parameter that model-parallel ranks hold whole is the same on all, bit for bit."""
    agree = True
    for adapter in adapters_of(model).values():
        with gathered(adapter.parameters()):
            for leaf, parameter in adapter.named_parameters():
                if adapter.shardings[leaf].dim is None and model_parallel_layout()[1] > 1:
                    mine = parameter.detach().view(torch.uint8).clone()
                    others = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
                    torch.distributed.all_gather(others, mine)
                    agree &= all(torch.equal(other, mine) for other in others)
    return agree


def train_alone(
    data_parallel: int,
    dtype: torch.dtype,
    batch_for: BatchFor,
    folder: str,
    model_of: Callable[..., torch.nn.Module] = tiny_model,
) -> dict:
    """The same on the joined batch of `data_parallel` ranks: in float64 for ranks in float32, so that what is between
    them is the ranks' rounding alone; in bf16 with float32 copies of the parameters for ranks in bf16.
    """
    init_model_parallel(init_distributed())
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    found: dict = {}
    for name, optimizer_of in OPTIMIZERS.items():
        model = model_of(dtype).train()
        add_lora(model, CONFIG)
        found["initial file"] = saved_files(model, f"{folder}/initial")
        fill_adapters(model, std=0.1)
        found["file"] = saved_files(model, f"{folder}/filled")
        if dtype == torch.float32:
            model.double()
        trained = [p for p in model.parameters() if p.requires_grad]
        masters = [p.detach().clone().to(wide).requires_grad_() for p in trained]
        optimizer, losses = optimizer_of(masters), {}
        for step in range(STEPS):
            batch = joined([batch_for(rank, step) for rank in range(data_parallel)])
            logits = logits_of(model, batch).to(wide)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            model.zero_grad()
            loss.backward()
            for master, parameter in zip(masters, trained):
                master.grad = parameter.grad.to(wide)
            if step == 0:
                named = ((f"{n}.{k}", p.grad) for n, a in adapters_of(model).items() for k, p in a.named_parameters())
                found["gradient"] = {key: gradient.to(wide).numpy().copy() for key, gradient in named}
                found["norm"] = {"norm": torch.stack([m.grad.double().norm() for m in masters]).norm().numpy()}
                found["logits"] = {"logits": logits.detach().numpy()}
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, trained):
                    parameter.copy_(master)
            losses[f"step {step}"] = numpy.array(loss.item())
        found = {"loss": losses, **found, name: adapter_values(model)}
    return found

"""The optimizer's state of every trained parameter as whole float32 tensors, whatever layout the run has.

DeepSpeed cuts masters and moments by ZeRO stage and number of ranks, SAT cuts by model parallelism. Whole tensors fit
them all, so that a run can go on in another layout. For AdamW.
"""

from collections.abc import Iterator

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from sat_lora.adapters.save_load import trained_of
from sat_lora.lora.apply import adapters_of
from sat_lora.parallel.sharding import Sharding, gathered, model_parallel_layout, over_model_parallel

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def create_moments(engine) -> None:
    """Give the optimizer its moments of zero, which torch's AdamW else makes at its first step.

    DeepSpeed can be asked for them only afterwards, and a run may have to save or to load before.
    """
    state = engine.basic_optimizer.state
    for master in stepped_tensors(engine):
        if not state[master]:
            state[master] = {"step": torch.tensor(0.0)} | {key: torch.zeros_like(master) for key in MOMENTS}
            for key in MOMENTS:
                state[master][key].requires_grad_(False)
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def optimizer_tensors(engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (`master.NAME`, `exp_avg.NAME` or `exp_avg_sq.NAME`; whole tensor) of every trained parameter.

    Every rank has to take all of them, since each is gathered from all.
    """
    for name, parameter, sharding in _trained(engine.module):
        for part in (MASTER, *MOMENTS):
            yield f"{part}.{name}", over_model_parallel(_read(engine, parameter, part), sharding)


@torch.no_grad()
def set_optimizer_tensors(engine, tensors: dict[str, torch.Tensor], steps: int) -> None:
    """Put back what `optimizer_tensors` gave, and Adam's count of steps. Every rank has to call it."""
    layout = model_parallel_layout()
    for name, parameter, sharding in _trained(engine.module):
        for part in (MASTER, *MOMENTS):
            own = sharding.shard(tensors[f"{part}.{name}"], *layout).to(parameter.device)
            _write(engine, parameter, part, own)
            if part == MASTER:
                with gathered([parameter], write=True):
                    parameter.copy_(own)
    for master in stepped_tensors(engine):
        engine.basic_optimizer.state[master]["step"].fill_(steps)


def optimizer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the whole shapes of `optimizer_tensors` by their names."""
    _, size = model_parallel_layout()
    return {
        f"{part}.{name}": sharding.full_shape(getattr(parameter, "ds_shape", parameter.shape), size)
        for name, parameter, sharding in _trained(model)
        for part in (MASTER, *MOMENTS)
    }


def steps_taken(engine) -> int:
    """Return how many steps the optimizer has taken; steps that were skipped do not count."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter, Sharding]]:
    """Return (name, parameter, how model parallelism cuts it) of all that train, in the order of the model."""
    cuts = {id(parameter): sharding for parameter, sharding in trained_of(model).values()}
    for adapter in adapters_of(model).values():
        cuts |= {id(getattr(adapter, leaf)): sharding for leaf, sharding in adapter.shardings.items()}
    return [(name, p, cuts[id(p)]) for name, p in model.named_parameters() if p.requires_grad]


def stepped_tensors(engine) -> list[torch.Tensor]:
    """Return the tensors that the wrapped optimizer itself steps: DeepSpeed's flat partitions, or the parameters."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 shows them only in its step
    groups = engine.basic_optimizer.param_groups
    return partitions or [parameter for group in groups for parameter in group["params"]]


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO holds the parameter's optimizer state, so that it has to be asked for it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _read(engine, parameter: nn.Parameter, part: str) -> torch.Tensor:
    """Return the master or a moment of a parameter, whole over data-parallel ranks. Every rank has to call it."""
    if not _is_partitioned(parameter):
        return parameter.detach() if part == MASTER else engine.basic_optimizer.state[parameter][part]
    if part == MASTER:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, part)


def _write(engine, parameter: nn.Parameter, part: str, value: torch.Tensor) -> None:
    """Set what `_read` gives. Every rank has to call it."""
    if not _is_partitioned(parameter):
        (parameter if part == MASTER else engine.basic_optimizer.state[parameter][part]).copy_(value)
    elif part == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, part)

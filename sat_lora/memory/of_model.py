"""The memory of a rank that trains a model at hand, SAT's or not, under any config of DeepSpeed's."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sat_lora.errors import ConfigError
from sat_lora.files.foreign import read_json
from sat_lora.memory.components import Memory, memory_of
from sat_lora.memory.live_memory import peak_of
from sat_lora.parallel.wrapped import require_trainable, unwrapped


def estimate(
    model: nn.Module,
    engine: Mapping[str, Any] | str | Path | None = None,
    *,
    data_parallel_size: int = 1,
    step: Callable[[], object] | None = None,
) -> Memory:
    """Return the bytes that a rank's device holds at the peak of a step, before any engine is made; `print` shows them.

    model: with its adapters, whole, on the device where it trains. It may lie on "meta", which takes no memory.
    engine: DeepSpeed's config, as a dict or the file; None for a plain loop with AdamW. data_parallel_size: of the run,
    in which this process may be alone. step: runs forward and backward once, on a batch of the run's size, to measure
    activations; without it they are not counted. Gradients and random states are what they were afterwards.
    Raises ConfigError where nothing trains, and for a config that is none.
    """
    inner = unwrapped(model, user="estimate")
    require_trainable(inner, user="estimate")
    config = _config(engine)
    if isinstance(data_parallel_size, bool) or not isinstance(data_parallel_size, int) or data_parallel_size < 1:
        raise ConfigError(f"estimate: data_parallel_size is {data_parallel_size!r}; wanted a whole number above 0")
    device = next(inner.parameters()).device
    activations = 0 if step is None else _activations(inner, step, device)
    on_device = device.type != "cpu"
    return memory_of(inner, config, data_parallel_size=data_parallel_size, activations=activations, on_device=on_device)


def _config(engine: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """Return DeepSpeed's config. Raises ConfigError if it cannot be read."""
    if isinstance(engine, str | Path):
        try:
            engine = read_json(engine)
        except (OSError, ValueError) as error:
            raise ConfigError(f"estimate: {engine} cannot be read as DeepSpeed's config: {error}") from error
    if engine is not None and not isinstance(engine, Mapping):
        raise ConfigError(f"estimate: DeepSpeed's config is a {type(engine).__name__}; wanted an object or its file")
    config = dict(deepcopy(engine or {}))
    zero = config.setdefault("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(f"estimate: zero_optimization is {zero!r}; wanted an object with a stage")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"estimate: zero_optimization.stage is {stage!r}; wanted 0, 1, 2 or 3")
    for name, value in zero.items():
        if value == "auto":
            raise ConfigError(f'estimate: zero_optimization.{name} is "auto", which only transformers fills in')
    return config


def _activations(model: nn.Module, step: Callable[[], object], device: torch.device) -> int:
    """Return the bytes of a step at their peak, beside parameters. Raises ConfigError for weights without memory."""
    if device.type == "meta":
        raise ConfigError("estimate: a model on meta cannot take a step; leave step out, or put the model on a device")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.zero_grad(set_to_none=True)
            peak = peak_of(step, model, device)
        finally:
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name]
    return math.ceil(peak)

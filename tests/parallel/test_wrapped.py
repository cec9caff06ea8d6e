"""The model is found inside of what torch puts around it, or what cannot be looked into is refused."""

import pytest
import torch

from sat_lora import ConfigError
from sat_lora.parallel.wrapped import unwrapped


class OptimizedModule(torch.nn.Module):
    """As torch.compile gives it, without its compiler."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


class FSDPModule(torch.nn.Module):
    """As the class that fully_shard gives a model is a child of it."""


class FSDPLinear(FSDPModule, torch.nn.Linear):
    pass


def test_the_model_is_found_in_wrappers_of_wrappers():
    model = torch.nn.Linear(2, 2)
    for around in (OptimizedModule(model), torch.nn.DataParallel(model), OptimizedModule(torch.nn.DataParallel(model))):
        assert unwrapped(around, user="save_adapter") is model
    assert unwrapped(model, user="save_adapter") is model


def test_a_model_in_fsdp_is_refused():
    with pytest.raises(ConfigError, match="^save_adapter: the model is in torch's FSDPModule, .* ZeRO stage 3"):
        unwrapped(FSDPLinear(2, 2), user="save_adapter")

"""The watchdog's trace of a model that takes no time."""

import torch

from sat_lora.watchdog.trace import Trace


def trace_of_a_linear(folder):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    return model, Trace(folder, model, rank=0, world_size=1)

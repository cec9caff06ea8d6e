"""How often the host waits for the device in a step: for the loss once, and where DeepSpeed does by itself.

Told on the CPU, by the operations that wait where there is a device: a value that is read, a tensor made of a number.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sat_lora import LoraConfig, add_lora
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.stop_signals import SIGNALS
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.loss import count_answer_tokens, sum_on_device
from sat_lora.training.steps.optimizer_state import create_moments
from sat_lora.training.steps.step import train_step, validate
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.support.training_runs import engine_config, mixed_batch

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)


class Waits(TorchDispatchMode):
    """Counts them by whose they are: ours, DeepSpeed's, the model's, the wrapped optimizer's (its count of steps)."""

    def __init__(self, engine):
        super().__init__()
        self.counts, self.whose = Counter(), "ours"
        self.attribute(engine, "backward", "DeepSpeed")
        self.attribute(engine, "step", "DeepSpeed")
        self.attribute(engine.module, "forward", "model")
        self.attribute(engine.basic_optimizer, "step", "optimizer")

    def attribute(self, owner, method, whose):
        call = getattr(owner, method)

        def attributed(*args, **kwargs):
            with self.doing(whose):
                return call(*args, **kwargs)

        setattr(owner, method, attributed)

    @contextmanager
    def doing(self, whose):
        before, self.whose = self.whose, whose
        yield
        self.whose = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[self.whose] += func in WAITS
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        to_list = torch.Tensor.tolist  # not dispatched

        def counted(tensor):
            self.counts[self.whose] += 1
            return to_list(tensor)

        torch.Tensor.tolist = counted
        self.restore = lambda: setattr(torch.Tensor, "tolist", to_list)
        return super().__enter__()

    def __exit__(self, *error):
        self.restore()
        return super().__exit__(*error)


def waits_of_a_step(stage, bf16, accumulate):
    """How often we wait in a step, DeepSpeed does, and we do in a validation over three batches."""
    world = init_model_parallel(init_distributed())
    model = tiny_model(torch.bfloat16 if bf16 else torch.float32)
    add_lora(model, LoraConfig(r=4, lr_ratio=4))  # two groups of the optimizer
    config = engine_config(stage, 2, accumulate, 1.0, bf16)
    engine = start_engine(model.train(), adapter_optimizer(model, lr=1e-2), config)
    create_moments(engine)
    waits, counts = Waits(engine), []
    for step in range(3):
        batches = [mixed_batch(0, accumulate * step + number) for number in range(accumulate)]
        answers = sum(count_answer_tokens(batch["labels"]) for batch in batches)
        waits.counts.clear()
        with waits:
            (tokens,) = sum_on_device(answers, device=world.device)
            train_step(engine, batches, world, tokens, signals=dict.fromkeys(SIGNALS, 0), counts=[0, False])
        counts.append((waits.counts["ours"], waits.counts["DeepSpeed"]))
    waits.counts.clear()
    batches = [mixed_batch(0, number) for number in range(3)]
    with waits:
        validate(engine, batches, world)
    return *counts[-1], waits.counts["ours"] - len(batches)  # whose answers are counted before they go to the device


@pytest.mark.parametrize(
    "stage, bf16, by_deepspeed",
    [
        (2, True, 0),
        *(
            pytest.param(*case, marks=pytest.mark.matrix)
            for case in ((0, False, 2), (1, False, 1), (2, False, 1), (1, True, 0))
        ),
    ],
)
def test_a_step_waits_for_the_loss_alone(stage, bf16, by_deepspeed):
    """DeepSpeed makes two constants of its clipping at stage 0; in float32 it looks once at the norm."""
    assert run_ranks(waits_of_a_step, 1, stage, bf16, 2) == [(1, by_deepspeed, 1)]

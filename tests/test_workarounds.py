"""What the workarounds of the package are for is so in the versions that are installed.

A test that fails means that a dependency does by itself what is done around it: the workaround that the test names may
go, for the versions that the package allows. What shows on a GPU alone, or takes an engine on several ranks, is read in
the dependency's source.
"""

import inspect

import deepspeed
import torch
from torch.nn import functional as F

from sat_lora import add_lora
from sat_lora._sat import ColumnParallelLinear, RMSNorm
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model


def source_of(thing) -> str:
    """The source without its comments and docstring, on one line."""
    lines = (line.partition("#")[0].strip() for line in inspect.getsource(thing).splitlines())
    return " ".join(filter(None, lines))


def test_deepspeed_compiles_its_all_reduce_for_cpu_ranks():
    """`_deepspeed.skip_shared_memory_build`"""
    from deepspeed.comm.torch import build_shm_op

    assert "builder" in source_of(build_shm_op)
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_deepspeed_takes_a_step_of_zeros_when_it_wraps_an_optimizer_in_half_precision():
    """`training/steps/engine.py::without_unfused_optimizer`"""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    source = source_of(FP16_UnfusedOptimizer.initialize_optimizer_states)
    assert "torch.zeros(param.size()" in source and "self.optimizer.step()" in source


def test_deepspeeds_throughput_timer_waits_for_the_device():
    """`training/steps/engine.py::without_waits`"""
    from deepspeed.utils.timer import ThroughputTimer

    assert "synchronize()" in source_of(ThroughputTimer.start) and "synchronize()" in source_of(ThroughputTimer.stop)


def test_zero_1_and_2_take_the_norm_of_each_gradient_by_itself():
    """`training/steps/zero_norm.py`"""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "torch.linalg.vector_norm(g.data.to(" in source_of(DeepSpeedZeroOptimizer.get_grad_norm_direct)


def test_the_linear_of_zero_3_rounds_twice():
    """`training/steps/zero3_linear.py`"""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 50, 8).bfloat16(), torch.randn(16, 8).bfloat16(), torch.randn(16).bfloat16()
    whole = F.linear(x.view(-1, 8), weight, bias).view(2, 50, 16)
    theirs = LinearFunctionForZeroStage3.apply(x, weight, bias)
    assert not torch.equal(theirs, whole)
    assert torch.equal(LinearFunctionForZeroStage3.apply(x.view(-1, 8), weight, bias).view(2, 50, 16), whole)


def test_zero_3_sends_each_whole_parameter_before_it_cuts_it():
    """`parallel/partitioned.py`"""
    from deepspeed.runtime.zero.partition_parameters import Init

    source = source_of(Init._zero_init_param)
    assert source.index("_convert_to_deepspeed_param(") < source.index("dist.broadcast(") < source.index(".partition()")


def destroyed_engine():
    """Whether an engine's hook is still on its model after the engine's end, and what it says of that end."""
    from sat_lora.training.steps.engine import adapter_optimizer, start_engine

    model = tiny_model()
    add_lora(model, r=2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    engine = start_engine(model, adapter_optimizer(model, lr=1e-3), config)
    engine.destroy()
    return engine.module_forward_pre_hook.id in model._forward_pre_hooks, [n for n in vars(engine) if "destroy" in n]


def test_an_engine_that_is_destroyed_leaves_its_hooks_on_the_model():
    """`training/steps/release.py` and `parallel/wrapped.py`"""
    assert run_ranks(destroyed_engine, 1) == [(True, [])]


def test_sats_parallel_layers_name_the_cpu(single_process_group):
    """`parallel/weightless.py`"""
    with torch.device("meta"):
        assert ColumnParallelLinear(4, 4).weight.device.type == "cpu"


def test_sats_transformer_sums_the_gradient_of_its_output_over_the_ranks():
    """`parallel/gradient_sum.py`"""
    from sat.model.transformer import BaseTransformer

    assert "copy_to_model_parallel_region(" in source_of(BaseTransformer.forward)


def test_sat_has_every_checkpointed_transformer_differentiated():
    """`cogvlm/network/recompute.py`"""
    from sat.model.transformer import BaseTransformer

    assert "hidden_states.requires_grad_(True)" in source_of(BaseTransformer.forward)


def test_sats_rms_norm_is_not_torchs_kernel():
    """`cogvlm/network/model.py`"""
    assert "rms_norm" not in source_of(RMSNorm.forward)


def test_sat_asks_cuda_for_what_a_cpu_has_not():
    """`_sat_on_cpu.py`"""
    from sat.mpu.data import broadcast_data
    from sat.training.utils import Timers

    assert "cuda" in source_of(broadcast_data) and "cuda.synchronize" in source_of(Timers)

"""What DeepSpeed does for each adapter parameter in a step: processor time at CogVLM-17B's depth, next to no width.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_deepspeed

First whole steps of ZeRO 0, 1 and 2 in turn, then one profile of each. A profile
makes every call dearer: its milliseconds say where time goes, those of whole steps how much.
"""

import argparse
import cProfile
import pstats
import statistics
import time

import torch

from benchmarks.bench_step import batch_of
from benchmarks.bench_watchdog import config_for
from benchmarks.interleaved import environment, measure
from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm import build_cogvlm
from sat_lora.parallel.distributed import World, destroy, init_distributed, init_model_parallel
from sat_lora.training.steps.engine import adapter_optimizer, start_engine
from sat_lora.training.steps.step import train_step

CPU = torch.device("cpu")
STAGES = (0, 1, 2)
TOKENS = 2
PARTS = {
    "grad_handling_hook": "a hook per gradient, at stage 2 into the bucket",
    "count_used_parameters_in_backward": "counting the hooks to expect",
    "average_tensor": "reducing a full bucket",
    "copy_grads_in_partition": "out of the bucket",
    "allreduce_gradients": "after the backward pass: reducing what is left, or all",
    "clip_grad_norm_": "stage 0: norm and clipping",
    "get_grad_norm_direct": "norm",
    "unscale_and_clip_grads": "clipping",
    "_update_model_bit16_weights": "parameters point into the flat buffer again",
    "nonfinite_gradients": "gradients that are not finite, looked for",
}


def engine_step(stage: int, config: dict, batch: dict, world: World):
    """(a work: one step by DeepSpeed's engine, how many parameters train)."""
    torch.manual_seed(0)
    model = build_cogvlm(config).train()
    add_lora(model, LoraConfig(r=4))
    settings = dict(
        train_micro_batch_size_per_gpu=1,
        gradient_clipping=1.0,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        steps_per_print=2**31,
        zero_optimization=dict(stage=stage, reduce_bucket_size=50_000_000),
    )
    engine = start_engine(model, adapter_optimizer(model, lr=1e-6), settings)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    return (lambda: train_step(engine, [batch], world, TOKENS)), trained


def profile(work, steps: int) -> dict[str, tuple[float, float]]:
    """(calls, milliseconds) in a step of each of PARTS, with what they call."""
    recorder = cProfile.Profile(time.process_time)
    recorder.enable()
    for _ in range(steps):
        work()
    recorder.disable()
    found: dict[str, tuple[float, float]] = {}
    for (_, _, name), (_, calls, _, cumulative, _) in pstats.Stats(recorder).stats.items():
        if name in PARTS:
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + calls / steps, before[1] + 1000 * cumulative / steps
    return found


def main(arguments: list[str] | None = None) -> dict[int, dict]:
    """Measure, print two tables, and return the parts by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profiled", type=int, default=5, help="steps of each profile")
    parser.add_argument("--size", choices=("demo", "deep"), default="deep")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config, world = config_for(args.size), init_model_parallel(init_distributed())
    batch = batch_of(config, 8, CPU, torch.float32)
    works = {}
    for stage in STAGES:
        works[stage], trained = engine_step(stage, config, batch, world)
    times = measure({str(stage): work for stage, work in works.items()}, args.repeats, CPU, "cpu")
    print(environment(CPU, "cpu"), f"{trained} parameters train")
    for stage, own in times.items():
        print(f"ZeRO {stage}: a step {1000 * statistics.median(own):.1f} ms, at the least {1000 * min(own):.1f} ms")
    parts = {stage: profile(work, args.profiled) for stage, work in works.items()}
    print("| part | " + " | ".join(f"ZeRO {stage}: calls, ms" for stage in STAGES) + " |\n|---|" + "---|" * len(STAGES))
    for name, what in PARTS.items():
        cells = [parts[stage].get(name) for stage in STAGES]
        shown = [f"{cell[0]:,.0f}, {cell[1]:.1f}" if cell else "" for cell in cells]
        print(f"| {what} (`{name}`) | " + " | ".join(shown) + " |")
    destroy()
    return parts


if __name__ == "__main__":
    main()

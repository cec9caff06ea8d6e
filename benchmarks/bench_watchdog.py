"""What the watchdog adds to a training step of CogVLM: hooks on modules and adapter parameters, and a thread.

    python -m benchmarks.bench_watchdog --repeats 40

`demo` is the demo's model; `deep` has as many layers, so as many hooks, as CogVLM-17B, and next to no width: its step
takes far less than a real one, the watchdog's part of it no less. Steps with and without are taken in turn.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.bench_step import training_step
from benchmarks.interleaved import CLOCKS, environment, join_alone, measure, progress
from benchmarks.models import batch_of, config_of
from sat_lora import LoraConfig, add_lora
from sat_lora.cogvlm import build_cogvlm
from sat_lora.cogvlm.checkpoints.load import read_config
from sat_lora.watchdog.trace import Trace
from sat_lora.watchdog.watchdog import watched_trace

SIZES = ("demo", "deep")
LAYERS = (32, 63)  # of CogVLM-17B's language model and vision transformer
DEMO = Path(__file__).parents[1] / "finetune_demo" / "tiny_cogvlm"


def config_for(size: str) -> dict:
    """The content of a model_config.json."""
    if size == "demo":
        return read_config(DEMO)
    config = config_of("tiny")
    config["num_layers"], config["eva_args"]["num_layers"] = LAYERS
    return config


def added(size: str, repeats: int, clock: str) -> dict:
    """Median seconds of a step without the watchdog, and of what it adds, with its first and third quartile."""
    device = torch.device("cpu")
    config = config_for(size)
    batch = batch_of(config, 8, device, torch.float32)
    models = {}
    for name in ("without", "with"):
        torch.manual_seed(0)
        models[name] = build_cogvlm(config)
        add_lora(models[name], LoraConfig(r=16))
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace(folder, models["with"], rank=0, world_size=1)
        works = {name: training_step(model, batch) for name, model in models.items()}

        def traced(step=works["with"]) -> None:
            for phase in ("data", "reduce", "forward", "backward", "reduce", "reduce", "optimizer", "save"):
                trace.at(phase)  # as often as a real step: the passes' own time does not matter here
            step()

        with watched_trace(trace, 120.0):
            times = measure({"without": works["without"], "with": traced}, repeats, device, clock)
    modules = sum(1 for _ in models["with"].modules())
    trained = sum(p.requires_grad for p in models["with"].parameters())
    difference = [after - before for before, after in zip(times["without"], times["with"])]
    step, extra = statistics.median(times["without"]), statistics.quantiles(difference, n=4)
    return dict(size=size, modules=modules, trained=trained, step=step, added=extra)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure every size, print a table, and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu: processor time, for busy machines")
    args = parser.parse_args(arguments)
    join_alone(torch.device("cpu"))
    torch.set_num_threads(1)
    rows = [added(size, args.repeats, args.clock) for size in progress(args.sizes, "watchdog")]
    print(environment(torch.device("cpu"), args.clock))
    print("| model | modules | adapter parameters | step without, ms | added, ms (quartiles) |\n|---|---|---|---|---|")
    for row in rows:
        low, middle, high = (1000 * value for value in row["added"])
        print(
            f"| {row['size']} | {row['modules']:,} | {row['trained']:,} | {1000 * row['step']:.1f} | "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return rows


if __name__ == "__main__":
    main()

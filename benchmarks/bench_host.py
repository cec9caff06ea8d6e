"""Host time: what Python and dispatch take on one CPU core, at widths at which arithmetic takes next to nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_host --out host.json --markdown

A GPU waits for this time wherever it exceeds that of its kernels. Three parts: one adapted linear against the frozen
one (sat_lora, PEFT, SAT's lora2), a training step at CogVLM-17B's depth, and a decoded token at that depth. Times are
processor time on one thread; of the interleaved repetitions the least counts, since a busy machine only adds. What a
watcher adds to a step is a few per cent: the median of its differences, repetition by repetition, shows that.
"""

import argparse
import contextlib
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from benchmarks.interleaved import Work, environment, join_alone, measure, progress, quartiles
from benchmarks.models import SIZES, batch_of, config_of, let_gradients_through
from benchmarks.report import table, write_json
from benchmarks.run_step import WATCHDOG_LIMIT, run_step
from benchmarks.variants import Shape, Variant, build
from sat_lora import LoraConfig, add_lora
from sat_lora._sat import BaseModel
from sat_lora.cogvlm import build_cogvlm
from sat_lora.cogvlm.decoding.generate import generate
from sat_lora.lora.mixin import lora_mixins
from sat_lora.training.steps.engine import adapter_optimizer
from sat_lora.training.steps.loss import answer_loss_sum
from sat_lora.watchdog.watchdog import watched_trace

BEFORE = Path(__file__).parent / "results" / "host_before.json"
CPU = torch.device("cpu")
WATCHED = ("ZeRO 2", "ZeRO 2, watch", "ZeRO 2, watch, watchdog")
SHAPES = {"plain": Shape(32, 32), "q/k/v": Shape(32, 96, 3)}
STEPS = ("frozen", "adapters", "adapters, AdamW", "ZeRO 0", "ZeRO 1", *WATCHED)
PARTS = ("linears", "steps", "watchers", "token")
DEPTH = (32, 63)  # of CogVLM-17B's language model and vision transformer
SHORTER = 4  # a step of so many times fewer layers, so often: few per cent show in the least of many short steps alone
CHECKPOINTING = {"without checkpointing": False, "with": True}
ADAPTED = ("sat_lora", "peft", "lora2")
ROWS, RANK = 8, 4
NEW_TOKENS = 8


@contextlib.contextmanager
def settled_garbage() -> Iterator[None]:
    """The objects that exist are left out of every collection inside: there are many models, and a run has one."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def least_seconds(works: dict[str, Work], repeats: int) -> dict[str, dict[str, float]]:
    """For each work the least and the median of its processor seconds over interleaved repetitions, and, as "added",
    the median of what it took more than the work before it in the same repetition.
    """
    with settled_garbage():
        times = measure(works, repeats, CPU, clock="cpu", warmup=2)
    seconds, before = {}, None
    for name, own in times.items():
        added = [now - then for now, then in zip(own, before or own)]
        seconds[name] = {"least": min(own), "median": quartiles(own)[1], "added": quartiles(added)[1]}
        before = own
    return seconds


def frozen_linear(shape: Shape) -> Variant:
    """The nn.Linear that PEFT adapts, which is called without SAT's hook and parallel linear."""
    linear = nn.Linear(shape.in_features, shape.out_features, bias=False).requires_grad_(False)
    return Variant(linear, [], list(linear.parameters()))


def one_linear(shape: Shape, calls: int, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of a call, forward and backward and forward without grad, of every variant."""
    x = torch.randn(ROWS, shape.in_features, requires_grad=True)
    grad = torch.randn(ROWS, shape.out_features)
    variants = {name: build(name, shape, RANK, 0.0, torch.float32, CPU) for name in ("frozen", *ADAPTED)}
    variants["nn.Linear"] = frozen_linear(shape)

    def both_passes(variant: Variant) -> Work:
        wanted = [x, *variant.trained]

        def work() -> None:
            for _ in range(calls):
                torch.autograd.grad(variant.call(x), wanted, grad)

        return work

    def forward_alone(variant: Variant) -> Work:
        def work() -> None:
            with torch.no_grad():
                for _ in range(calls):
                    variant.call(x)

        return work

    both = least_seconds({name: both_passes(variant) for name, variant in variants.items()}, repeats)
    alone = least_seconds({name: forward_alone(variant) for name, variant in variants.items()}, repeats)
    scale = 1e6 / calls
    return {name: {"both": scale * both[name]["least"], "no_grad": scale * alone[name]["least"]} for name in variants}


def thin_model(config: dict, *, checkpointing: bool = False, adapted: bool = True) -> BaseModel:
    """A CogVLM of that config in training mode; gradients flow down to its embeddings."""
    torch.manual_seed(0)
    model = build_cogvlm(
        config, checkpoint_activations=checkpointing, vit_checkpoint_activations=checkpointing
    ).requires_grad_(False)
    if adapted:
        add_lora(model, LoraConfig(r=RANK))
    let_gradients_through(model)
    return model.train()


def passes(model: nn.Module, batch: dict) -> Work:
    """A work: forward and backward; the gradients are forgotten."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def work() -> None:
        answer_loss_sum(model, batch).backward()
        for parameter in trained:
            parameter.grad = None

    return work


def passes_and_adamw(model: nn.Module, batch: dict) -> Work:
    """A work: forward, backward and AdamW's step."""
    optimizer = adapter_optimizer(model, lr=1e-6)

    def work() -> None:
        answer_loss_sum(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def steps(config: dict, checkpointing: bool, repeats: int, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds of the steps of those names, of STEPS, at the config's depth."""
    batch = batch_of(config, SIZES["thin"]["words"], CPU, torch.float32)

    def model(adapted: bool = True) -> BaseModel:
        return thin_model(config, checkpointing=checkpointing, adapted=adapted)

    def engine(stage: int, watch: bool = False) -> Work:
        return run_step(model(), batch, stage=stage, watch=watch).work

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def with_watchdog() -> Work:
            step = run_step(model(), batch, stage=2, trace_folder=Path(folder))
            stack.enter_context(watched_trace(step.trace, WATCHDOG_LIMIT))
            return step.work

        makers: dict[str, Callable[[], Work]] = {
            "frozen": lambda: passes(model(adapted=False), batch),
            "adapters": lambda: passes(model(), batch),
            "adapters, AdamW": lambda: passes_and_adamw(model(), batch),
            "ZeRO 0": lambda: engine(0),
            "ZeRO 1": lambda: engine(1),
            "ZeRO 2": lambda: engine(2),
            "ZeRO 2, watch": lambda: engine(2, watch=True),
            "ZeRO 2, watch, watchdog": with_watchdog,
        }
        return _milliseconds(least_seconds({name: makers[name]() for name in names}, repeats))


def _milliseconds(seconds: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: 1000 * value for key, value in own.items()} for name, own in seconds.items()}


def decoded_token(config: dict, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a token after the first, at batch 1, with the adapters off and on."""
    model = thin_model(config)
    batch = batch_of(config, SIZES["thin"]["words"], CPU, torch.float32)
    del batch["labels"]

    def answer(tokens: int, enabled: bool) -> Work:
        def work() -> None:
            for mixin in lora_mixins(model).values():
                mixin.enabled = enabled
            generate(model, batch, max_new_tokens=tokens, eos_token_id=-1)

        return work

    works = {(tokens, enabled): answer(tokens, enabled) for tokens in (1, 1 + NEW_TOKENS) for enabled in (False, True)}
    seconds = least_seconds(works, repeats)
    names = {False: "adapters off", True: "adapters on"}
    return {
        name: {
            key: 1000 * (seconds[1 + NEW_TOKENS, enabled][key] - seconds[1, enabled][key]) / NEW_TOKENS
            for key in ("least", "median")
        }
        for enabled, name in names.items()
    }


def added(linear: dict[str, dict[str, float]], passes: str) -> dict[str, float]:
    """Microseconds that each adapted variant takes beyond SAT's frozen linear."""
    return {name: linear[name][passes] - linear["frozen"][passes] for name in ADAPTED}


def goals(report: dict, before: dict | None) -> list[dict]:
    """What is wanted, the figure, and its limit, of the parts that were measured.

    PEFT's part is over SAT's frozen linear, the stricter of the two. before: an earlier report; its milliseconds are
    scaled by how long an nn.Linear takes now against then.
    """
    rows = []

    def goal(what: str, value: float, most: float) -> None:
        rows.append({"goal": what, "value": value, "most": most, "reached": value <= most})

    for what, linear, key, most in (
        ("plain linear, forward + backward, of PEFT's", "plain", "both", 0.7),
        ("plain linear, forward without grad, of PEFT's", "plain", "no_grad", 0.5),
        ("fused q/k/v, forward + backward, of PEFT's one pair", "q/k/v", "both", 1.0),
    ):
        own = added(report["linears"][linear], key)
        goal(what, own["sat_lora"] / own["peft"], most)
    for mode, works in report.get("steps", {}).items():
        least = {name: own["least"] for name, own in works.items()}
        if before is not None:
            old = before["steps"][mode]
            then = yardstick(report) / yardstick(before) * (old["adapters"]["least"] - old["frozen"]["least"])
            goal(f"step {mode}: adapters - frozen, of before", (least["adapters"] - least["frozen"]) / then, 0.5)
    for mode, works in report.get("watchers", {}).items():
        without, watch, watchdog = (works[name] for name in WATCHED)
        goal(f"step {mode}: gradient watch, of the step", watch["added"] / without["median"], 0.1)
        goal(f"step {mode}: watchdog, of the step", watchdog["added"] / watch["median"], 0.02)
    return rows


def yardstick(report: dict) -> float:
    """Microseconds of torch's own nn.Linear, forward and backward: how fast the machine was, whatever we changed."""
    return report["linears"]["plain"]["nn.Linear"]["both"]


def linear_table(report: dict, markdown: bool) -> str:
    """Microseconds added per linear, and the ratio to PEFT's."""
    header = ["linear", "added by", "forward + backward, us", "of PEFT's", "forward without grad, us", "of PEFT's"]
    rows = []
    for name, linear in report["linears"].items():
        both, alone = added(linear, "both"), added(linear, "no_grad")
        for variant in ADAPTED:
            ratios = [f"{own[variant] / own['peft']:.2f}" for own in (both, alone)]
            rows.append([name, variant, f"{both[variant]:.1f}", ratios[0], f"{alone[variant]:.1f}", ratios[1]])
        own = [linear["peft"][key] - linear["nn.Linear"][key] for key in ("both", "no_grad")]
        rows.append([name, "peft, over nn.Linear", f"{own[0]:.1f}", "", f"{own[1]:.1f}", ""])
        for frozen, label in (("frozen", "SAT's linear"), ("nn.Linear", "nn.Linear")):
            whole = [f"{linear[frozen][key]:.1f}" for key in ("both", "no_grad")]
            rows.append([name, f"({label} itself)", whole[0], "", whole[1], ""])
    return table(header, rows, markdown)


def step_table(report: dict, markdown: bool, part: str = "steps", what: str = "step") -> str:
    """Milliseconds of a step without and with checkpointing, least and median."""
    modes = report[part]
    names = next(iter(modes.values()))
    rows = [[name, *(_least_and_median(works[name]) for works in modes.values())] for name in names]
    return table([f"{what}, ms", *modes], rows, markdown)


def watcher_table(report: dict, markdown: bool) -> str:
    """The same of the shorter steps in which the watchers are told apart."""
    return step_table(report, markdown, "watchers", f"step of 1 / {SHORTER} of the layers")


def token_table(report: dict, markdown: bool) -> str:
    """Milliseconds of a token, least and median."""
    rows = [[name, _least_and_median(own)] for name, own in report["token"].items()]
    return table(["decoded token", "ms"], rows, markdown)


def _least_and_median(own: dict[str, float]) -> str:
    return f"{own['least']:.1f} ({own['median']:.1f})"


def goal_table(report: dict, markdown: bool) -> str:
    """A line per goal."""
    rows = [
        [row["goal"], f"{row['value']:.3f}", f"{row['most']:g}", "yes" if row["reached"] else "no"]
        for row in report["goals"]
    ]
    return table(["goal", "measured", "at most", "reached"], rows, markdown)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="the linears are always measured")
    parser.add_argument("--calls", type=int, default=50, help="of a linear, in one repetition")
    parser.add_argument("--repeats", type=int, default=40, help="of a linear")
    parser.add_argument("--step-repeats", type=int, default=30, help="of a step and of an answer")
    parser.add_argument(
        "--layers", nargs=2, type=int, default=list(DEPTH), metavar=("LANGUAGE", "VIT"), help="CogVLM-17B's are 32 63"
    )
    parser.add_argument("--quick", action="store_true", help="2 and 3 layers and few repetitions: to see that it runs")
    parser.add_argument("--before", type=Path, default=BEFORE, help="json of an earlier commit to compare with")
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print markdown tables")
    args = parser.parse_args(arguments)
    if args.quick:
        args.calls, args.repeats, args.step_repeats, args.layers = 2, 2, 1, [2, 3]
    return args


def deepened(config: dict, layers: list[int]) -> dict:
    """The config with so many layers of language model and vision transformer."""
    language, vision = layers
    return {**config, "num_layers": language, "eva_args": {**config["eva_args"], "num_layers": vision}}


def in_both_modes(config: dict, repeats: int, names: tuple[str, ...]) -> dict[str, dict]:
    """The steps without checkpointing and with."""
    return {
        mode: steps(config, checkpointing, repeats, names)
        for mode, checkpointing in progress(list(CHECKPOINTING.items()), "steps")
    }


def main(arguments: list[str] | None = None) -> dict:
    """Measure the parts, print their tables and the goals, write the json, and return it."""
    args = options(arguments)
    torch.set_num_threads(1)
    join_alone(CPU)
    config = deepened(config_of("thin"), args.layers)
    report = {"environment": environment(CPU, "cpu"), "layers": args.layers, "linears": {}}
    for name, shape in progress(list(SHAPES.items()), "linears"):
        report["linears"][name] = one_linear(shape, args.calls, args.repeats)
    tables = [linear_table]
    if "steps" in args.parts:
        report["steps"] = in_both_modes(config, args.step_repeats, STEPS)
        tables.append(step_table)
    if "watchers" in args.parts:
        shorter = deepened(config, [max(1, layers // SHORTER) for layers in args.layers])
        report["watchers"] = in_both_modes(shorter, SHORTER * args.step_repeats, WATCHED)
        tables.append(watcher_table)
    if "token" in args.parts:
        report["token"] = decoded_token(config, args.step_repeats)
        tables.append(token_table)
    before = json.loads(args.before.read_text()) if args.before.exists() else None
    comparable = before is not None and before["layers"] == args.layers
    report["goals"] = goals(report, before if comparable else None)
    for text in (*tables, goal_table):
        print(text(report, args.markdown), end="\n\n")
    if args.out:
        write_json(report, args.out)
    return report


if __name__ == "__main__":
    main()

"""What PEFT does on SAT's layers and models: the trials and timings behind docs/peft.md.

    python -m benchmarks.peft_on_sat                 # every trial, in words
    python -m benchmarks.peft_on_sat --markdown      # and writes results/peft_on_sat.json and the tables of the pages
    python -m benchmarks.peft_on_sat --parts speed   # one part alone

A trial is right, wrong by so much, or ends in an error, see tests/support/peft_trials.py. Some need two processes.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.bench_adapter import forward_and_backward
from benchmarks.bench_host import deepened, least_seconds, passes, thin_model
from benchmarks.interleaved import environment, join_alone, measure, saved_bytes, summarise
from benchmarks.models import SIZES, batch_of, config_of, random_model
from benchmarks.report import spread, write_json
from benchmarks.variants import LAYER, Shape, Variant, build, one_layer_model, randomise
from sat_lora import LoraConfig, add_lora
from tests.support import peft_trials
from tests.support.paths import ROOT
from tests.support.peft_layers import ParallelLora, PeftMixin, inject, linears_of, peft_config
from tests.support.peft_trials import Outcome
from tests.support.ranks import run_ranks

RESULTS = Path(__file__).parent / "results" / "peft_on_sat.json"
PAGES = {"en": ROOT / "docs" / "peft.md", "zh": ROOT / "docs" / "zh" / "peft.md"}
CPU = torch.device("cpu")
STAGES = range(4)
PARTS = ("layers", "megatron", "models", "split", "zero", "files", "hooks", "speed")
SHARES = ("all-linear", "names", "names after an error", "one pair")
"""Trials whose number is a share, not an error."""
RANKS = {False: 16, True: 4}
"""Of the timings, and whether they are of layers of width 32, of which a larger one costs more than the matrix."""
LINEARS = ("frozen", "sat_lora", "PEFT", "PEFT, custom module", "PEFT in a hook")
WHOLE = ("frozen", "sat_lora", "PEFT, custom module")


# The rows of the pages: names of trials, and what is said of them

ROWS: dict[str, dict[str, tuple[str, str]]] = {
    "layers": {
        "nn.Linear": ("`nn.Linear`", "`nn.Linear`"),
        "nn.Conv2d": ("`nn.Conv2d`, fresh", "`nn.Conv2d`（初始）"),
        "ColumnParallelLinear": ("`ColumnParallelLinear`", "`ColumnParallelLinear`"),
        "RowParallelLinear": ("`RowParallelLinear`", "`RowParallelLinear`"),
        "VocabParallelEmbedding": ("`VocabParallelEmbedding`", "`VocabParallelEmbedding`"),
        "column, lora.Linear": (
            "`ColumnParallelLinear`, PEFT's `lora.Linear` registered for it",
            "`ColumnParallelLinear`，为其注册 PEFT 的 `lora.Linear`",
        ),
        "row, lora.Linear": (
            "`RowParallelLinear`, PEFT's `lora.Linear` registered for it",
            "`RowParallelLinear`，为其注册 PEFT 的 `lora.Linear`",
        ),
        "column, ParallelLora": ("`ColumnParallelLinear`, `ParallelLora`", "`ColumnParallelLinear`，`ParallelLora`"),
        "q/k/v, ParallelLora": ("the same, fused q/k/v", "同上，融合的 q/k/v"),
        "row, ParallelLora": ("`RowParallelLinear`, `ParallelLora`", "`RowParallelLinear`，`ParallelLora`"),
    },
    "megatron": {
        "megatron_config": ("`megatron_config`, as it is", "`megatron_config`，原样"),
        "megatron_config, SAT under its name": (
            "SAT's `mpu` under the name `megatron.core`",
            "让 SAT 的 `mpu` 以 `megatron.core` 之名出现",
        ),
        "LoraParallelLinear": (
            "`LoraParallelLinear` by hand, SAT's classes",
            "手工构造 `LoraParallelLinear`，SAT 的类",
        ),
        "LoraParallelLinear, Megatron's arguments": (
            "... SAT's classes that take Megatron's arguments",
            "……SAT 的类，接受 Megatron 的参数",
        ),
        "LoraParallelLinear, A and B not drawn": (
            "... and `init_lora_weights=False`",
            "……并且 `init_lora_weights=False`",
        ),
        "LoraParallelLinear, two rows": ("... and a batch of two", "……并且批大小为 2"),
    },
    "models": {
        "CogVLM": (
            "CogVLM, all 32 linears: output, and the gradient of every A and B",
            "CogVLM，全部 32 个线性层：输出，以及每个 A、B 的梯度",
        ),
        "LLaMA": ("SAT's LLaMA, all 10 linears: the same", "SAT 的 LLaMA，全部 10 个线性层：同上"),
        "CogVLM, checkpointed": ("CogVLM, both towers recomputed", "CogVLM，两个塔均重计算"),
        "LLaMA, checkpointed": ("LLaMA, recomputed by SAT", "LLaMA，由 SAT 重计算"),
        "one pair": (
            "fused q/k/v, a pair of rank r for what is a pair each: what the best one misses",
            "融合的 q/k/v，用一对秩 r 代替各自一对：最好的一对所缺的部分",
        ),
        "rank 3 r": ("the same at rank 3 r, B block-diagonal", "同上，秩 3 r，B 为块对角"),
        "position embeddings": ("position embeddings of the ViT", "ViT 的位置嵌入"),
        "all-linear": (
            '`target_modules="all-linear"` on CogVLM: linears passed over in silence',
            'CogVLM 上的 `target_modules="all-linear"`：被默默略过的线性层',
        ),
        "names": ("base parameters renamed, of all", "被改名的基座参数，占全部"),
        "names after an error": (
            "... after an injection that ended in an error",
            "……在一次以错误结束的注入之后",
        ),
        "load, then inject": ("SAT's `load_checkpoint`, then PEFT", "先 SAT 的 `load_checkpoint`，后 PEFT"),
        "inject, then load for inference": (
            'PEFT, then `load_checkpoint` (`mode="inference"`)',
            '先 PEFT，后 `load_checkpoint`（`mode="inference"`）',
        ),
        "inject, then load for finetuning": ('... (`mode="finetune"`)', '……（`mode="finetune"`）'),
        "inject, then load with force_train": (
            "... with `force_train`: no error, the base not loaded",
            "……带 `force_train`：没有错误，基座没有加载",
        ),
        "in hooks, then load": (
            'LoHa by a mixin in the forward (see below), then `load_checkpoint` (`mode="finetune"`)',
            '由 mixin 把 LoHa 放进 forward（见下文），再 `load_checkpoint`（`mode="finetune"`）',
        ),
        "get_peft_model": ("`get_peft_model`: hooks and output", "`get_peft_model`：钩子与输出"),
        "mixins": (
            "... with `add_mixin`, `get_mixin`, `del_mixin` through it",
            "……并通过它调用 `add_mixin`、`get_mixin`、`del_mixin`",
        ),
        "merge_and_unload": ("... `merge_and_unload`", "……`merge_and_unload`"),
        "unload": ("... `unload`", "……`unload`"),
        "save_pretrained, config at hand": (
            "`save_pretrained`, `from_pretrained` with the custom modules registered again",
            "`save_pretrained`，`from_pretrained` 时再次注册自定义模块",
        ),
        "save_pretrained": ("... without", "……不注册"),
        "SAT's save, injected again": (
            "SAT's `save_checkpoint`, loaded into a model injected alike",
            "SAT 的 `save_checkpoint`，加载到同样注入过的模型",
        ),
        "SAT's save": ("... by SAT's `from_pretrained`", "……由 SAT 的 `from_pretrained` 加载"),
        "SAT's save of get_peft_model": ("... of a model from `get_peft_model`", "……来自 `get_peft_model` 的模型"),
    },
    "split": {
        "nn.Linear": ("`nn.Linear`", "`nn.Linear`"),
        "column, lora.Linear": ("column-parallel, `lora.Linear`", "列并行，`lora.Linear`"),
        "row, lora.Linear": ("row-parallel, `lora.Linear`", "行并行，`lora.Linear`"),
        "column, LocalSizes": (
            "column-parallel, `lora.Linear` with the sizes of the rank's part",
            "列并行，`lora.Linear`，取本 rank 部分的尺寸",
        ),
        "row, LocalSizes": ("row-parallel, the same", "行并行，同上"),
        "column, ParallelLora": ("column-parallel, `ParallelLora`", "列并行，`ParallelLora`"),
        "q/k/v, ParallelLora": ("fused q/k/v, `ParallelLora`", "融合的 q/k/v，`ParallelLora`"),
        "row, ParallelLora": ("row-parallel, `ParallelLora`", "行并行，`ParallelLora`"),
        "CogVLM": ("CogVLM, `ParallelLora`: output and every gradient", "CogVLM，`ParallelLora`：输出与每个梯度"),
        "LLaMA": (
            "LLaMA, the same (below its head SAT counts gradients twice, and so for any adapter)",
            "LLaMA，同上（其 head 以下 SAT 把梯度计两次，对任何适配器都如此）",
        ),
        "loaded on one rank": (
            "`save_pretrained` of a rank, loaded on one",
            "某个 rank 的 `save_pretrained`，在一个 rank 上加载",
        ),
        "joined rank by rank": (
            "B of q/k/v, the ranks' parts one after the other",
            "q/k/v 的 B，按 rank 依次拼接",
        ),
    },
    "zero": {
        **{f"{stage}, training": (f"ZeRO {stage}: three steps of SGD", f"ZeRO {stage}：三步 SGD") for stage in STAGES},
        **{
            f"{stage}, save_pretrained": (f"ZeRO {stage}: `save_pretrained`", f"ZeRO {stage}：`save_pretrained`")
            for stage in STAGES
        },
        "3, save_pretrained, gathered": (
            "ZeRO 3: the same inside `GatheredParameters`",
            "ZeRO 3：同上，在 `GatheredParameters` 之内",
        ),
        **{
            f"{stage}, branching": (
                f"ZeRO {stage}: the model skips experts, one rank without image",
                f"ZeRO {stage}：模型跳过专家，一个 rank 没有图像",
            )
            for stage in STAGES
        },
    },
    "files": {
        "export": (
            "`sat-lora export`, PEFT's `from_pretrained`: logits",
            "`sat-lora export`，PEFT 的 `from_pretrained`：logits",
        ),
        "export and import": ("... and `sat-lora import`: the bytes", "……再 `sat-lora import`：字节"),
        "import": (
            "PEFT's `save_pretrained`, `sat-lora import`: logits",
            "PEFT 的 `save_pretrained`，`sat-lora import`：logits",
        ),
        "import of DoRA": ("... of a DoRA", "……DoRA"),
        "import of LoHa": ("... of a LoHa", "……LoHa"),
        "import from SAT's names": (
            "... of what PEFT saved of a SAT model",
            "……PEFT 从 SAT 模型保存的内容",
        ),
    },
}
HEADS = {
    "layers": ("| one layer, one rank | outcome |", "| 单层，一个 rank | 结果 |"),
    "megatron": ("| Megatron's route | outcome |", "| Megatron 的途径 | 结果 |"),
    "models": ("| whole models, one rank | outcome |", "| 整个模型，一个 rank | 结果 |"),
    "split": ("| two model-parallel ranks | outcome |", "| 两个模型并行 rank | 结果 |"),
    "zero": ("| two data-parallel ranks | outcome |", "| 两个数据并行 rank | 结果 |"),
    "files": ("| files | outcome |", "| 文件 | 结果 |"),
    "hooks": (
        "| a tuner of PEFT in a hook | one rank: column | row | two ranks: column | row |",
        "| 钩子中的 PEFT 变体 | 一个 rank：列 | 行 | 两个 rank：列 | 行 |",
    ),
    "linears": (
        "| forward and backward of one linear | " + " | ".join(LINEARS[1:]) + " |",
        "| 单个线性层的前向与反向 | sat_lora | PEFT | PEFT，自定义模块 | PEFT，在钩子中 |",
    ),
    "steps": (
        "| forward and backward of a model | " + " | ".join(WHOLE[1:]) + " |",
        "| 整个模型的前向与反向 | sat_lora | PEFT，自定义模块 |",
    ),
}
WRONG = {"en": "**wrong** by {:.2g}", "zh": "**错**，误差 {:.2g}"}
RIGHT = {"en": "right ({:.0e})", "zh": "对（{:.0e}）"}
EXACT = {"en": "right, bit for bit", "zh": "对，逐位相同"}
STOPS = {
    peft_trials.ABORTS: {"en": "**aborts**: {}", "zh": "**中止**：{}"},
    peft_trials.HANGS: {"en": "**hangs**: {}", "zh": "**挂起**：{}"},
}


def shown(name: str, outcome: dict, language: str) -> str:
    """Return an outcome as a page shows it."""
    if outcome["verdict"] not in ("ok", "wrong"):
        text = outcome.get("text", "").replace("|", "\\|")
        if outcome["verdict"] in STOPS:
            return STOPS[outcome["verdict"]][language].format(f"`{text}`")
        fence = "``" if "`" in text else "`"
        return f"{fence}{outcome['verdict']}: {text}{fence}"
    if name in SHARES:
        return f"**{outcome['error']:.0%}**"
    if outcome["error"] == 0:
        return EXACT[language]
    return (RIGHT if outcome["verdict"] == "ok" else WRONG)[language].format(outcome["error"])


def tables(report: dict, language: str) -> dict[str, list[str]]:
    """Return the lines of each table of a page that the report has something for, by its part."""
    column = list(PAGES).index(language)
    rows: dict[str, list[list[str]]] = {
        part: [[texts[column], shown(name, report[part][name], language)] for name, texts in own.items()]
        for part, own in ROWS.items()
        if part in report
    }
    if "hooks" in report:
        cells = [f"{kind}, {ranks}" for ranks in (1, 2) for kind in peft_trials.CUT_KINDS]
        rows["hooks"] = [
            [name, *(shown("", report["hooks"][f"{name}, {cell}"], language) for cell in cells)]
            for name in peft_trials.VARIANTS
        ]
    for part, names in (("linears", LINEARS), ("steps", WHOLE)):
        cases = report.get("speed", {}).get(part, {})
        if cases:
            rows[part] = [[case, *(own[name]["shown"] for name in names[1:])] for case, own in cases.items()]
    lines = {}
    for part, own in rows.items():
        head = HEADS[part][column]
        lines[part] = [head, "|---" * (head.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in own)]
    return lines


def replace_tables(page: str, report: dict, language: str) -> str:
    """Return a page with the report's tables in place of its own. ValueError: it lacks one."""
    for lines in tables(report, language).values():
        before, head, after = page.partition(lines[0] + "\n")
        if not head:
            raise ValueError(f"the page has no table under {lines[0]}")
        _, gap, rest = after.partition("\n\n")
        page = before + "\n".join(lines) + (gap + rest if gap else "\n")
    return page


# Trials


def outcomes_of(trials: dict[str, Callable[[], float]]) -> dict[str, dict]:
    """Return the outcome of each trial."""
    return {name: Outcome.of(trial).as_json() for name, trial in trials.items()}


def on_one_rank(part: str) -> dict[str, dict]:
    """Return the outcomes of a part that needs this process alone."""
    if part == "layers":
        return outcomes_of(peft_trials.LAYER_TRIALS)
    if part == "megatron":
        return outcomes_of(peft_trials.MEGATRON_TRIALS)
    if part == "models":
        expected = {name: peft_trials.reference(name) for name in peft_trials.MODELS}
        return outcomes_of(peft_trials.model_trials(expected))
    if part == "files":
        trials = peft_trials.FILE_TRIALS
        return outcomes_of({name: partial(peft_trials.in_a_folder, trial) for name, trial in trials.items()})
    return outcomes_of(
        {
            f"{name}, {kind}, 1": partial(peft_trials.hooked, name, kind)
            for name in peft_trials.VARIANTS
            for kind in peft_trials.CUT_KINDS
        }
    )


def on_two_ranks() -> dict[str, dict]:
    """Return the outcomes on two model-parallel ranks, the worse of the two of each trial."""
    expected = {
        name: {key: tensor.numpy() for key, tensor in peft_trials.reference(name).items()}
        for name in peft_trials.MODELS
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(peft_trials.on_two_model_parallel_ranks, 2, expected, folder)
        alone = {
            "loaded on one rank": partial(peft_trials.loaded_whole, f"{folder}/0"),
            "joined rank by rank": peft_trials.joined_rank_by_rank,
        }
        return worse(*ranks) | outcomes_of(alone)


def under_zero(stage: int, branching: bool) -> dict[str, dict]:
    """Return the outcomes under one ZeRO stage on two data-parallel ranks."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return worse(*run_ranks(peft_trials.under_zero, 2, stage, branching, folder, timeout=60))
        except AssertionError as problem:  # a rank is gone, or waits for ever
            return {"training": peft_trials.aborted(str(problem)).as_json()}


def worse(first: dict[str, dict], second: dict[str, dict]) -> dict[str, dict]:
    """Return for each trial the outcome of the rank with the larger error; errors without a number count most."""
    return {name: max((first[name], second[name]), key=lambda own: own.get("error", torch.inf)) for name in first}


def zero() -> dict[str, dict]:
    """Return the outcomes under every ZeRO stage."""
    outcomes = {}
    for stage in STAGES:
        outcomes |= {f"{stage}, {name}": outcome for name, outcome in under_zero(stage, False).items()}
        outcomes[f"{stage}, branching"] = under_zero(stage, True)["training"]
    return outcomes


# Speed


def rank_for(width: int) -> int:
    """Return the rank that a layer of that width is timed with."""
    return RANKS[width <= 64]


def on_sat(shape: Shape, in_hook: bool) -> Variant:
    """Return a SAT linear with PEFT's LoRA on it: as a custom module, or by a mixin in its forward."""
    model = one_layer_model(shape, torch.float32, CPU)
    rank = rank_for(shape.in_features)
    config = peft_config([LAYER + shape.leaf], ParallelLora, r=rank, lora_alpha=2 * rank)
    if in_hook:
        config._custom_modules = None
        model.add_mixin("peft", PeftMixin(model, config, [LAYER + shape.leaf]))
    else:
        inject(config, model)
    trained = randomise([p for p in model.parameters() if p.requires_grad])
    model.train()
    hook = model.hooks["mlp_forward"]
    return Variant(lambda x: hook(x, layer_id=0), trained, list(model.parameters()))


def linear_variants(shape: Shape) -> dict[str, Variant]:
    """Return the linear of that shape in each of LINEARS."""
    made = {
        name: build(name.lower(), shape, rank_for(shape.in_features), 0.0, torch.float32, CPU)
        for name in ("frozen", "sat_lora", "PEFT")
    }
    return made | {LINEARS[3]: on_sat(shape, in_hook=False), LINEARS[4]: on_sat(shape, in_hook=True)}


def one_linear(shape: Shape, tokens: int, repeats: int) -> dict[str, dict]:
    """Return for each variant quartiles of its time over the frozen linear's, and what it keeps for backward."""
    x = torch.randn(tokens, shape.in_features, requires_grad=True)
    grad = torch.randn(tokens, shape.out_features)
    variants = linear_variants(shape)
    works = {name: forward_and_backward(variant, x, grad) for name, variant in variants.items()}
    results = summarise(measure(works, repeats, CPU, "cpu"), base="frozen")
    for name, variant in variants.items():
        kept = saved_bytes(partial(variant.call, x), variant.parameters) / (x.numel() * x.element_size())
        results[name] |= {"saved_per_input": kept, "shown": f"{spread(results[name]['ratio'])}, {kept:.2f} x"}
    return results


def host_time(shape: Shape, calls: int, repeats: int) -> dict[str, dict]:
    """Return for each variant the least microseconds of a call that it takes beyond the frozen linear."""
    x = torch.randn(8, shape.in_features, requires_grad=True)
    grad = torch.randn(8, shape.out_features)
    variants = linear_variants(shape)

    def work_of(variant: Variant) -> Callable[[], None]:
        once = forward_and_backward(variant, x, grad)

        def work() -> None:
            for _ in range(calls):
                once()

        return work

    seconds = least_seconds({name: work_of(variant) for name, variant in variants.items()}, repeats)
    us = {name: 1e6 / calls * own["least"] for name, own in seconds.items()}
    return {name: {"microseconds": own, "shown": f"+{own - us['frozen']:.0f} us"} for name, own in us.items()}


def adapted(name: str, model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """Return the frozen model adapted as one of WHOLE says, on all linears, B not zero."""
    if name == "sat_lora":
        add_lora(model, LoraConfig(r=rank))
    elif name != "frozen":
        inject(peft_config(linears_of(model), ParallelLora, r=rank, lora_alpha=2 * rank), model)
    randomise([p for p in model.parameters() if p.requires_grad])
    return model.train()


def one_step(size: str, layers: list[int] | None, repeats: int) -> dict[str, dict]:
    """Return for each of WHOLE quartiles of the time of forward and backward over the frozen model's."""
    config = config_of(size) if layers is None else deepened(config_of(size), layers)
    batch = batch_of(config, SIZES[size]["words"], CPU, torch.float32)
    works = {}
    for name in WHOLE:
        torch.manual_seed(0)
        model = thin_model(config, adapted=False) if layers is not None else random_model(config, torch.float32, CPU)
        works[name] = passes(adapted(name, model, rank_for(config["hidden_size"])), batch)
    results = summarise(measure(works, repeats, CPU, "cpu", warmup=1), base="frozen")
    return {name: {**own, "shown": spread(own["ratio"])} for name, own in results.items()}


def speed(quick: bool) -> dict[str, dict]:
    """Return the timings of linears and of whole models."""
    repeats = 2 if quick else 15
    side = 64 if quick else 1024
    linears = {
        f"{shape}, 1,280 tokens": one_linear(shape, 16 if quick else 1280, repeats)
        for shape in (Shape(side, side), Shape(side, 3 * side, 3))
    }
    linears |= {
        f"{shape}, 8 tokens": host_time(shape, 2 if quick else 50, repeats)
        for shape in (Shape(32, 32), Shape(32, 96, 3))
    }
    steps = {
        "2 + 4 layers of 1,024 and 512": one_step("tiny" if quick else "small", None, 2 if quick else 9),
        "32 + 63 layers of 32 (host time)": one_step("thin", [1, 1] if quick else [32, 63], 2 if quick else 9),
    }
    return {"linears": linears, "steps": steps}


def run(parts: list[str], quick: bool = False) -> dict:
    """Return the report of these parts."""
    report: dict = {}
    for part in parts:
        if part == "speed":
            report[part] = speed(quick)
        elif part == "zero":
            report[part] = zero()
        elif part != "split":
            report[part] = on_one_rank(part)
    if {"split", "hooks"} & set(parts):
        both = on_two_ranks()
        hooked = {f"{kind}, {name}" for name in peft_trials.VARIANTS for kind in peft_trials.CUT_KINDS}
        report["split"] = {name: outcome for name, outcome in both.items() if name not in hooked}
        for name in peft_trials.VARIANTS:
            for kind in peft_trials.CUT_KINDS:
                report.setdefault("hooks", {})[f"{name}, {kind}, 2"] = both[f"{kind}, {name}"]
    return report


def main(arguments: list[str] | None = None) -> dict:
    """Run the parts, print them, write the json and the pages where that is asked for, and return the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes for the timings: to see that they run")
    parser.add_argument("--markdown", action="store_true", help="write the json and the tables of both pages anew")
    args = parser.parse_args(arguments)
    if args.markdown and args.quick:
        parser.error("--markdown and --quick: the pages show whole timings; give one of them")
    torch.set_num_threads(1)
    join_alone(CPU)
    report = run(args.parts, args.quick)
    for part, own in report.items():
        for name, outcome in own.items():
            print(f"{part}: {name}: {shown(name, outcome, 'en') if part != 'speed' else timings(outcome)}")
    if args.markdown:
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        report = {**before, "environment": environment(CPU, "cpu"), **report}
        write_json(report, RESULTS)
        for language, page in PAGES.items():
            page.write_text(replace_tables(page.read_text(encoding="utf-8"), report, language), encoding="utf-8")
    return report


def timings(cases: dict[str, dict]) -> str:
    """Return the timings of a part as a line."""
    return "; ".join(
        f"{case}: " + ", ".join(f"{name} {own['shown']}" for name, own in variants.items())
        for case, variants in cases.items()
    )


if __name__ == "__main__":
    main()

"""A whole training step of CogVLM: forward, loss, backward and the optimizer's step on the adapters.

    python -m benchmarks.bench_step --out step.json --markdown
    python -m benchmarks.bench_step --size full --batch 4 --checkpointing --profile      # CogVLM-17B, 40 GB of a GPU
    python -m benchmarks.bench_step --size full --dtypes bf16 --quantize nf4 --batch 4 --checkpointing

Variants: `all-linear` is sat_lora's default, `attention` is sat_lora on what SAT's lora2 can reach (the language
expert's and the vision transformer's q/k/v and dense), and `lora2` is lora2 on the same linears. Each is attached to
the same weights, and taken in turn with `frozen`, the model with that variant switched off. In all of them gradients
flow down to the embeddings, so that all do the same work in the base. With --quantize the linears of all of them are
held in fewer bits (without lora2, which replaces layers), and beside the peak of a step stands the estimate of it.
"""

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from benchmarks.interleaved import (
    CLOCKS,
    DTYPES,
    Work,
    environment,
    join_alone,
    kernel_times,
    measure,
    peak_bytes,
    product_rate,
    progress,
    quartiles,
    saved_bytes,
)
from benchmarks.models import (
    SIZES,
    allow_checkpointing,
    answer_of,
    batch_of,
    checkpoint_activations,
    config_of,
    forward_flops,
    random_model,
)
from benchmarks.report import step_table, write_json
from benchmarks.variants import randomise
from sat_lora import LoraConfig, add_lora, quantize_model
from sat_lora._sat import BaseModel
from sat_lora.memory.estimate import fake_step
from sat_lora.quantization.config import NAMES as SCHEMES
from sat_lora.quantization.config import Quantization
from sat_lora.quantized.layers import bytes_of
from sat_lora.training.steps.loss import answer_loss_sum

NAMES = ("all-linear", "attention", "lora2")
TARGETS = {"all-linear": "all-linear", "attention": ("language-attention", "vit-attention")}
PRODUCT = {"cpu": 512, "cuda": 8192}  # rows and columns of the product that says how fast the device is
TOO_LARGE_TO_KEEP = ("full",)  # without checkpointing a batch would not fit beside the weights


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to measure. batch: samples, each of an image and `words` tokens of text."""

    rank: int
    dropout: float
    batch: int
    words: int
    checkpointing: bool
    profile: bool = False
    names: tuple[str, ...] = NAMES

    @classmethod
    def parse(cls, text: str) -> Callable[[int, int], "Case"]:
        """From "all-linear attention batch=4 dropout=0.05 checkpointing profile", once rank and words are known."""
        switches, numbers, names = set(), {"batch": 1, "dropout": 0.0}, []
        for entry in text.split():
            key, equals, value = entry.partition("=")
            if equals and key in numbers:
                numbers[key] = type(numbers[key])(value)
            elif entry in ("checkpointing", "profile"):
                switches.add(entry)
            elif entry in NAMES:
                names.append(entry)
            else:
                raise ValueError(f"{entry!r}: a case has names of {NAMES}, batch=, dropout=, checkpointing, profile")
        fields = dict(checkpointing="checkpointing" in switches, profile="profile" in switches)
        return lambda rank, words: cls(rank=rank, words=words, names=tuple(names) or NAMES, **numbers, **fields)


@dataclass(frozen=True)
class Adapted:
    """What a variant has added to the model. switch: puts it on or off."""

    trained: list[nn.Parameter]
    switch: Callable[[bool], None]


@contextmanager
def adapted(model: BaseModel, name: str, rank: int, dropout: float) -> Iterator[Adapted]:
    """Inside, the model is the variant of that name, neither A nor B zero; afterwards it is as it was."""
    fields = dict(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    attach = _lora2 if name == "lora2" else _sat_lora
    with attach(model, name, fields) as switch:
        trained = randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
        yield Adapted(trained, switch)
    gc.collect()


def towers(model: BaseModel) -> tuple[BaseModel, BaseModel]:
    """The language model and the vision transformer."""
    return model, model.mixins["eva"].vit_model


@contextmanager
def _sat_lora(model: BaseModel, name: str, fields: dict) -> Iterator[Callable[[bool], None]]:
    mixins = add_lora(model, LoraConfig(**fields, target_modules=TARGETS[name]))

    def switch(on: bool) -> None:
        for mixin in mixins:
            mixin.enabled = on

    try:
        yield switch
    finally:
        for tower in towers(model):
            if "lora" in tower.mixins:
                tower.del_mixin("lora")


@contextmanager
def _lora2(model: BaseModel, name: str, fields: dict) -> Iterator[Callable[[bool], None]]:
    """SAT's own mixin replaces `attention.query_key_value` and `attention.dense` of every layer; so does this.

    SAT copies the weights into its replacement; here that holds the original linear, so that they are shared.
    """
    from sat.model.finetune.lora2 import replace_linear_with_lora

    settings = (fields["r"], fields["lora_alpha"], fields["lora_dropout"])
    places = []
    for tower in towers(model):
        for layer in tower.transformer.layers:
            for leaf, slots in (("query_key_value", 3), ("dense", 1)):
                original = getattr(layer.attention, leaf)
                replaced = replace_linear_with_lora(original, slots, *settings).to(original.weight.device)
                replaced.original = original
                places.append((layer.attention, leaf, original, replaced))

    def switch(on: bool) -> None:
        for attention, leaf, original, replaced in places:
            setattr(attention, leaf, replaced if on else original)

    switch(True)
    try:
        yield switch
    finally:
        switch(False)


def training_step(model: nn.Module, batch: dict, trained: list[nn.Parameter] | None = None) -> Work:
    """A work: one step of AdamW on what trains, with a rate so small that the step can be repeated for ever.

    trained: what of the model trains, if not all that asks for gradients.
    """
    if trained is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_cuda = any(parameter.is_cuda for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=on_cuda) if trained else None

    def work():
        answer_loss_sum(model, batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return work


def estimated_peak(model: BaseModel, config: dict, case: Case, name: str, scheme: str) -> int:
    """The bytes that a step of the variant, which the model is, should take at most: what is held, and activations."""
    dtype = next(model.parameters()).dtype
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:  # the estimate wants no ranks about it
        activations = processes.submit(estimated_activations, config, case, name, dtype, scheme).result()
    held = sum(bytes_of(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    trained = sum(bytes_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return held + 3 * trained + activations  # the gradients, and Adam's two moments


def estimated_activations(config: dict, case: Case, name: str, dtype: torch.dtype, scheme: str) -> int:
    """The bytes of the activations of such a step at their peak."""
    _, activations = fake_step(
        config,
        LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=TARGETS[name]),
        dtype=dtype,
        batch_size=case.batch,
        length=config["image_length"] + 2 + case.words,
        labelled=answer_of(case.words),
        checkpoint_activations=case.checkpointing,
        vit_checkpoint_activations=case.checkpointing,
        quantize=Quantization(scheme=scheme),
    )
    return activations


def compare(
    model: BaseModel, config: dict, case: Case, repeats: int, clock: str, size: str, scheme: str | None = None
) -> dict:
    """One case: for every variant, quartiles of its seconds and of their ratio to the frozen step's beside it.

    With the number of `trained` parameters, `saved_bytes` of a forward pass (where the graph is kept and fits),
    `peak_bytes` of a step on CUDA, `flops` per second, and for a case with `profile` its kernels by kind. scheme: of a
    model whose weights are quantised, of which the `estimated_bytes` of a step are told as well.
    """
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    batch = batch_of(config, case.words, device, dtype, case.batch)
    checkpoint_activations(model, case.checkpointing)
    flops = (3 if case.checkpointing else 2) * forward_flops(config, case.batch, case.words)
    keeps_graph = not case.checkpointing and size not in TOO_LARGE_TO_KEEP
    results, all_frozen = {"frozen": {}}, []

    def kept(measured: dict, work: Work) -> dict:
        if keeps_graph:
            measured["saved_bytes"] = saved_bytes(lambda: answer_loss_sum(model, batch), model.parameters())
        peak = peak_bytes(work, device)
        return measured if peak is None else {**measured, "peak_bytes": peak}

    for name in case.names:
        with adapted(model, name, case.rank, case.dropout) as variant:
            works = {"frozen": training_step(model, batch, []), name: training_step(model, batch, variant.trained)}
            switches = {"frozen": lambda v=variant: v.switch(False), name: lambda v=variant: v.switch(True)}
            times = measure(works, repeats, device, clock, before=switches)
            seconds = quartiles(times[name])
            ratio = quartiles([own / frozen for own, frozen in zip(times[name], times["frozen"])])
            trained = sum(parameter.numel() for parameter in variant.trained)
            measured = dict(seconds=seconds, ratio=ratio, trained=trained, flops=flops / seconds[1])
            variant.switch(True)
            results[name] = kept(measured, works[name])
            if scheme is not None:
                results[name]["estimated_bytes"] = estimated_peak(model, config, case, name, scheme)
            if case.profile:
                results[name]["kernels"] = kernel_times(works[name], device)
            all_frozen += times["frozen"]
            if not results["frozen"]:
                variant.switch(False)
                results["frozen"] = kept(dict(trained=0), works["frozen"])
    seconds = quartiles(all_frozen)
    results["frozen"] |= dict(seconds=seconds, ratio=[1.0] * 3, flops=flops / seconds[1])
    shape = dict(batch=case.batch, words=case.words, checkpointing=case.checkpointing)
    return {
        "size": size,
        "dtype": _name_of(dtype),
        "rank": case.rank,
        "dropout": case.dropout,
        **shape,
        "variants": results,
    }


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, own in DTYPES.items() if own == dtype)


def build(config: dict, dtype: torch.dtype, device: torch.device, scheme: str | None = None) -> BaseModel:
    """The model whose weights all variants share, on a device where its layers can be recomputed.

    scheme: by which its linears are held in fewer bits; None leaves them whole.
    """
    allow_checkpointing(device)
    model = random_model(config, dtype, device)
    if scheme is not None:
        quantize_model(model, scheme=scheme)
    return model


def device_rate(device: torch.device, dtype: torch.dtype) -> dict:
    """How fast the device multiplies matrices: {"size": of them, "flops": per second}."""
    size = PRODUCT[device.type]
    return {"size": size, "flops": product_rate(device, dtype, size)}


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="small on a CPU, large (CogVLM's widths, fewer layers) on CUDA")
    parser.add_argument("--variants", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--batch", type=int, default=1, help="samples")
    parser.add_argument("--words", type=int, help="tokens of text in each, beside the image's")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the layers of both towers in backward")
    parser.add_argument("--profile", action="store_true", help="add the kernels' time by kind to the json")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=Case.parse,
        metavar="CASE",
        help='instead of --variants and the four above: "all-linear lora2 batch=4 dropout=0.05 checkpointing profile"',
    )
    parser.add_argument("--quantize", choices=SCHEMES, help="hold the linears in so few bits; leaves lora2 out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for busy CPU machines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of lines")
    return parser.parse_args(arguments)


def cases(args: argparse.Namespace, words: int) -> list[Case]:
    """What the options ask for."""
    if args.cases:
        chosen = [case(rank, words) for case in args.cases for rank in args.ranks]
        return [whole_layers(case) for case in chosen] if args.quantize else chosen
    fixed = dict(words=words, batch=args.batch, checkpointing=args.checkpointing, profile=args.profile)
    pairs = itertools.product(args.ranks, args.dropouts)
    chosen = [Case(rank=rank, dropout=dropout, names=tuple(args.variants), **fixed) for rank, dropout in pairs]
    return [whole_layers(case) for case in chosen] if args.quantize else chosen


def whole_layers(case: Case) -> Case:
    """The case without the variant that replaces layers."""
    return replace(case, names=tuple(name for name in case.names if name in TARGETS))


def main(arguments: list[str] | None = None) -> dict:
    """Run every case, print and write the results, and return them."""
    args = options(arguments)
    device = torch.device(args.device)
    join_alone(device)
    torch.manual_seed(args.seed)
    size = args.size or {"cpu": "small", "cuda": "large"}[device.type]
    config, words = config_of(size), args.words or SIZES[size]["words"]
    report = {"environment": environment(device, args.clock), "repeats": args.repeats, "product": {}, "cases": []}
    report |= {} if args.quantize is None else {"quantize": args.quantize}
    for dtype in args.dtypes:
        model = build(config, DTYPES[dtype], device, args.quantize)
        report["product"][dtype] = device_rate(device, DTYPES[dtype])
        for case in progress(cases(args, words), f"{dtype} steps"):
            try:
                report["cases"].append(compare(model, config, case, args.repeats, args.clock, size, args.quantize))
            except torch.OutOfMemoryError as error:
                report.setdefault("too_large", []).append({"dtype": dtype, **asdict(case), "error": str(error)})
            if args.out:
                write_json(report, args.out)  # after every case: a run that is ended has what came before
        del model
    print(step_table(report, markdown=args.markdown))
    return report


if __name__ == "__main__":
    main()

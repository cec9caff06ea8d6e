"""What PEFT does on SAT's layers and models, measured: each trial is one claim of docs/peft.md.

A trial gives an error, the largest over all values compared, each relative to the largest value of its tensor; or it
raises what PEFT, SAT or torch raised; or it never ends. References are computed from whole weights W + s B A by
autograd: dA = s B^T dW, dB = s dW A^T.
"""

import contextlib
import io
import re
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from peft.tuners import lora
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import nn

from sat_lora import add_lora, load_adapter, save_adapter
from sat_lora._sat import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, mpu
from sat_lora.adapters.format import WEIGHTS
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.interop.peft_export import export_to_peft
from sat_lora.interop.peft_import import import_from_peft
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.sharding import Sharding, gathered, model_parallel_layout, over_model_parallel, sharding_of
from tests.support.branching_cogvlm import branch_on_data
from tests.support.hf_tree import HuggingFaceTree
from tests.support.peft_layers import (
    LocalSizes,
    MegatronArguments,
    ParallelLora,
    PeftMixin,
    inject,
    linears_of,
    pairs_under_peft,
    peft_config,
    plain_linear,
    sat_as_megatron,
    shardings_under_peft,
)
from tests.support.plain_rotary import with_plain_rotary
from tests.support.sat_models import llama, run_language, settings
from tests.support.sat_subjects import sums_of_sat
from tests.support.tiny import CONFIG, fill_adapters, logits_of, randomise, seeded_noise, tiny_batch, tiny_model
from tests.support.training_runs import engine_config, image_batch, joined, mixed_batch

RIGHT = 1e-5
"""SAT's RMSNorm computes in float32; where there is none, errors are near 1e-16."""
ABORTS = "aborts"
HANGS = "hangs"
SCALE = 2.0
RANK = 4
LEAVES = ("A", "B")


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: `ok` or `wrong` with its error, `aborts`, `hangs`, or an exception's type and words."""

    verdict: str
    error: float | None = None
    text: str = ""

    @classmethod
    def of(cls, trial: Callable[[], float]) -> "Outcome":
        """Run a trial, which returns its error."""
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                error = float(trial())
        except Exception as problem:  # whatever is raised is what the page says
            return cls(type(problem).__name__, text=first_sentence(str(problem)))
        return cls("ok" if error <= RIGHT else "wrong", error)

    def as_json(self) -> dict:
        """Return what there is of verdict, error and text."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


def aborted(problem: str) -> Outcome:
    """Return the outcome of ranks of which one was gone, or did not answer, from what `run_ranks` said of them."""
    match = re.search(r"Received data size doesn't match expected size", problem)
    if match:
        return Outcome(ABORTS, text=match[0])
    return Outcome(HANGS if "no answer" in problem else ABORTS, text=first_sentence(problem.strip().split("\n")[-1]))


def first_sentence(text: str) -> str:
    """Return what an error says first, at most 150 characters of it."""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split()))[0]
    return sentence if len(sentence) <= 150 else sentence[:147] + "..."


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected value; infinite for other shapes."""
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def part(whole: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """Return this model-parallel rank's part of a tensor."""
    return sharding.shard(whole, *model_parallel_layout())


# One layer

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 18, bias=False),
    "column": lambda: ColumnParallelLinear(12, 18, bias=False, gather_output=False),
    "column, q/k/v": lambda: ColumnParallelLinear(12, 36, bias=False, gather_output=False, stride=3),
    "row": lambda: RowParallelLinear(12, 18, bias=False, input_is_parallel=True),
}
ROWS = 3


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


def noise(name: str, *shape: int) -> torch.Tensor:
    """Return seeded values of that shape in float64."""
    return seeded_noise(shape, 7, name).double()


class LayerProblem:
    """A layer with whole random W, A, B, input x and gradient dy of its output, and what has to come out."""

    def __init__(self, kind: str, rows: int = ROWS, makers: dict[str, Callable[[], nn.Module]] = KINDS):
        self.layer = makers[kind]().double()
        self.weight_sharding = sharding_of(self.layer, "weight")
        shape = self.weight_sharding.full_shape(self.layer.weight.shape, model_parallel_layout()[1])
        self.weight, self.x, self.dy = noise("W", *shape), noise("x", rows, 5, shape[1]), noise("dy", rows, 5, shape[0])
        self.a, self.b = noise("A", RANK, shape[1]), noise("B", shape[0], RANK)
        with torch.no_grad():
            self.layer.weight.copy_(part(self.weight, self.weight_sharding))

    @property
    def input_sharding(self) -> Sharding:
        """How the input is cut, along its last dimension."""
        return Sharding(2) if self.weight_sharding.dim == 1 else Sharding()

    @property
    def output_sharding(self) -> Sharding:
        """How the output is cut, along its last dimension, within each block of the weight's rows."""
        return Sharding(2, self.weight_sharding.blocks) if self.weight_sharding.dim == 0 else Sharding()

    def expected(self, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return this rank's parts of y and the gradients, with W + s B A or `weight` whole."""
        cut = shardings_under_peft(self.layer)
        x, a, b = (tensor.clone().requires_grad_() for tensor in (self.x, self.a, self.b))
        y = x @ (self.weight + SCALE * b @ a if weight is None else weight).T
        y.backward(self.dy)
        values = {"y": (y.detach(), self.output_sharding), "x": (x.grad, self.input_sharding)}
        if weight is None:
            values |= {"A": (a.grad, cut["A"]), "B": (b.grad, cut["B"])}
        return {name: part(*value) for name, value in values.items()}

    def results(self, call: Callable[[torch.Tensor], torch.Tensor], **trained: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return y and the gradients as the adapted layer gives them."""
        x = part(self.x, self.input_sharding).clone().requires_grad_()
        y = call(x)
        y.backward(part(self.dy, self.output_sharding))
        return {"y": y.detach(), "x": x.grad, **{name: tensor.grad for name, tensor in trained.items()}}

    def error(self, adapted: nn.Module) -> float:
        """Return the error of output and gradients of the layer under PEFT, whose A and B get the random values."""
        pair = {"A": adapted.lora_A["default"].weight, "B": adapted.lora_B["default"].weight}
        cut = shardings_under_peft(self.layer)
        with torch.no_grad():
            for leaf, whole in zip(LEAVES, (self.a, self.b)):
                pair[leaf].copy_(part(whole, cut[leaf]))
        return worst(self.results(adapted, **pair), self.expected())


def worst(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of any tensor; both have the same names."""
    if got.keys() != expected.keys():
        raise AssertionError(f"other tensors: {sorted(got.keys() ^ expected.keys())}")
    return max(relative_error(got[name], expected[name]) for name in expected)


def injected_layer(kind: str, custom: type | None = None) -> float:
    """Return the error of one layer, into which `inject_adapter_in_model` put LoRA."""
    problem = LayerProblem(kind)
    return problem.error(inject(peft_config(["layer"], custom), Holder(problem.layer)).layer)


def other_layer(layer: nn.Module, x: torch.Tensor) -> float:
    """Return how far the output of a layer with PEFT's fresh LoRA is from the layer's own."""
    expected = layer(x)
    return relative_error(inject(peft_config(["layer"]), Holder(layer)).layer(x), expected)


def megatron_route(kind: str, tensor_parallel: object | None = None) -> float:
    """Return the error of a layer under `megatron_config`; `tensor_parallel` is what PEFT finds as Megatron's."""
    problem = LayerProblem(kind)
    config = peft_config(["layer"], megatron_config=SimpleNamespace(), megatron_core="megatron.core")
    with contextlib.nullcontext() if tensor_parallel is None else sat_as_megatron(tensor_parallel):
        return problem.error(inject(config, Holder(problem.layer)).layer)


def megatron_layer(kind: str, backend: object, rows: int = ROWS, init_lora_weights: bool = False) -> float:
    """Return the error of PEFT's `LoraParallelLinear` around a SAT layer, put there by hand."""
    problem = LayerProblem(kind, rows)
    problem.layer.__class__ = backend.ColumnParallelLinear if kind == "column" else backend.RowParallelLinear
    config = peft_config(["layer"], init_lora_weights=init_lora_weights)
    adapted = LoraParallelLinear(
        problem.layer, "default", config, backend, r=RANK, lora_alpha=8, megatron_config=SimpleNamespace()
    )
    return problem.error(adapted.double())


MEGATRON = MegatronArguments("megatron")
LAYER_TRIALS: dict[str, Callable[[], float]] = {
    "nn.Linear": lambda: injected_layer("linear"),
    "nn.Conv2d": lambda: other_layer(nn.Conv2d(3, 8, 3), torch.ones(1, 3, 5, 5)),
    "ColumnParallelLinear": lambda: injected_layer("column"),
    "RowParallelLinear": lambda: injected_layer("row"),
    "VocabParallelEmbedding": lambda: other_layer(VocabParallelEmbedding(30, 8), torch.tensor([[1]])),
    "column, lora.Linear": lambda: injected_layer("column", lora.Linear),
    "row, lora.Linear": lambda: injected_layer("row", lora.Linear),
    "column, ParallelLora": lambda: injected_layer("column", ParallelLora),
    "q/k/v, ParallelLora": lambda: injected_layer("column, q/k/v", ParallelLora),
    "row, ParallelLora": lambda: injected_layer("row", ParallelLora),
}
MEGATRON_TRIALS: dict[str, Callable[[], float]] = {
    "megatron_config": lambda: megatron_route("column"),
    "megatron_config, SAT under its name": lambda: megatron_route("column", mpu),
    "LoraParallelLinear": lambda: megatron_layer("column", mpu),
    "LoraParallelLinear, Megatron's arguments": lambda: megatron_layer("row", MEGATRON, init_lora_weights=True),
    "LoraParallelLinear, A and B not drawn": lambda: megatron_layer("row", MEGATRON),
    "LoraParallelLinear, two rows": lambda: megatron_layer("row", MEGATRON, rows=2),
}
SPLIT_TRIALS: dict[str, Callable[[], float]] = {
    "nn.Linear": lambda: injected_layer("linear"),
    "column, lora.Linear": lambda: injected_layer("column", lora.Linear),
    "row, lora.Linear": lambda: injected_layer("row", lora.Linear),
    "column, LocalSizes": lambda: injected_layer("column", LocalSizes),
    "row, LocalSizes": lambda: injected_layer("row", LocalSizes),
    "column, ParallelLora": lambda: injected_layer("column", ParallelLora),
    "q/k/v, ParallelLora": lambda: injected_layer("column, q/k/v", ParallelLora),
    "row, ParallelLora": lambda: injected_layer("row", ParallelLora),
}


# A whole model


@dataclass(frozen=True)
class Subject:
    """A tiny SAT model: how to build it in float64, and what it gives for its batch."""

    build: Callable[..., nn.Module]
    run: Callable[[nn.Module], torch.Tensor]


def seeded_llama(**changes: object) -> nn.Module:
    """Return SAT's LLaMA in float64 with values that do not depend on the model-parallel size."""
    model = with_plain_rotary(llama(**changes))
    randomise(model, seed=0)
    return model.double()


def double_batch() -> dict:
    """Return a batch of the tiny CogVLM, one row with an image and one without, in float64."""
    batch = tiny_batch()
    return {**batch, "images": batch["images"].double()}


MODELS = {
    "CogVLM": Subject(lambda **s: tiny_model(torch.float64, **s), lambda model: logits_of(model, double_batch())),
    "LLaMA": Subject(seeded_llama, run_language),
}
CHECKPOINTED = {
    "CogVLM": dict(checkpoint_activations=True, vit_checkpoint_activations=True),
    "LLaMA": dict(checkpoint_activations=True),
}


def whole_pair(name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the seeded whole A (r, in) and B (out, r) of the layer of that name."""
    return 0.2 * noise(name + "A", RANK, shape[1]), 0.2 * noise(name + "B", shape[0], RANK)


def reference(model_name: str) -> dict[str, torch.Tensor]:
    """Return output and gradients of every A and B as merged weights give them, on one model-parallel rank."""
    subject = MODELS[model_name]
    model = subject.build().train().requires_grad_(False)
    names = linears_of(model)
    weights = {name: model.get_submodule(name).weight for name in names}
    pairs = {name: whole_pair(name, weight.shape) for name, weight in weights.items()}
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            weights[name].add_(SCALE * b @ a)
    for weight in weights.values():
        weight.requires_grad_(True)
    output = subject.run(model)
    output.double().pow(2).mean().backward()
    expected = {"output": output.detach()}
    for name, (a, b) in pairs.items():
        expected[f"{name}.A"] = SCALE * b.T @ weights[name].grad
        expected[f"{name}.B"] = SCALE * weights[name].grad @ a.T
    return expected


def adapted_model(model_name: str, custom: type = ParallelLora, **changes: object) -> nn.Module:
    """Return the model with PEFT's LoRA on all its linears, seeded A and B in it."""
    model = MODELS[model_name].build(**changes).train()
    inject(peft_config(linears_of(model), custom), model)
    fill_under_peft(model)
    return model


@torch.no_grad()
def fill_under_peft(model: nn.Module) -> None:
    """Give A and B of every layer under PEFT this rank's part of their seeded values."""
    _, size = model_parallel_layout()
    for name, layer in pairs_under_peft(model).items():
        base, cut = layer.get_base_layer(), shardings_under_peft(layer.get_base_layer())
        pair = whole_pair(name, sharding_of(base, "weight").full_shape(base.weight.shape, size))
        for leaf, whole in zip(LEAVES, pair):
            getattr(layer, f"lora_{leaf}")["default"].weight.copy_(part(whole, cut[leaf]))


def model_error(model_name: str, expected: dict[str, torch.Tensor], counted: int = 1, **changes: object) -> float:
    """Return the error of output and gradients of the model under PEFT against `reference`.

    counted: how often SAT itself counts gradients, on two model-parallel ranks, see `sat_subjects.sums_of_sat`.
    """
    model = adapted_model(model_name, **changes)
    output = MODELS[model_name].run(model)
    output.double().pow(2).mean().backward()
    got = {"output": output.detach()}
    mine = {"output": expected["output"]}
    for name, layer in pairs_under_peft(model).items():
        cut = shardings_under_peft(layer.get_base_layer())
        for leaf in LEAVES:
            got[f"{name}.{leaf}"] = getattr(layer, f"lora_{leaf}")["default"].weight.grad
            mine[f"{name}.{leaf}"] = counted * part(expected[f"{name}.{leaf}"], cut[leaf])
    return worst(got, mine)


def left_out_by_all_linear() -> float:
    """Return the share of a CogVLM's linears that `all-linear` passes over without a word."""
    model = MODELS["CogVLM"].build()
    wanted = len(linears_of(model))
    return 1 - len(pairs_under_peft(inject(peft_config("all-linear"), model))) / wanted


def renamed(targets: list[str] | str, custom: type | None) -> float:
    """Return the share of the base's names that are gone after an injection, be it one that failed."""
    model = MODELS["CogVLM"].build()
    before = set(model.state_dict())
    with contextlib.suppress(ValueError):
        inject(peft_config(targets, custom), model)
    return len(before - set(model.state_dict())) / len(before)


def loaded(mode: str, inject_first: bool, force_train: bool = False, in_hooks: bool = False) -> float:
    """Return how far logits are from the checkpoint's, when SAT loads it before or after PEFT's injection (B is 0)."""

    def put_peft_on(model: nn.Module) -> None:
        if in_hooks:
            model.add_mixin("peft", PeftMixin(model, VARIANTS["LoHa"](), linears_of(model)))
        else:
            inject(peft_config(linears_of(model), ParallelLora), model)

    from sat.training.model_io import load_checkpoint

    trained = MODELS["LLaMA"].build()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        (Path(folder) / "1").mkdir()
        (Path(folder) / "latest").write_text("1")
        torch.save({"module": trained.state_dict()}, Path(folder) / "1" / "mp_rank_00_model_states.pt")
        model = with_plain_rotary(llama()).double()
        if inject_first:
            put_peft_on(model)
        load_checkpoint(model, Namespace(mode=mode, load=folder, force_train=force_train))
        if not inject_first:
            put_peft_on(model)
        return relative_error(run_language(model.eval()), run_language(trained.eval()))


def without_effect(target: str) -> float:
    """Return how far logits are from those of W + s (B A)^T, with PEFT's LoRA on an embedding of the CogVLM."""
    model = MODELS["CogVLM"].build().eval()
    merged = MODELS["CogVLM"].build().eval()
    inject(peft_config([target]), model)
    ((name, layer),) = pairs_under_peft(model).items()
    a, b = (getattr(layer, f"lora_embedding_{leaf}")["default"] for leaf in LEAVES)
    with torch.no_grad():
        b.copy_(noise("B", *b.shape))
        a.copy_(noise("A", *a.shape))
        merged.get_submodule(name).weight.add_(SCALE * (b @ a).T)
        run = MODELS["CogVLM"].run
        return relative_error(run(model), run(merged))


def peft_model(model: nn.Module) -> peft.PeftModel:
    """Return PEFT's model around a SAT model, with seeded A and B on all its linears."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft_config(linears_of(model), ParallelLora))
    fill_under_peft(model)
    return wrapped


def wrapped_error(expected: torch.Tensor, after: Callable[[peft.PeftModel], nn.Module]) -> float:
    """Return the error of a LLaMA's output under `get_peft_model`, of what `after` makes of it."""
    with torch.no_grad():
        return relative_error(run_language(after(peft_model(MODELS["LLaMA"].build().eval()))), expected)


def with_mixin_added(model: peft.PeftModel) -> nn.Module:
    """Return the model after SAT's `add_mixin`, `get_mixin` and `del_mixin` through PEFT's wrapper."""
    from sat.model.finetune.prompt_tuning import PrefixTuningMixin

    model.add_mixin("prefix", PrefixTuningMixin(2, 8, 4, 2))
    model.get_mixin("prefix")
    model.del_mixin("prefix")
    return model


def saved_and_loaded(expected: torch.Tensor, config_at_hand: bool) -> float:
    """Return the error of the output after `save_pretrained` and `from_pretrained` onto a plain LLaMA."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        peft_model(MODELS["LLaMA"].build().eval()).save_pretrained(folder)
        plain = MODELS["LLaMA"].build().eval()
        config = peft_config(linears_of(plain), ParallelLora) if config_at_hand else None
        return relative_error(run_language(peft.PeftModel.from_pretrained(plain, folder, config=config)), expected)


def saved_by_sat(wrap: bool) -> float:
    """Return how far the logits are from what was saved, after SAT's `save_checkpoint` and `from_pretrained`."""
    from sat.model.official.llama_model import LLaMAModel
    from sat.training.model_io import save_checkpoint

    base = MODELS["LLaMA"].build().eval()
    model = peft_model(base) if wrap else base
    if not wrap:
        inject(peft_config(linears_of(base), ParallelLora), base)
        fill_under_peft(base)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        args = settings(mode="inference", save=folder, device="cpu", use_bias=False)
        save_checkpoint(1, model, None, None, args)
        loaded_model, _ = LLaMAModel.from_pretrained(folder, args=args)
        return relative_error(run_language(with_plain_rotary(loaded_model).double().eval()), run_language(base))


def saved_by_sat_and_injected() -> float:
    """Return the error of A and B after SAT's `save_checkpoint`, and its `load_checkpoint` into an injected model."""
    from sat.training.model_io import load_checkpoint, save_checkpoint

    trained = adapted_model("LLaMA")
    other = inject(peft_config(linears_of(MODELS["LLaMA"].build()), ParallelLora), MODELS["LLaMA"].build())
    with tempfile.TemporaryDirectory() as folder:
        args = settings(mode="inference", save=folder, load=folder)
        save_checkpoint(1, trained, None, None, args)
        load_checkpoint(other, args)
    return worst(values_under_peft(other), values_under_peft(trained))


def best_single_pair() -> float:
    """Return what is missing from the best pair of rank r in place of r for each of q, k and v, as a share of it."""
    pairs = [whole_pair(f"slot {slot}", (64, 64)) for slot in "qkv"]
    delta = torch.cat([b @ a for a, b in pairs])
    values = torch.linalg.svdvals(delta)
    return float(values[RANK:].norm() / values.norm())


def best_triple_rank() -> float:
    """Return the same for a pair of rank 3 r, A stacked and B block-diagonal."""
    pairs = [whole_pair(f"slot {slot}", (64, 64)) for slot in "qkv"]
    delta = torch.cat([b @ a for a, b in pairs])
    return relative_error(torch.block_diag(*(b for _, b in pairs)) @ torch.cat([a for a, _ in pairs]), delta)


def model_trials(expected: dict[str, dict[str, torch.Tensor]]) -> dict[str, Callable[[], float]]:
    """Return the trials of whole models on one rank; expected: `reference` of each of MODELS."""
    llama_output = expected["LLaMA"]["output"]
    every_linear = linears_of(MODELS["CogVLM"].build())
    half_way = ["mixins.patch_embedding.proj", "linear_proj.gate_proj", "query_key_value"]
    return {
        "CogVLM": partial(model_error, "CogVLM", expected["CogVLM"]),
        "LLaMA": partial(model_error, "LLaMA", expected["LLaMA"]),
        "CogVLM, checkpointed": partial(model_error, "CogVLM", expected["CogVLM"], **CHECKPOINTED["CogVLM"]),
        "LLaMA, checkpointed": partial(model_error, "LLaMA", expected["LLaMA"], **CHECKPOINTED["LLaMA"]),
        "one pair": best_single_pair,
        "rank 3 r": best_triple_rank,
        "position embeddings": partial(without_effect, "position_embeddings"),
        "all-linear": left_out_by_all_linear,
        "names": partial(renamed, every_linear, ParallelLora),
        "names after an error": partial(renamed, half_way, None),
        "load, then inject": partial(loaded, "finetune", False),
        "inject, then load for inference": partial(loaded, "inference", True),
        "inject, then load for finetuning": partial(loaded, "finetune", True),
        "inject, then load with force_train": partial(loaded, "finetune", True, True),
        "in hooks, then load": partial(loaded, "finetune", True, in_hooks=True),
        "get_peft_model": partial(wrapped_error, llama_output, lambda model: model),
        "mixins": partial(wrapped_error, llama_output, with_mixin_added),
        "merge_and_unload": partial(wrapped_error, llama_output, lambda model: model.merge_and_unload()),
        "unload": unloaded,
        "save_pretrained, config at hand": partial(saved_and_loaded, llama_output, True),
        "save_pretrained": partial(saved_and_loaded, llama_output, False),
        "SAT's save, injected again": saved_by_sat_and_injected,
        "SAT's save": partial(saved_by_sat, False),
        "SAT's save of get_peft_model": partial(saved_by_sat, True),
    }


def unloaded() -> float:
    """Return how far a LLaMA's output is from the base's, once PEFT has taken its layers away again."""
    base = run_language(MODELS["LLaMA"].build().eval()).detach()
    return wrapped_error(base, lambda model: model.unload())


# Files

TRAINED = r".*(query_key_value|fc1|down_proj)"
"""Layers of Hugging Face's CogVLM that PEFT is given to train."""


def tree() -> HuggingFaceTree:
    """Return the tiny CogVLM under Hugging Face's names, in float64."""
    return HuggingFaceTree(tiny_model(torch.float64).state_dict(), CONFIG).eval()


@torch.no_grad()
def filled_tree(config: peft.PeftConfig) -> peft.PeftModel:
    """Return the tree under PEFT, with seeded values in all that trains."""
    model = peft.get_peft_model(tree(), config, autocast_adapter_dtype=False).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(0.2 * noise(name, *parameter.shape))
    return model


def written_adapter(folder: Path) -> nn.Module:
    """Return a CogVLM with an adapter of ours on all linears, which FOLDER/ours holds; FOLDER/peft has it exported."""
    model = tiny_model(torch.float64).eval()
    add_lora(model, r=RANK, lora_alpha=8)
    fill_adapters(model)
    save_adapter(model, folder / "ours")
    export_to_peft(folder / "ours", folder / "peft")
    return model


def base_folder(folder: Path) -> Path:
    """Return FOLDER/base, the base in SAT's format."""
    save_weights(folder / "base", CONFIG, tiny_model(torch.float64).state_dict())
    return folder / "base"


@torch.no_grad()
def exported(folder: Path) -> float:
    """Return how far logits of PEFT's `from_pretrained` on our export are from ours."""
    expected = logits_of(written_adapter(folder), double_batch())
    adapted = peft.PeftModel.from_pretrained(tree(), folder / "peft", autocast_adapter_dtype=False).eval()
    return relative_error(adapted(double_batch()), expected)


def and_back(folder: Path) -> float:
    """Return 0 where export and import give back the adapter's bytes."""
    written_adapter(folder)
    import_from_peft(folder / "peft", folder / "back", base=base_folder(folder))
    before, after = (folder / name / WEIGHTS for name in ("ours", "back"))
    return 0.0 if before.read_bytes() == after.read_bytes() else 1.0


@torch.no_grad()
def imported(folder: Path, config: peft.PeftConfig) -> float:
    """Return how far our logits are from PEFT's, with what PEFT saved of Hugging Face's CogVLM."""
    theirs = filled_tree(config)
    theirs.save_pretrained(folder / "peft")
    import_from_peft(folder / "peft", folder / "ours", base=base_folder(folder))
    model = tiny_model(torch.float64).eval()
    load_adapter(model, folder / "ours")
    return relative_error(logits_of(model.eval(), double_batch()), theirs(double_batch()))


def imported_from_sat_names(folder: Path) -> float:
    """Import what PEFT saved of a SAT model."""
    peft_model(tiny_model(torch.float64).eval()).save_pretrained(folder / "peft")
    import_from_peft(folder / "peft", folder / "ours", base=base_folder(folder))
    return 0.0


FILE_TRIALS: dict[str, Callable[[Path], float]] = {
    "export": exported,
    "export and import": and_back,
    "import": lambda folder: imported(folder, peft.LoraConfig(r=3, lora_alpha=5, target_modules=TRAINED)),
    "import of DoRA": lambda folder: imported(folder, peft.LoraConfig(r=3, target_modules=TRAINED, use_dora=True)),
    "import of LoHa": lambda folder: imported(folder, peft.LoHaConfig(r=3, target_modules=TRAINED)),
    "import from SAT's names": imported_from_sat_names,
}


def in_a_folder(trial: Callable[[Path], float]) -> float:
    """Return what a trial returns that needs an empty folder, whose name is not in its errors."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return trial(Path(folder))
        except Exception as problem:
            problem.args = (str(problem).replace(f"{folder}/", ""),)
            raise


# PEFT's tuners in a hook

VARIANTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=RANK, lora_alpha=8),
    "DoRA": lambda: peft.LoraConfig(r=RANK, lora_alpha=8, use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=RANK, total_step=10),
    "LoHa": lambda: peft.LoHaConfig(r=RANK),
    "LoKr": lambda: peft.LoKrConfig(r=RANK),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=2),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=2),
    "HRA": lambda: peft.HRAConfig(r=RANK),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20),
    "C3A": lambda: peft.C3AConfig(block_size=2),
    "MiSS": lambda: peft.MissConfig(r=2),
    "RandLora": lambda: peft.RandLoraConfig(r=RANK),
    "VeRA": lambda: peft.VeraConfig(r=RANK),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=RANK, vector_length=2, num_vectors=8),
}
CUT_KINDS = ("column", "row")
TUNED = (12, 16)
"""In and out features of the layer that the tuners get: whole numbers of their blocks, on two ranks too."""
TUNED_KINDS: dict[str, Callable[[], nn.Module]] = {
    "column": lambda: ColumnParallelLinear(*TUNED, bias=False, gather_output=False),
    "row": lambda: RowParallelLinear(*TUNED, bias=False, input_is_parallel=True),
}


@torch.no_grad()
def stir(tuner: nn.Module) -> dict[str, nn.Parameter]:
    """Add seeded values to what trains in a tuner, and return it."""
    trained = {name: parameter for name, parameter in tuner.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        parameter.add_(0.1 * noise(name, *parameter.shape))
    return trained


def hooked(variant: str, kind: str) -> float:
    """Return the error of a SAT layer with a tuner in its forward: of y, and the gradients of x and of all that trains.

    Expected is what the ranks' tuned weights, joined, give: each that of PEFT's own layer on an nn.Linear. A parameter
    may be one of this rank alone, or the same on every rank, whose gradient is then the sum over them.
    """
    problem = LayerProblem(kind, makers=TUNED_KINDS)
    holder = Holder(plain_linear(problem.layer))
    torch.manual_seed(0)
    plain = inject(with_target(VARIANTS[variant]()), holder).layer.eval()
    own = stir(plain)
    tuned = plain(torch.eye(problem.layer.weight.shape[1], dtype=torch.float64)).T
    weight_gradient = torch.einsum("bso,bsi->oi", problem.dy, problem.x)
    alone = torch.autograd.grad(tuned, [*own.values()], part(weight_gradient, problem.weight_sharding))
    model = Holder(problem.layer)
    torch.manual_seed(0)
    mixin = PeftMixin(model, VARIANTS[variant](), ["layer"]).eval()
    got = problem.results(model.layer, **stir(mixin.tuners["layer"]))
    expected = problem.expected(over_model_parallel(tuned.detach().contiguous(), problem.weight_sharding))
    for name, gradient in zip(own, alone):
        summed = gradient.clone()
        if model_parallel_layout()[1] > 1:
            torch.distributed.all_reduce(summed, group=mpu.get_model_parallel_group())
        expected[name] = min(gradient, summed, key=lambda one: relative_error(got[name], one))
    return worst(got, expected)


def with_target(config: peft.PeftConfig) -> peft.PeftConfig:
    """Return the config, which adapts the layer of a `Holder`."""
    config.target_modules = ["layer"]
    return config


# Two ranks


def on_two_model_parallel_ranks(expected: dict[str, dict], folder: str) -> dict[str, dict]:
    """Return the outcomes on this rank of two; expected: of `reference`, as arrays. FOLDER/RANK gets PEFT's file."""
    world = init_model_parallel(init_distributed(), 2)
    outcomes = {name: Outcome.of(trial) for name, trial in SPLIT_TRIALS.items()}
    for name, arrays in expected.items():
        wanted = {key: torch.from_numpy(array) for key, array in arrays.items()}
        counted = sums_of_sat(name.lower(), "") if name == "LLaMA" else 1
        outcomes[name] = Outcome.of(partial(model_error, name, wanted, counted, model_parallel_size=2))
    outcomes |= {f"{kind}, {name}": Outcome.of(partial(hooked, name, kind)) for name in VARIANTS for kind in CUT_KINDS}
    model = MODELS["LLaMA"].build(model_parallel_size=2).eval()
    peft_model(model).save_pretrained(f"{folder}/{world.rank}")
    return {name: outcome.as_json() for name, outcome in outcomes.items()}


def loaded_whole(folder: str | Path) -> float:
    """Return the error of A and B on one rank, from the folder that PEFT wrote on one of two."""
    plain = MODELS["LLaMA"].build().eval()
    model = peft.PeftModel.from_pretrained(plain, folder, config=peft_config(linears_of(plain), ParallelLora))
    return worst(values_under_peft(model), values_under_peft(peft_model(MODELS["LLaMA"].build())))


def joined_rank_by_rank() -> float:
    """Return how wrong B of q/k/v is, where the two ranks' parts are joined one after the other."""
    whole, cut = noise("B", 36, RANK), Sharding(0, (1, 1, 1))
    return relative_error(torch.cat([cut.shard(whole, rank, 2) for rank in (0, 1)]), whole)


def values_under_peft(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every A and B of PEFT's, gathered where ZeRO-3 has partitioned them."""
    values = {}
    for name, layer in pairs_under_peft(model).items():
        for leaf in LEAVES:
            parameter = getattr(layer, f"lora_{leaf}")["default"].weight
            with gathered([parameter]):
                values[f"{name.removeprefix('base_model.model.')}.{leaf}"] = parameter.detach().clone()
    return values


STEPS = 3


def mean_square(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return a loss that is the mean of those of parts of the batch that have as many rows."""
    return logits_of(model, batch).pow(2).mean()


def under_zero(stage: int, branching: bool, folder: str) -> dict[str, dict]:
    """Return what this rank of two finds after three steps of SGD under DeepSpeed, and what PEFT's file then holds.

    branching: the model skips what no token of its batch needs, and the second rank's batch has no image.
    """
    import deepspeed

    from sat_lora.training.steps.engine import set_up_deepspeed

    world = init_model_parallel(init_distributed())
    batch_for = mixed_batch if branching else image_batch
    alone = peft_model(tiny_model().train())
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        mean_square(alone, joined([batch_for(rank, step) for rank in range(2)])).backward()
        optimizer.step()
    expected = values_under_peft(alone)
    if branching:
        branch_on_data()
    set_up_deepspeed()
    model = peft_model(tiny_model().train())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = engine_config(stage, 2)
    config["zero_optimization"]["reduce_bucket_size"] = 2000  # several buckets a pass, as a large model has
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False)[0]

    def train() -> float:
        for step in range(STEPS):
            engine.backward(mean_square(engine, batch_for(world.rank, step)))
            engine.step()
        return worst(values_under_peft(engine.module), expected)

    def save_and_load(gather: bool = False) -> float:
        with gathered(engine.module.parameters()) if gather else contextlib.nullcontext():
            engine.module.save_pretrained(f"{folder}/{world.rank}")
        plain = tiny_model().eval()
        own = peft_config(linears_of(plain), ParallelLora)
        loaded_model = peft.PeftModel.from_pretrained(plain, f"{folder}/{world.rank}", config=own)
        return worst(values_under_peft(loaded_model), expected)

    trials = {"training": train}
    if not branching:
        trials["save_pretrained"] = save_and_load
    if stage == 3 and not branching:
        trials["save_pretrained, gathered"] = partial(save_and_load, gather=True)
    return {name: Outcome.of(trial).as_json() for name, trial in trials.items()}

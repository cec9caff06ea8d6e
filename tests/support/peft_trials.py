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
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from peft.tuners import lora
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import nn

from sat_lora._sat import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, mpu
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.parallel.sharding import Sharding, gathered, model_parallel_layout, over_model_parallel, sharding_of
from tests.support.branching_cogvlm import branch_on_data
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
from tests.support.tiny import CONFIG, logits_of, randomise, seeded_noise, tiny_batch, tiny_model
from tests.support.training_runs import engine_config, image_batch, joined, mixed_batch

RIGHT = 1e-5
"""SAT's RMSNorm computes in float32; where there is none, errors are near 1e-16."""
HANGS = "hangs"
SCALE = 2.0
RANK = 4
LEAVES = ("A", "B")


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: `ok` or `wrong` with its error, `hangs`, or an exception's type with its first line."""

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

    def __init__(self, kind: str, rows: int = ROWS):
        self.layer = KINDS[kind]().double()
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
        gradients = torch.autograd.grad(y, [x, a, b], self.dy, allow_unused=True)
        values = {"y": (y.detach(), self.output_sharding), "x": (gradients[0], self.input_sharding)}
        if weight is None:
            values |= {leaf: (gradient, cut[leaf]) for leaf, gradient in zip(LEAVES, gradients[1:])}
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


def megatron_layer(kind: str, backend: object, rows: int = ROWS) -> float:
    """Return the error of PEFT's `LoraParallelLinear` around a SAT layer, put there by hand."""
    problem = LayerProblem(kind, rows)
    problem.layer.__class__ = backend.ColumnParallelLinear if kind == "column" else backend.RowParallelLinear
    config = peft_config(["layer"])
    adapted = LoraParallelLinear(
        problem.layer, "default", config, backend, r=RANK, lora_alpha=8, megatron_config=SimpleNamespace()
    )
    return problem.error(adapted.double())


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
    "LoraParallelLinear, Megatron's arguments": lambda: megatron_layer("row", MegatronArguments("megatron")),
    "LoraParallelLinear, two rows": lambda: megatron_layer("row", MegatronArguments("megatron"), rows=2),
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


def model_error(model_name: str, expected: dict[str, torch.Tensor], **changes: object) -> float:
    """Return the error of output and gradients of the model under PEFT against `reference`."""
    model = adapted_model(model_name, **changes)
    output = MODELS[model_name].run(model)
    output.double().pow(2).mean().backward()
    got = {"output": output.detach()}
    mine = {"output": expected["output"]}
    for name, layer in pairs_under_peft(model).items():
        cut = shardings_under_peft(layer.get_base_layer())
        for leaf in LEAVES:
            got[f"{name}.{leaf}"] = getattr(layer, f"lora_{leaf}")["default"].weight.grad
            mine[f"{name}.{leaf}"] = part(expected[f"{name}.{leaf}"], cut[leaf])
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


def loaded(mode: str, inject_first: bool, force_train: bool = False) -> float:
    """Return how far logits are from the checkpoint's, when SAT loads it before or after PEFT's injection (B is 0)."""
    from sat.training.model_io import load_checkpoint

    trained = MODELS["LLaMA"].build()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        (Path(folder) / "1").mkdir()
        (Path(folder) / "latest").write_text("1")
        torch.save({"module": trained.state_dict()}, Path(folder) / "1" / "mp_rank_00_model_states.pt")
        model = with_plain_rotary(llama()).double()
        if inject_first:
            inject(peft_config(linears_of(model), ParallelLora), model)
        load_checkpoint(model, Namespace(mode=mode, load=folder, force_train=force_train))
        if not inject_first:
            inject(peft_config(linears_of(model), ParallelLora), model)
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
